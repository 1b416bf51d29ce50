"""OpenAI's own client, and litellm, against ``mico-chat serve`` with the shipped mini."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.server.support import sent
from tests.server.support.served import Served, environment
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.base_llm

RED_SQUARE = sent.png(sent.square())
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a dog."}]
TYPES = {
    "image": ("image/png", RED_SQUARE),
    "audio": ("audio/wav", sent.wav()),
    "video": ("video/mp4", sent.mp4()),
    "depth": ("image/png", sent.depth()),
    "normal": ("image/png", sent.normal()),
}


def part(kind: str) -> dict[str, Any]:
    return sent.part(kind, sent.data_uri(*TYPES[kind]))


def asked(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def client(service: Served) -> Iterator[OpenAI]:
    options: dict[str, Any] = {"base_url": f"{service.url}/v1", "api_key": service.key}
    with OpenAI(max_retries=0, **options) as one:
        yield one


def ask(client: OpenAI, messages: list[Any], **options: Any) -> Any:
    request = {"model": "mini", "messages": messages, "max_tokens": 24, **options}
    return client.chat.completions.create(**request)


def stream_of(client: OpenAI, messages: list[Any], **options: Any) -> list[ChatCompletionChunk]:
    return list(ask(client, messages, stream=True, **options))


def text_of(completion: ChatCompletion) -> str:
    assert completion.choices[0].message.content
    return completion.choices[0].message.content


def joined(chunks: list[ChatCompletionChunk]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_text(client: OpenAI) -> None:
    found = ask(client, PARIS)
    assert "Paris" in text_of(found)
    assert (found.object, found.model) == ("chat.completion", "mini")
    assert found.choices[0].finish_reason == "stop"
    assert found.id.startswith("chatcmpl-")
    assert found.choices[0].message.role == "assistant"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_is_the_same_answer_with_the_same_usage(client: OpenAI) -> None:
    messages = asked("What colour is it?", part("image"))
    whole = ask(client, messages)
    chunks = stream_of(client, messages, stream_options={"include_usage": True})
    *told, last = chunks
    assert joined(told) == text_of(whole)
    ends = [chunk.choices[0].finish_reason for chunk in told]
    assert [end for end in ends if end] == [whole.choices[0].finish_reason]
    assert told[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in told)
    assert all(chunk.usage is None and chunk.choices for chunk in stream_of(client, messages))
    assert last.choices == []
    assert usage_of(last) == usage_of(whole)
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert [r["name"] for r in told[0].media] == [r["name"] for r in whole.media]  # type: ignore[attr-defined]


def usage_of(found: ChatCompletion | ChatCompletionChunk) -> tuple[int, int, int]:
    """Without what was computed before, which differs the second time."""
    assert found.usage is not None
    usage = found.usage
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


@pytest.mark.parametrize("kind", TYPES)
def test_every_kind_of_medium(client: OpenAI, kind: str) -> None:
    found = ask(client, asked("What is this?", part(kind)))
    assert text_of(found)
    (report,) = found.media
    assert report["kind"] == kind
    assert report["bytes"] == len(TYPES[kind][1])
    assert report["tokens"] == found.usage.prompt_tokens_details.media_tokens > 0


def test_a_picture_is_told_the_same_whichever_way_it_comes(service: Served, client: OpenAI) -> None:
    question = "What colour is it?"
    headers = {"authorization": f"Bearer {service.key}"}
    with httpx.Client(
        base_url=service.url, headers=headers, timeout=PATIENCE_S, trust_env=False
    ) as http:
        file = {"image": ("square.png", RED_SQUARE)}
        id_ = http.post("/v1/media", files=file).json()["id"]
        form = {"message": question, "max_tokens": "24"}
        chat = http.post("/v1/chat", data=form, files=file).json()
        by_id = http.post("/v1/chat", data={**form, "image": f"media:{id_}"}).json()
    answers = [chat["answer"], by_id["answer"]]
    blue = sent.data_uri("image/png", sent.png(sent.square(sent.BLUE)))
    for url in (sent.data_uri(*TYPES["image"]), f"media:{id_}", blue):
        answers.append(text_of(ask(client, asked(question, sent.part("image", url)))))
    assert "red" in answers[0].lower()
    assert answers[:4] == answers[:1] * 4
    assert "blue" in answers[4].lower()


def test_stop(client: OpenAI) -> None:
    whole = text_of(ask(client, PARIS))
    found = ask(client, PARIS, stop=[" is", "never"])
    assert text_of(found) == whole.split(" is")[0]
    assert found.choices[0].finish_reason == "stop"
    assert text_of(ask(client, PARIS, stop=" is")) == text_of(found)
    assert joined(stream_of(client, PARIS, stop=" is")) == text_of(found)


def test_several_answers(client: OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 12}
    found = ask(client, STORY, **options)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    for chunk in stream_of(client, STORY, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_logprobs(client: OpenAI) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    found = ask(client, PARIS, **options).choices[0]
    tokens = found.logprobs.content
    assert "".join(token.token for token in tokens) == found.message.content
    for token in tokens:
        assert bytes(token.bytes or ()).decode() == token.token
        assert len(token.top_logprobs) == 3
        # Greedy: the likeliest is the one that was said.
        likeliest = max(token.top_logprobs, key=lambda top: top.logprob)
        assert (token.token, token.logprob) == (likeliest.token, likeliest.logprob)
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) < 1.001
    streamed = [
        token
        for chunk in stream_of(client, PARIS, **options)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or ()
    ]
    assert [t.token for t in streamed] == [t.token for t in tokens]


class Animal(BaseModel):
    name: str
    legs: int
    wild: bool


def test_json_by_a_schema(client: OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Describe a dog as JSON."}]
    parsed = client.chat.completions.parse(
        model="mini", messages=question, response_format=Animal, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Animal)
    question[0]["content"] = "Write the JSON object of a point with x and y."
    anything = ask(client, question, response_format={"type": "json_object"}, max_tokens=None)
    assert anything.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(text_of(anything)), dict)


def test_embeddings(client: OpenAI) -> None:
    texts = ["a red square", "a dog barks"]
    default = client.embeddings.create(model="mini", input=texts)  # base64 on the wire
    numbers = client.embeddings.create(model="mini", input=texts, encoding_format="float")
    one = client.embeddings.create(model="mini", input=texts[0])
    assert [e.index for e in default.data] == [0, 1]
    vectors = np.array([e.embedding for e in default.data])
    np.testing.assert_allclose(vectors, [e.embedding for e in numbers.data], atol=1e-6)
    np.testing.assert_allclose(vectors[0], one.data[0].embedding, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert default.usage.total_tokens > one.usage.total_tokens > 0
    picture: Any = [part("image")]
    seen = client.embeddings.create(model="mini", input=picture).data[0].embedding
    assert vectors[0] @ seen > vectors[1] @ seen + 0.1


LITELLM = """
import json, sys
import litellm

asked = json.load(sys.stdin)
litellm.telemetry = False
to = {"model": "openai/mini", "num_retries": 0, "max_tokens": 24, **asked["to"]}
chunks = list(litellm.completion(**to, stream=True))
errors = {}
for name, change in asked["wrong"].items():
    try:
        litellm.completion(**{**to, **change})
    except Exception as error:
        errors[name] = type(error).__name__
print(json.dumps({
    "whole": litellm.completion(**to).choices[0].message.content,
    "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
    "errors": errors,
}))
"""


def test_litellm_answers_streams_and_knows_the_errors(service: Served) -> None:
    messages = asked("What colour is it?", part("image"))
    wrong: dict[str, dict[str, Any]] = {
        "AuthenticationError": {"api_key": "wrong"},
        "NotFoundError": {"model": "openai/other"},
        "ContextWindowExceededError": {"max_tokens": 10**6},
        "BadRequestError": {"temperature": 1.5, "top_p": 7},
    }
    to = {"api_base": f"{service.url}/v1", "api_key": service.key, "messages": messages}
    done = subprocess.run(
        [sys.executable, "-c", LITELLM],
        env=environment(LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_LOG="CRITICAL"),
        input=json.dumps({"to": to, "wrong": wrong}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "red" in found["whole"].lower()
    assert found["streamed"] == found["whole"]
    assert found["errors"] == {name: name for name in wrong}


def test_transcriptions(client: OpenAI, talk: Path) -> None:
    with talk.open("rb") as file:
        found = client.audio.transcriptions.create(model="whisper-1", file=file)
    assert "close the window" in found.text
    with talk.open("rb") as file:
        verbose = client.audio.transcriptions.create(
            model="mini",
            file=file,
            language="en",
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
        )
    assert (verbose.text, verbose.language) == (found.text, "english")
    assert verbose.segments is not None
    assert verbose.words is not None
    assert [word.word for word in verbose.words] == found.text.split()
    with talk.open("rb") as file:
        lines = client.audio.transcriptions.create(model="mini", file=file, response_format="srt")
    assert str(lines).startswith("1\n00:00:0")
    with pytest.raises(openai.UnprocessableEntityError, match="not a sound"):
        client.audio.transcriptions.create(model="mini", file=("a.wav", b"no sound at all"))


def test_what_is_said_and_written_stands_in_the_report(client: OpenAI, talk: Path) -> None:
    data = sent.data_uri("audio/wav", talk.read_bytes())
    found = ask(client, asked("What is said?", {"type": "audio_url", "audio_url": {"url": data}}))
    (report,) = found.media
    assert "close the window" in report["spoken"][0]["text"]
    bare = ask(client, asked("What is said?", part("audio")))
    assert bare.media[0]["spoken"] == [], "a tone says nothing"
    assert found.usage.prompt_tokens > bare.usage.prompt_tokens

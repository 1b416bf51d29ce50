"""What limits answers, in OpenAI's and vLLM's names; prompts without a template; tokens."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from openai import BadRequestError, OpenAI
from tokenizers.processors import TemplateProcessing

from mico_chat.adapters.text import TextAdapter
from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.transformers import TransformersModel
from mico_chat.options import GenerationOptions
from mico_chat.prompt_parts import plain_tokens
from tests.engine.tiny_llm import generated, tiny_llm
from tests.server.conftest import Start
from tests.server.support.running import error_of, openai_to
from tests.support.fakes import FakeAssistant, FakeDecoder
from tests.support.tiny import byte_level

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
    ({"response_format": NAMED}, {"json_schema": SCHEMA}),
    ({"response_format": {"type": "structural_tag", **TAG}}, {"structural_tag": TAG}),
    ({"structured_outputs": {"json": SCHEMA}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, {"json_schema": SCHEMA}),
    ({"structured_outputs": {"json_object": True}}, {"json_schema": {"type": "object"}}),
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, {"structural_tag": TAG}),
    ({"guided_json": SCHEMA}, {"json_schema": SCHEMA}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
]


def asked(client: httpx.Client, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Hi"}]
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **body})


def test_each_name_of_a_form_reaches_the_engine(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    for body, _ in FORMS:
        assert asked(client, **body).status_code == 200, body
    assert assistant.options == [GenerationOptions(**form) for _, form in FORMS]
    form = {"message": "Hi", "choice": ["a", "b"]}
    assert client.post("/v1/chat", data=form).status_code == 200
    assert assistant.options[-1].choice == ("a", "b")
    loose = {**NAMED, "json_schema": {"schema": SCHEMA, "strict": False}}
    assert asked(client, response_format=loose).status_code == 200
    assert assistant.options[-1].form == (
        "json_schema",
        {"x-guidance": {"lenient": True}, **SCHEMA},
    )


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "an object"),
        ({"structured_outputs": {"lark": "x"}}, "structured_outputs.lark", "not permitted"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, ".*whitespace_pattern", "permitted"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not permitted"),
        ({"guided_choice": []}, "choice", "at least 1"),
        ({"guided_choice": [1]}, r"guided_choice\[0\]", "a valid string"),
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "choice",
            "regex limits the answer already",
        ),
        ({"guided_regex": "a", "structured_outputs": {"regex": "b"}}, ".*regex", "another field"),
        ({"guided_json": {}, "response_format": NAMED}, "guided_json", "response_format"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    start: Start, body: dict[str, Any], param: str, said: str
) -> None:
    response = asked(start(FakeAssistant()), **body)
    error = error_of(response)
    assert response.status_code == 400
    assert re.fullmatch(param, error["param"])
    assert re.search(said, error["message"])


# --- Prompts without a template -------------------------------------------------------------------

TEXT = "The cat and the dog: "
WRONG: list[Any] = [[1, "a"], [], ["a", 1], [[]], [["a"]], ["a"] * 65]
CHAT: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A tiny random model that reads text alone."""
    llm, tokenizer = tiny_llm(), byte_level()
    engine = BatchingEngine(
        TransformersModel(llm), tokenizer, [tokenizer.eos_token_id], name="transformers"
    )
    encoder = MediaEncoder(TextAdapter(llm, tokenizer), FakeDecoder())
    assistant = Assistant(engine, encoder, name="fake")
    with openai_to(assistant, tmp_path_factory.mktemp("data")) as one:
        yield one


def said(client: OpenAI, prompt: Any = TEXT, **options: Any) -> Any:
    given = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model="fake", prompt=prompt, **given)


def test_a_prompt_is_continued_as_the_library_does(client: OpenAI) -> None:
    tokenizer = byte_level()
    for text in (TEXT, "<|im_start|>user\nHi<|im_end|>\n", " \n猫"):
        ids = tokenizer(text).input_ids
        expected = tokenizer.decode(generated(tiny_llm(), Prompt((tuple(ids),))))
        answer = said(client, text)
        assert answer.choices[0].text == expected
        assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
        assert said(client, ids).choices[0].text == said(client, [text]).choices[0].text == expected
        pieces = list(said(client, text, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.text for piece in pieces for c in piece.choices) == expected
        assert pieces[-1].usage == answer.usage or pieces[-1].usage.total_tokens == len(ids) + 12
    assert said(client, max_tokens=None).usage.completion_tokens == 16


def test_options_of_a_plain_prompt(client: OpenAI) -> None:
    text = said(client).choices[0].text
    ids = byte_level()(TEXT).input_ids
    assert said(client, echo=True).choices[0].text == TEXT + text
    assert said(client, ids, echo=True).choices[0].text == TEXT + text
    echoed = said(client, echo=True, stream=True, n=2, temperature=1, seed=3)
    texts = ["", ""]
    for choice in (choice for piece in echoed for choice in piece.choices):
        texts[choice.index] += choice.text
    whole = said(client, n=2, temperature=1, seed=3)
    assert texts == [TEXT + choice.text for choice in whole.choices]
    assert texts[0] != texts[1]
    assert said(client, stop=text[2:5]).choices[0].text == text[: text.index(text[2:5])]
    known = said(client, logprobs=2).choices[0].logprobs
    cut = "\ufffd"  # a piece of a character
    assert "".join(known.tokens).replace(cut, "") == text.replace(cut, "")
    assert known.text_offset == [len("".join(known.tokens[:n])) for n in range(12)]
    assert all(
        top[token] == value == max(top.values())
        for top, token, value in zip(
            known.top_logprobs, known.tokens, known.token_logprobs, strict=True
        )
    )
    form = {"structured_outputs": {"choice": ["red", "blue"]}}
    assert said(client, extra_body=form).choices[0].text in ("red", "blue")


def test_several_prompts_are_answered_as_each_alone(client: OpenAI) -> None:
    prompts = [TEXT, " \n猫", "a"]
    alone = [said(client, one) for one in prompts]
    right = [one.choices[0].text for one in alone]
    found = said(client, prompts)
    assert [(one.index, one.text) for one in found.choices] == list(enumerate(right))
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(found.usage, name) == sum(getattr(one.usage, name) for one in alone)
    ids = [byte_level()(one).input_ids for one in prompts]
    assert [one.text for one in said(client, ids).choices] == right
    texts = [""] * 6
    pieces: Any = said(client, prompts, n=2, echo=True, stream=True, temperature=1, seed=1)
    for piece in pieces:
        for choice in piece.choices:
            texts[choice.index] += choice.text
    drawn = [one.text for one in said(client, prompts, n=2, temperature=1, seed=1).choices]
    assert texts == [prompts[n // 2] + text for n, text in enumerate(drawn)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_scores_the_prompt(client: OpenAI, stream: bool) -> None:
    ids = byte_level()(TEXT).input_ids
    with torch.no_grad():
        right = tiny_llm()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = said(client, [TEXT, "a"], echo=True, logprobs=3, max_tokens=1, stream=stream)
    chunks = list(found) if stream else [found]
    tokens, logprobs, tops, offsets = [], [], [], []
    for choice in (one for chunk in chunks for one in chunk.choices):
        if choice.index == 0 and (known := choice.logprobs):
            tokens += known.tokens
            logprobs += known.token_logprobs
            tops += known.top_logprobs
            offsets += known.text_offset
    assert "".join(tokens[: len(ids)]) == TEXT
    assert offsets == [len("".join(tokens[:n])) for n in range(len(ids) + 1)]
    assert logprobs[0] is tops[0] is None
    expected = [float(right[n, token]) for n, token in enumerate(ids[1:])]
    assert logprobs[1:-1] == pytest.approx(expected, abs=1e-4)
    for token, own, top in zip(tokens[1:-1], logprobs[1:-1], tops[1:-1], strict=True):
        assert top[token] == own
        assert 1 <= len(top) <= 4


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"extra_body": {"thinking": True}}, "thinking"),
        *(({"prompt": one}, "prompt") for one in WRONG),
        ({"prompt": ["a", "b" * 20_000]}, "messages"),
        ({"prompt": ["a", [300]], "echo": True}, "prompt"),
        ({"prompt": ["a", [1] * 5000], "echo": True, "logprobs": 1}, "messages"),
        *(({"prompt": [token]}, "prompt") for token in (300, -1, 10**30)),
        ({"prompt": ""}, None),
        ({"prompt": "a" * 20_000}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_a_plain_prompt_cannot_have(
    client: OpenAI, body: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(BadRequestError) as failed:
        said(client, **body)
    assert failed.value.param == param
    assert said(client).choices[0].text


# --- Token ids ------------------------------------------------------------------------------------


def posted(client: OpenAI, path: str, **body: Any) -> httpx.Response:
    url = str(client.base_url).removesuffix("v1/") + path
    return httpx.post(url, json=body, headers={"authorization": f"Bearer {client.api_key}"})


def test_texts_and_conversations_become_tokens_and_texts_again(client: OpenAI) -> None:
    tokenizer = byte_level()
    for text in (TEXT, "<|im_start|>user\nHi<|im_end|>\n", " \n猫", ""):
        found = posted(client, "tokenize", model="fake", prompt=text, return_token_strs=True).json()
        ids = tokenizer(text).input_ids
        assert (found["tokens"], found["count"]) == (ids, len(ids))
        assert found["token_strs"] == tokenizer.convert_ids_to_tokens(ids)
        bare = posted(client, "tokenize", prompt=text, add_special_tokens=False).json()
        assert bare["tokens"] == tokenizer(text, add_special_tokens=False).input_ids
        assert posted(client, "detokenize", tokens=ids).json() == {"prompt": text}
    assert (found["max_model_len"], bare["token_strs"]) == (
        tiny_llm().config.max_position_embeddings,
        None,
    )
    chat = CHAT
    found = posted(client, "tokenize", messages=chat).json()
    said = client.chat.completions.create(model="fake", messages=chat, max_tokens=1)
    assert said.usage is not None
    assert found["count"] == len(found["tokens"]) == said.usage.prompt_tokens
    shown: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert found["tokens"] == shown["input_ids"]
    begun = [*chat, {"role": "assistant", "content": "Yes"}]
    more = posted(client, "tokenize", messages=begun, continue_final_message=True).json()
    assert more["tokens"] == [*found["tokens"], *tokenizer("Yes").input_ids]


def test_what_a_tokenizer_puts_around_a_prompt_can_be_left_out() -> None:
    tokenizer = byte_level()
    (end,), ends = tokenizer.all_special_ids, str(tokenizer.eos_token)
    around = TemplateProcessing(single=f"{ends} $A", special_tokens=[(ends, end)])
    tokenizer.backend_tokenizer.post_processor = around
    bare = plain_tokens(tokenizer, TEXT, special=False)
    assert plain_tokens(tokenizer, TEXT) == (end, *bare)
    assert end not in bare


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("tokenize", {}, 400, "prompt"),
        ("tokenize", {"prompt": "a", "messages": CHAT}, 400, "prompt"),
        ("tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("tokenize", {"prompt": "a", "tools": []}, 400, "tools"),
        ("tokenize", {"prompt": "a" * 20_000}, 400, "messages"),
        ("tokenize", {"prompt": "a", "model": "x"}, 404, None),
        ("tokenize", {"messages": []}, 400, "messages"),
        ("tokenize", {"messages": CHAT, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("detokenize", {"tokens": [300]}, 400, "tokens"),
        ("detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("detokenize", {"tokens": ["1"]}, 400, "tokens[0]"),
        ("detokenize", {}, 400, "tokens"),
    ],
)  # fmt: skip
def test_what_is_no_text_and_no_tokens(
    client: OpenAI, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = posted(client, path, **body)
    assert (response.status_code, error_of(response)["param"]) == (status, param), response.text


def test_a_medium_has_no_token_ids(start: Start) -> None:
    url = f"data:image/png;base64,{base64.b64encode(b'x').decode()}"
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    response = start(FakeAssistant()).post("/tokenize", json={"messages": chat})
    assert response.status_code == 400
    assert "/v1/estimate counts its tokens" in error_of(response)["message"]


def test_the_route_has_keys_and_metrics(start: Start) -> None:
    locked = start(FakeAssistant(), require_keys=True)
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        assert locked.post(path).status_code == 401

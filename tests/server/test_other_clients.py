"""Other programs that talk to OpenAI's API, as they are: litellm, and Simon Willison's ``llm``.

They run in processes of their own: both set up more than their import should, and read the user's
folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server import sent
from tests.server.served import Served, environment

pytestmark = pytest.mark.base_llm

RED_SQUARE = sent.png(sent.square())

Llm = Callable[..., str]


@pytest.fixture(scope="module")
def llm(service: Served, tmp_path_factory: pytest.TempPathFactory) -> Llm:
    """Runs the command with the service's model, in a user's folder of its own."""
    folder = tmp_path_factory.mktemp("llm")
    model = {"model_id": "mico", "model_name": "mini", "api_base": f"{service.url}/v1"}
    model |= {"api_key_name": "mico"}
    abilities = {"vision": True, "audio": True, "supports_schema": True}
    # JSON is YAML.
    (folder / "extra-openai-models.yaml").write_text(json.dumps([{**model, **abilities}]))
    variables = environment(LLM_USER_PATH=str(folder), LLM_LOAD_PLUGINS="")
    program = str(Path(sys.executable).with_name("llm"))

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [program, *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()

    run("keys", "set", "mico", "--value", service.key)
    return lambda *arguments: run(*arguments, "-m", "mico", "-o", "max_tokens", "40")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "square.png"
    path.write_bytes(RED_SQUARE)
    return str(path)


def test_llm_streams_what_it_says_otherwise(llm: Llm) -> None:
    question = "What is the capital of France?"
    streamed = llm(question)
    assert "Paris" in streamed
    assert llm(question, "--no-stream") == streamed


def test_llm_shows_a_picture_and_goes_on_with_the_conversation(llm: Llm, picture: str) -> None:
    assert "red" in llm("What colour is it?", "-a", picture).lower()
    assert "square" in llm("What shape is it?", "-c").lower()


def test_llm_asks_by_a_schema(llm: Llm) -> None:
    answer = json.loads(
        llm("Invent a dog.", "--schema", "name, legs int", "-o", "temperature", "0")
    )
    assert set(answer) == {"name", "legs"}
    assert isinstance(answer["legs"], int)


_LITELLM = """
import asyncio, json, sys
import litellm

asked = json.load(sys.stdin)
litellm.telemetry = False
to = {"model": "openai/mini", "api_base": asked["base"], "api_key": asked["key"], "num_retries": 0}
words = {"messages": asked["messages"], "max_tokens": 24}
whole = litellm.completion(**to, **words)
streaming = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(litellm.completion(**to, **words, **streaming))
rebuilt = litellm.stream_chunk_builder(chunks)
again = asyncio.run(litellm.acompletion(**to, **words))
found = litellm.embedding(**to, input=asked["texts"])
errors = {}
for name, change in asked["wrong"].items():
    try:
        litellm.completion(**{**to, **words, **change})
    except Exception as error:
        errors[name] = type(error).__name__
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
    "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
    "stream_usage": [rebuilt.usage.prompt_tokens, rebuilt.usage.completion_tokens],
    "again": again.choices[0].message.content,
    "vectors": [item["embedding"] for item in found.data],
    "errors": errors,
}))
"""


@pytest.fixture(scope="module")
def by_litellm(service: Served) -> dict[str, Any]:
    """What litellm was told; it is slow to import, and does everything in one go."""
    shown = {"type": "image_url", "image_url": {"url": sent.data_uri("image/png", RED_SQUARE)}}
    content = [shown, {"type": "text", "text": "What colour is it?"}]
    asked = {
        "base": f"{service.url}/v1",
        "key": service.key,
        "messages": [{"role": "user", "content": content}],
        "texts": ["a red square", "a dog barks"],
        "wrong": {
            "key": {"api_key": "wrong"},
            "model": {"model": "openai/other"},
            "length": {"max_tokens": 10**6},
            "option": {"temperature": 1.5, "top_p": 7},
        },
    }
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "CRITICAL"}
    done = subprocess.run(
        [sys.executable, "-c", _LITELLM],
        env=environment(**quiet),
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_litellm_shows_a_picture(by_litellm: dict[str, Any]) -> None:
    assert "red" in by_litellm["whole"].lower()
    assert by_litellm["again"] == by_litellm["whole"]


def test_litellm_streams(by_litellm: dict[str, Any]) -> None:
    assert by_litellm["streamed"] == by_litellm["whole"]
    assert by_litellm["stream_usage"] == by_litellm["usage"]


def test_litellm_embeds(by_litellm: dict[str, Any]) -> None:
    one, other = by_litellm["vectors"]
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-3)
    assert sum(x * y for x, y in zip(one, other, strict=True)) < 0.99


def test_litellm_knows_the_errors(by_litellm: dict[str, Any]) -> None:
    assert by_litellm["errors"] == {
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "length": "ContextWindowExceededError",
        "option": "BadRequestError",
    }

"""Another program that talks to OpenAI's API, as it is: litellm, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.server import sent
from tests.server.served import Served, environment

pytestmark = pytest.mark.base_llm

RED_SQUARE = sent.png(sent.square())


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


def test_litellm_answers_streams_embeds_and_knows_the_errors(service: Served) -> None:
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
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert "red" in found["whole"].lower()
    assert found["streamed"] == found["again"] == found["whole"]
    assert found["stream_usage"] == found["usage"]
    one, other = found["vectors"]
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-3)
    assert sum(x * y for x, y in zip(one, other, strict=True)) < 0.99
    assert found["errors"] == {
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "length": "ContextWindowExceededError",
        "option": "BadRequestError",
    }

"""Whether vLLM can be tested here, and how it is started small: ``make test-vllm`` does both."""

import importlib.util
import json
from typing import Any

import pytest

BLOCK = 32
"""Tokens of a block of keys and values."""

ARGUMENTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 1 << 30,
    "block_size": BLOCK,
}

FLAGS = ("--engine", "vllm", "--engine-args", json.dumps(ARGUMENTS))
"""For ``mico-chat serve``."""

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here; `make test-vllm` has it in an environment of its own",
    ),
    # What it imports is given up here and there.
    pytest.mark.filterwarnings("ignore"),
]
"""Marks of a module's tests."""

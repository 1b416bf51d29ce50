"""What vLLM is started with: its ``AsyncEngineArgs``, some ours, the rest the user's by name."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mico_chat.engine.arguments import check_names
from mico_chat.engine.vllm_child import mark_parent
from mico_chat.errors import ConfigError

OURS: dict[str, str] = {
    "model": "--model sets it",
    "tokenizer": "the tokenizer comes with the model",
    "runner": "the engine always generates text",
    "convert": "the engine always generates text",
    "skip_tokenizer_init": "JSON schemas need the tokenizer",
    "enable_prompt_embeds": "vLLM gets media as embeddings",
    "enable_lora": "a model's adapter is already merged",
    "disable_log_stats": "the service keeps its own statistics",
    "quantization": "--quantization sets it",
    "dtype": "--dtype sets it",
}
"""Arguments that are not the user's to set here, and why."""

JSON_SCHEMAS = {
    "backend": "guidance",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
}
"""Of vLLM's backends, the one that follows most of JSON Schema and refuses what it does not. A
small model that may write white space, or properties of its own, wherever it likes never stops;
llama.cpp's grammars do not let it either."""

CPU_KV_BYTES = 2 << 30
"""Keys and values on a CPU, where vLLM would take nearly all memory: 93,000 tokens of the mini."""

MOST_GPU_SHARE = 0.92
"""vLLM's own default share of a GPU's memory."""

SPARE_GPU_SHARE = 0.05
"""Left of what is free on a GPU: the encoder, loaded before, needs it while it computes."""


def set_environment() -> None:
    """What vLLM reads from the environment when it is imported, unless the user has set it.

    It logs through this process's handlers instead of on standard output, starts its processes
    anew instead of by a fork of one with threads, tells nobody of its use, and ends with this
    process.
    """
    mark_parent()
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def engine_arguments(
    llm: str | Path,
    given: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_running: int | None = None,
) -> Any:
    """``AsyncEngineArgs`` for a language model.

    Args:
        llm: a Hugging Face folder or hub name of a causal LM.
        given: the user's, by vLLM's names.
        dtype: the LLM's own where not given.
        quantization: by vLLM's name; that of a quantized folder need not be named.
        max_running: vLLM's own choice where not given.

    Raises:
        ConfigError: for a name or quantization that vLLM has not, or an argument that is ours.
    """
    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    for name in given:
        if name in OURS:
            raise ConfigError(f"the option {name!r} of the vllm engine cannot be set: {OURS[name]}")
    check_names("vllm", given, [field.name for field in dataclasses.fields(AsyncEngineArgs)])
    if quantization is not None and quantization not in QUANTIZATION_METHODS:
        known = ", ".join(QUANTIZATION_METHODS)
        raise ConfigError(
            f"quantization {quantization!r}: the vllm engine lacks it; choose one of {known}"
        )
    arguments: dict[str, Any] = {
        "model": str(llm),
        "tokenizer": str(llm),
        "dtype": dtype or "auto",
        "quantization": quantization,
        "enable_prompt_embeds": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "structured_outputs_config": JSON_SCHEMAS,
        # Else a sampled answer without a seed is the same after each start.
        "seed": secrets.randbits(31),
        **({} if max_running is None else {"max_num_seqs": max_running}),
        **_memory(given),
        **given,
    }
    try:
        return AsyncEngineArgs(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its options: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of one of pydantic's, its first."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        return f"{name}: {first['msg']}" if name else first["msg"]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _memory(given: Mapping[str, Any]) -> dict[str, Any]:
    """How much memory vLLM may take, where the user does not say."""
    from vllm.platforms import current_platform

    if "gpu_memory_utilization" in given or "kv_cache_memory_bytes" in given:
        return {}
    if current_platform.is_cpu():
        own = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        return {} if own else {"kv_cache_memory_bytes": CPU_KV_BYTES}
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": gpu_share(free, total)}


def gpu_share(free: int, total: int) -> float:
    """The share of a GPU's memory for vLLM, beside what is taken already.

    vLLM refuses to start where less than its share is free.
    """
    return max(0.01, min(MOST_GPU_SHARE, round(free / total - SPARE_GPU_SHARE, 3)))

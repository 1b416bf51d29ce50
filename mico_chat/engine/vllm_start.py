"""How vLLM is started: its environment and arguments; and how its processes end.

A service that is killed tells nobody. vLLM's processes would live on and keep the GPU's memory from
the next service, so each of them loads :func:`end_with_parent` as a plugin
(``vllm.general_plugins`` in pyproject.toml). It leaves the processes of other programs alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mico_chat.engine.base import check_names
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
"""Arguments that a user cannot set by vLLM's names, and why."""

JSON_SCHEMAS = {
    "backend": "guidance",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
}
"""Of vLLM's backends, guidance follows most of JSON Schema and refuses the rest. A small model that
may write white space, or properties of its own, anywhere never stops; llama.cpp's grammars do not
allow it either."""

CPU_KV_BYTES = 2 << 30
"""Keys and values on a CPU, where vLLM would take nearly all memory: 93,000 tokens of the mini."""

MOST_GPU_SHARE = 0.92  # vLLM's own default share of a GPU's memory
SPARE_GPU_SHARE = 0.05
"""The share of a GPU's memory that is left free: the encoder needs it while it computes."""

PARENT = "MICO_VLLM_PARENT"
"""The environment variable by which vLLM's processes know the process that started vLLM."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def set_environment() -> None:
    """Set the environment that vLLM reads when it is imported, unless the user has set it.

    vLLM then logs through this process's handlers, starts new processes instead of forking one with
    threads, reports its use to nobody, and ends with this process.
    """
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def end_with_parent() -> None:
    """In a process of vLLM: be killed when the process that started it ends."""
    if sys.platform == "linux" and os.environ.get(PARENT) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def engine_arguments(
    llm: str | Path,
    given: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_running: int | None = None,
) -> Any:
    """``AsyncEngineArgs`` for ``llm``, a Hugging Face folder or hub name of a causal LM.

    ``given`` are the user's arguments, by vLLM's names.
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
        # With vLLM's own seed, a sampled answer would be the same after each start.
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
    """An error's message in one line; of pydantic's errors the first."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        return f"{name}: {first['msg']}" if name else first["msg"]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _memory(given: Mapping[str, Any]) -> dict[str, Any]:
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
    """The share of a GPU's memory for vLLM, which refuses to start where less is free."""
    return max(0.01, min(MOST_GPU_SHARE, round(free / total - SPARE_GPU_SHARE, 3)))

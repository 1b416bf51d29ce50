"""The environment and arguments with which vLLM is started, and how its processes end.

If a service is killed, vLLM's processes would live on and keep the GPU's memory. So each of them
loads the plugin :func:`end_with_parent` (``vllm.general_plugins`` in pyproject.toml), which does
nothing in programs other than mico-chat.
"""

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mico_chat import system
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
    "mm_processor_cache_gb": "the service's own cache keeps media",
    "quantization": "--quantization sets it",
    "dtype": "--dtype sets it",
}
"""Arguments that a user cannot set by vLLM's names, and why."""

JSON_SCHEMAS = {
    "backend": "guidance",
    "disable_any_whitespace": True,
    "disable_additional_properties": True,
}
"""Of vLLM's backends, guidance supports most of JSON Schema and refuses the rest. A small model
never stops if it may write white space or new properties anywhere; llama.cpp's grammars forbid both
too."""

CPU_KV_BYTES = 2 << 30
"""Keys and values take this memory on a CPU: 93,000 tokens of the mini. vLLM would take nearly
all."""

MOST_GPU_SHARE = 0.92  # vLLM's own default share of a GPU's memory
SPARE_GPU_SHARE = 0.05
"""The share of a GPU's memory that stays free for the computations of the media encoder."""

PARENT = "MICO_VLLM_PARENT"
"""This environment variable holds the id of the process that started vLLM."""


def set_environment() -> None:
    """Set the environment that vLLM reads when it is imported, unless the user has set it.

    vLLM then logs through this process's handlers, spawns processes instead of forking, sends no
    usage statistics, and ends with this process.
    """
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def end_with_parent() -> None:
    """In a process of vLLM: ask Linux to kill it when the process that started vLLM ends."""
    if os.environ.get(PARENT) == str(os.getppid()):
        system.end_with_parent()


def engine_arguments(
    llm: str | Path,
    given: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    max_running: int | None = None,
    media: Mapping[str, int] | None = None,
) -> Any:
    """``AsyncEngineArgs`` for ``llm``, a Hugging Face folder or hub name.

    ``given`` are the user's arguments, by vLLM's names. ``media`` are the most media of each
    modality in a request to a model that encodes them in vLLM; None for a causal LM.
    """
    set_environment()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    for name in given:
        if name in OURS:
            raise ConfigError(f"the option {name!r} of the vllm engine cannot be set: {OURS[name]}")
    check_names("vllm", given, [field.name for field in dataclasses.fields(AsyncEngineArgs)])
    if quantization is not None and quantization not in QUANTIZATION_METHODS:
        reason = f"the vllm engine lacks it; choose one of {', '.join(QUANTIZATION_METHODS)}"
        raise ConfigError(f"quantization {quantization!r}: {reason}")
    by_media: dict[str, Any] = {"enable_prompt_embeds": True}
    if media is not None:
        by_media = {"limit_mm_per_prompt": dict(media), "mm_processor_cache_gb": 0}
    arguments: dict[str, Any] = {
        "model": str(llm),
        "tokenizer": str(llm),
        "dtype": dtype or "auto",
        "quantization": quantization,
        **by_media,
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
    """The first line of an error's message, or the first error of a pydantic validation."""
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
    """The share of a GPU's memory for vLLM, which does not start if less is free."""
    return max(0.01, min(MOST_GPU_SHARE, round(free / total - SPARE_GPU_SHARE, 3)))

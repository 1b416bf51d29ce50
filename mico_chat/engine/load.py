"""From a model's name to an assistant: which engine, which weights."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mico_chat.assistant import Assistant
from mico_chat.engine.base import Engine
from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.media.decoder import Decoder

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "llamacpp", "transformers"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DTYPES = ("float32", "bfloat16", "float16")

BITSANDBYTES = ("int8", "nf4")
"""Quantizations of the transformers engine; those of llamacpp are GGUF's."""


def asked_quantization(
    quantization: str | None, load_in_4bit: bool = False, load_in_8bit: bool = False
) -> str | None:
    """The quantization that a command's options ask for; the last two are short for it.

    Raises:
        ConfigError: where they ask for different ones.
    """
    asked = {
        "--load-in-4bit": "nf4" if load_in_4bit else None,
        "--load-in-8bit": "int8" if load_in_8bit else None,
        f"--quantization {quantization}": quantization,
    }
    given = {flag: name for flag, name in asked.items() if name is not None}
    if len(set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    return next(iter(given.values()), None)


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    ``quantization``: of llamacpp one of GGUF's (Q8_0, Q4_0, ...), of transformers ``int8`` or
    ``nf4``, by default the engine's own choice. ``dtype`` and ``device`` are torch's.
    ``max_running`` requests are computed at the same time, ``max_batch`` tokens in one step.
    ``context_cache_bytes`` of context tokens are kept for media that are shown again.
    """

    engine: str = "auto"
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_running: int = 16
    max_batch: int = 512
    context_cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"no engine {self.engine!r}; known are {', '.join(ENGINES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r}; known are {', '.join(DTYPES)}")


def load_assistant(
    model: str | Path, decoder: Decoder, options: EngineOptions | None = None
) -> Assistant:
    """Load ``model`` ("mini", a folder or a hub name) into the engine for this machine.

    ``decoder`` stays the caller's, who closes it. The log says which engine was taken and why;
    ``auto`` takes transformers where llama.cpp cannot hold the model.

    Raises:
        ConfigError: for a quantization or device that there is not.
        MissingExtraError: for an engine that is not installed.
        ModelError: for a model that cannot be loaded.
    """
    options = options or EngineOptions()
    if options.device is not None:
        _check_device(options.device)
    engine, why = _chosen(options)
    logger.info("engine: %s (%s)", engine, why)
    if engine == "llamacpp":
        try:
            return _with_llamacpp(model, decoder, options)
        except ModelError as error:
            if options.engine != "auto" or options.quantization is not None:
                raise
            logger.info("engine: transformers (not llamacpp: %s)", error)
    return _with_transformers(model, decoder, options)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch has no error of its own for it
        raise ConfigError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error


def _chosen(options: EngineOptions) -> tuple[str, str]:
    """The engine, and why it: what is installed and what the machine has."""
    installed = importlib.util.find_spec("llama_cpp") is not None
    if options.engine == "llamacpp" and not installed:
        raise MissingExtraError("the llamacpp engine", "llamacpp")
    if options.engine != "auto":
        return options.engine, "asked for"
    if options.quantization in BITSANDBYTES:
        return "transformers", f"{options.quantization} is bitsandbytes'"
    if not installed:
        return "transformers", "llama-cpp-python is not installed"
    if options.quantization is not None:
        return "llamacpp", f"{options.quantization} is GGUF's"
    import torch

    if options.device is None and not torch.cuda.is_available():
        return "llamacpp", f"the fastest on {os.cpu_count()} cores without a GPU"
    if options.device is not None and torch.device(options.device).type == "cpu":
        return "llamacpp", "the fastest on a CPU"
    return "transformers", f"on {options.device or torch.cuda.get_device_name()}"


def _with_llamacpp(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    from mico_chat.checkpoint import load_encoder
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.llamacpp import LlamaCppModel
    from mico_chat.gguf_export import DEFAULT_QUANTIZATION, gguf_of

    file = gguf_of(model, options.quantization or DEFAULT_QUANTIZATION)
    runs = LlamaCppModel(file, max_batch=options.max_batch)
    chat, processor = load_encoder(model, dtype=options.dtype, device=options.device)
    ends = runs.ends | {processor.tokenizer.eos_token_id}
    engine = BatchingEngine(
        runs, processor.tokenizer, ends, name="llamacpp", max_running=options.max_running
    )
    return _assistant(model, chat, processor, engine, decoder, options)


def _with_transformers(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    from mico_chat.checkpoint import load_chat

    chat, processor = load_chat(
        model,
        dtype=options.dtype,
        device=options.device,
        quantization_config=_bitsandbytes(options.quantization),
    )
    engine = transformers_engine(chat, processor, options)
    return _assistant(model, chat, processor, engine, decoder, options)


def _assistant(
    model: str | Path,
    chat: Any,
    processor: Any,
    engine: Engine,
    decoder: Decoder,
    options: EngineOptions,
) -> Assistant:
    from mico_chat.checkpoint import has_text_branch
    from mico_chat.media_encoder import MediaEncoder

    encoder = MediaEncoder(chat, processor, decoder, cache_bytes=options.context_cache_bytes)
    similarity = None
    if has_text_branch(model):
        similarity = _similarity(model, chat, processor, decoder, options)
    return Assistant(engine, encoder, processor, name=_name(model), similarity=similarity)


def _similarity(
    model: str | Path, chat: Any, processor: Any, decoder: Decoder, options: EngineOptions
) -> Any:
    from mico_chat.checkpoint import load_pretraining
    from mico_chat.similarity import DEFAULT_CACHE_BYTES, Similarity

    branch, tokenizer = load_pretraining(model, chat)
    kept = min(options.context_cache_bytes, DEFAULT_CACHE_BYTES)
    return Similarity(branch, tokenizer, processor, decoder, cache_bytes=kept)


def transformers_engine(chat: Any, processor: Any, options: EngineOptions) -> Engine:
    """An engine over the language model of a loaded chat model."""
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.transformers import TransformersModel

    runs = TransformersModel(chat.llm, max_batch=options.max_batch)
    return BatchingEngine(
        runs,
        processor.tokenizer,
        _ends(chat, processor),
        name="transformers",
        max_running=options.max_running,
    )


def _ends(chat: Any, processor: Any) -> set[int]:
    """Tokens that end an answer: those that the tokenizer, or the LLM in either config, names."""
    found: set[int] = set()
    for named in (
        processor.tokenizer.eos_token_id,
        chat.llm.config.eos_token_id,
        chat.llm.generation_config.eos_token_id,
    ):
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return found


def _bitsandbytes(quantization: str | None) -> Any:
    if quantization is None:
        return None
    if quantization not in BITSANDBYTES:
        known = ", ".join(BITSANDBYTES)
        raise ConfigError(
            f"quantization {quantization!r}: the transformers engine has {known}; GGUF's are "
            "for --engine llamacpp"
        )
    import torch
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _name(model: str | Path) -> str:
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else str(model)

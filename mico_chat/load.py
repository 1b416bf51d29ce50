"""From a model's name to an assistant: which engine, which weights."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mico_chat.assistant import Assistant
from mico_chat.checkpoints.folders import local_folder, model_folder
from mico_chat.engine.arguments import check_sizes
from mico_chat.engine.base import Engine, GenerationOptions
from mico_chat.errors import ConfigError, MissingExtraError, ModelError, RequestError
from mico_chat.media.decoder import Decoder

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "llamacpp", "transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

MAX_RUNNING = 16
"""Requests that llamacpp and transformers compute at the same time where nothing is said."""

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
    ``nf4``, of vllm one of its own (awq, gptq, fp8, bitsandbytes, ...), by default the engine's
    own choice. ``dtype`` and ``device`` are torch's; with vllm the device is the encoder's alone.
    ``max_running`` requests are computed at the same time (by default 16, with vllm its own
    choice), ``max_batch`` tokens in one step (of vllm, ``arguments`` say so).
    ``context_cache_bytes`` of context tokens are kept for media that are shown again.
    ``arguments`` are more of the engine's own, by its names: vLLM's ``AsyncEngineArgs``, for the
    others see :data:`mico_chat.engine.arguments.SIZES`. Without ``chat_defaults`` the checkpoint's
    own system prompt and generation options are left out: an evaluation measures the weights.
    """

    engine: str = "auto"
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_running: int | None = None
    max_batch: int = 512
    context_cache_bytes: int = 256 << 20
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_defaults: bool = True

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"no engine {self.engine!r}; known are {', '.join(ENGINES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r}; known are {', '.join(DTYPES)}")


def load_assistant(
    model: str | Path,
    decoder: Decoder,
    options: EngineOptions | None = None,
    *,
    similarity: bool = True,
) -> Assistant:
    """Load ``model`` ("mini", a folder or a hub name) into the engine for this machine.

    ``decoder`` stays the caller's, who closes it. The log says which engine was taken and why;
    ``auto`` takes transformers where llama.cpp cannot hold the model. Who only asks questions needs
    no ``similarity``, whose text branch takes as long to load as all the rest.

    Raises:
        ConfigError: for a quantization, device or argument that there is not.
        MissingExtraError: for an engine that is not installed.
        ModelError: for a model that cannot be loaded.
    """
    from mico_chat.checkpoints.load import has_text_branch

    options = options or EngineOptions()
    with without_collection():
        assistant = _loaded(model, decoder, options)
        if similarity and has_text_branch(model):
            assistant.similarity = _similarity(model, assistant, decoder, options)
        return assistant


@contextmanager
def without_collection() -> Iterator[None]:
    """Spare Python's garbage collector what is imported and loaded to stay: a tenth of its time.

    What is there at the end is left alone by later collections too.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.freeze()
            gc.enable()


def _loaded(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    # A name that leads nowhere is reported at once: transformers would try for half a minute.
    local_folder(model_folder(model), "config.json")
    if options.device is not None:
        _check_device(options.device)
    engine, why = _chosen(options)
    logger.info("engine: %s (%s)", engine, why)
    if engine == "vllm":
        return _with_vllm(model, decoder, options)
    check_sizes(engine, options.arguments)
    if engine == "llamacpp":
        try:
            return _with_llamacpp(model, decoder, options)
        except ModelError as error:
            if options.engine != "auto" or options.quantization is not None or options.arguments:
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
    if options.engine != "auto":
        module, extra = _MODULES.get(options.engine, ("", ""))
        if module and not _installed(module):
            raise MissingExtraError(f"the {options.engine} engine", extra)
        return options.engine, "asked for"
    if options.quantization in BITSANDBYTES:
        return "transformers", f"{options.quantization} is bitsandbytes'"
    of_gguf = options.quantization in _gguf_quantizations()
    gpu = _gpu(options.device)
    if gpu is not None and not of_gguf and _installed("vllm"):
        return "vllm", f"on {gpu}"
    if not _installed("llama_cpp"):
        return "transformers", "llama-cpp-python is not installed"
    if options.quantization is not None:
        return "llamacpp", f"{options.quantization} is GGUF's" if of_gguf else "no other has it"
    if gpu is None and options.device is None:
        return "llamacpp", f"the fastest on {os.cpu_count()} cores without a GPU"
    if options.device is not None and options.device.split(":")[0] == "cpu":
        return "llamacpp", "the fastest on a CPU"
    return "transformers", f"on {gpu or options.device}"


_MODULES = {"llamacpp": ("llama_cpp", "llamacpp"), "vllm": ("vllm", "vllm")}
"""Module and extra of engines that are not always installed."""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _gpu(device: str | None) -> str | None:
    """The CUDA device that is asked for or, if none is, there; None for none."""
    import torch

    if device is not None:
        return device if torch.device(device).type == "cuda" else None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _gguf_quantizations() -> tuple[str, ...]:
    from mico_chat.checkpoints.gguf_export import QUANTIZATIONS

    return QUANTIZATIONS


def _with_vllm(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    from mico_chat.checkpoints.load import load_encoder, read_token_table
    from mico_chat.checkpoints.merge import plain_llm
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_arguments import engine_arguments

    # First the encoder: what it takes of a GPU is not vLLM's to take.
    chat, processor = load_encoder(model, dtype=options.dtype, device=options.device)
    llm = plain_llm(model)
    arguments = engine_arguments(
        llm,
        options.arguments,
        dtype=options.dtype,
        quantization=options.quantization,
        max_running=options.max_running,
    )
    # What the generation config names beside these, vLLM reads itself.
    ends = _ends(processor, chat.llm.config)

    def table(dtype: Any) -> Any:
        return read_token_table(llm, dtype).embed_tokens.weight

    engine = VllmEngine(arguments, processor.tokenizer, ends, table=table)
    return _assistant(model, chat, processor, engine, decoder, options)


def _with_llamacpp(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    from mico_chat.checkpoints.gguf_export import DEFAULT_QUANTIZATION, gguf_of
    from mico_chat.checkpoints.load import load_encoder
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.llamacpp import LlamaCppModel

    file = gguf_of(model, options.quantization or DEFAULT_QUANTIZATION)
    # llama.cpp reads its file without Python, while Python loads the encoder.
    with ThreadPoolExecutor(1) as beside:
        coming = beside.submit(
            LlamaCppModel, file, max_batch=options.max_batch, **options.arguments
        )
        try:
            chat, processor = load_encoder(model, dtype=options.dtype, device=options.device)
        except BaseException:
            if coming.exception() is None:
                coming.result().close()
            raise
        runs = coming.result()
    ends = runs.ends | {processor.tokenizer.eos_token_id}
    engine = BatchingEngine(
        runs,
        processor.tokenizer,
        ends,
        name="llamacpp",
        max_running=options.max_running or MAX_RUNNING,
    )
    return _assistant(model, chat, processor, engine, decoder, options)


def _with_transformers(model: str | Path, decoder: Decoder, options: EngineOptions) -> Assistant:
    from mico_chat.checkpoints.load import load_chat

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
    from mico_chat.encode import MediaEncoder

    encoder = MediaEncoder(chat, processor, decoder, cache_bytes=options.context_cache_bytes)
    assistant = Assistant(engine, encoder, processor, name=_name(model))
    if options.chat_defaults:
        assistant.system_prompt = processor.system_prompt
        assistant.defaults = _defaults(model, chat)
    return assistant


def _defaults(model: str | Path, chat: Any) -> GenerationOptions:
    try:
        return GenerationOptions.of_checkpoint(chat.generation or {})
    except RequestError as error:
        raise ModelError(f"{model}: generation_config.json: {error}") from error


def _similarity(
    model: str | Path, assistant: Assistant, decoder: Decoder, options: EngineOptions
) -> Any:
    from mico_chat.checkpoints.load import load_pretraining
    from mico_chat.similarity import DEFAULT_CACHE_BYTES, Similarity

    branch, tokenizer = load_pretraining(model, assistant.encoder.model)
    kept = min(options.context_cache_bytes, DEFAULT_CACHE_BYTES)
    return Similarity(branch, tokenizer, assistant.processor, decoder, cache_bytes=kept)


def transformers_engine(chat: Any, processor: Any, options: EngineOptions) -> Engine:
    """An engine over the language model of a loaded chat model."""
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.transformers import TransformersModel

    runs = TransformersModel(chat.llm, max_batch=options.max_batch, **options.arguments)
    return BatchingEngine(
        runs,
        processor.tokenizer,
        _ends(processor, chat.llm.config, chat.llm.generation_config),
        name="transformers",
        max_running=options.max_running or MAX_RUNNING,
    )


def _ends(processor: Any, *configs: Any) -> set[int]:
    """Tokens that end an answer: those that the tokenizer, or one of the LLM's configs, names."""
    found: set[int] = set()
    for named in (
        processor.tokenizer.eos_token_id,
        *(config.eos_token_id for config in configs),
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
            "for --engine llamacpp, vLLM's for --engine vllm"
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

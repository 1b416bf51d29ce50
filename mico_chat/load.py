"""Loads a model by its name: chooses the engine, loads the weights, makes the assistant."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mico_chat.assistant import Assistant
from mico_chat.checkpoints.folders import local_folder, model_folder, model_name
from mico_chat.engine.base import SIZES, Engine, GenerationOptions, check_sizes
from mico_chat.errors import ConfigError, MicoError, MissingExtraError, ModelError, RequestError
from mico_chat.media.decoder import Decoder
from mico_chat.reading import installed_reader
from mico_chat.settings import Settings

if TYPE_CHECKING:
    from mico_chat.adapters.base import ModelAdapter
    from mico_chat.checkpoints.gguf_files import GgufFiles
    from mico_chat.model.processing import MicoChatProcessor

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "llamacpp", "transformers", "vllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

MAX_RUNNING = 16  # requests that llamacpp and transformers compute at the same time by default
DTYPES = ("float32", "bfloat16", "float16")

BITSANDBYTES = ("int8", "nf4")
"""Quantizations of the transformers engine; those of llamacpp are GGUF's."""


def asked_quantization(
    quantization: str | None, load_in_4bit: bool = False, load_in_8bit: bool = False
) -> str | None:
    """The quantization that ``--quantization`` or one of its short forms asks for."""
    asked = {
        "--load-in-4bit": "nf4" if load_in_4bit else None,
        "--load-in-8bit": "int8" if load_in_8bit else None,
        f"--quantization {quantization}": quantization,
    }
    given = {flag: name for flag, name in asked.items() if name is not None}
    if len(names := set(given.values())) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    return names.pop() if names else None


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    ``quantization`` is a type of GGUF for llamacpp (Q8_0, Q4_0, ...), ``int8`` or ``nf4`` for
    transformers, a method of vLLM for vllm; by default the engine chooses. For vllm, ``device`` is
    only the media encoder's. At most ``max_running`` requests run at once, with ``max_batch``
    tokens in a step. vLLM takes at most ``max_media`` media of each kind in a request to another
    project's model. Context tokens of media are cached, up to ``context_cache_bytes``.
    ``arguments`` are those of the engine: vLLM's ``AsyncEngineArgs``, or
    :data:`mico_chat.engine.base.SIZES`. Without ``chat_defaults``, the checkpoint's system prompt,
    generation options and mark of unsure answers are not used, and text and speech are recognised
    only if ``MICO_READS`` says so: an evaluation measures the weights alone. Python code that a
    model's folder brings is run only with ``trust_remote_code``. ``mmproj`` is the projector of a
    GGUF model's media; by default the one beside it. ``depth_model`` estimates the depth of
    pictures, where a question asks for it (:func:`mico_chat.reading.depths.depth_estimator`).
    """

    engine: str = "auto"
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_running: int | None = None
    max_batch: int = 512
    max_media: int = 32
    context_cache_bytes: int = 256 << 20
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_defaults: bool = True
    trust_remote_code: bool = False
    mmproj: Path | None = None
    depth_model: str | None = None

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

    The caller closes ``decoder``. The engine ``auto`` becomes transformers if llama.cpp cannot load
    the model. Without ``similarity`` loading takes half as long.
    """
    options = options or EngineOptions()
    with without_collection():
        depths = None
        if options.depth_model is not None:
            from mico_chat.reading.depths import depth_estimator

            depths = depth_estimator(options.depth_model, options.device)
        with _readable(model):
            loaded = _loaded(model, options)
        from mico_chat.adapters.mico import MicoAdapter
        from mico_chat.checkpoints.load import has_text_branch, load_pretraining
        from mico_chat.encode import MediaEncoder

        adapter = loaded.adapter
        own = isinstance(adapter, MicoAdapter)
        reads = Settings().reads
        if reads is None and not (options.chat_defaults and own):
            reads = False  # other models read for themselves
        encoder = MediaEncoder(
            adapter,
            decoder,
            cache_bytes=options.context_cache_bytes,
            reader=installed_reader(reads),
            depths=depths,
        )

        assistant = Assistant(loaded.engine, encoder, name=model_name(model))
        if options.chat_defaults:
            assistant.system_prompt = loaded.system_prompt
            generation = loaded.generation or {}
            try:
                assistant.defaults = GenerationOptions.of_checkpoint(generation)
                assistant.unsure_below = _unsure_below(generation)
            except RequestError as error:
                raise ModelError(f"{model}: generation_config.json: {error}") from error
        if similarity and isinstance(adapter, MicoAdapter) and has_text_branch(model):
            from mico_chat.similarity import DEFAULT_CACHE_BYTES, Similarity

            branch, tokenizer = load_pretraining(model, adapter.model)
            kept = min(options.context_cache_bytes, DEFAULT_CACHE_BYTES)
            assistant.similarity = Similarity(
                branch, tokenizer, adapter.processor, decoder, cache_bytes=kept
            )
        return assistant


@contextmanager
def _readable(model: str | Path) -> Iterator[None]:
    """Whatever a broken or hostile file of a model makes a library raise is a ModelError."""
    try:
        yield
    except RequestError as error:  # nobody has asked yet: the model's own template refuses
        raise ModelError(f"{model}: {error}") from error
    except MicoError:
        raise
    except Exception as error:
        kind, reason = type(error).__name__, " ".join(str(error).split())
        raise ModelError(f"{model}: a file there is broken: {kind}: {reason}") from error


def _unsure_below(generation: Mapping[str, Any]) -> float | None:
    value = generation.get("unsure_below")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError.at("unsure_below", f"expected a confidence of 0 to 1, got {value!r}")
    return float(value)


@contextmanager
def without_collection() -> Iterator[None]:
    """Load without Python's garbage collector, which would take a tenth of the time.

    Later collections skip all objects that exist at the end of the block.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.freeze()
            gc.enable()


@dataclass(frozen=True)
class Loaded:
    """A model's adapter, and the engine with its language model.

    ``generation`` is the content of its folder's ``generation_config.json``.
    """

    adapter: ModelAdapter
    engine: Engine
    generation: Mapping[str, Any] | None = None
    system_prompt: str | None = None

    @classmethod
    def of_mico(cls, chat: Any, processor: MicoChatProcessor, engine: Engine) -> Loaded:
        from mico_chat.adapters.mico import MicoAdapter

        adapter = MicoAdapter(chat, processor)
        return cls(adapter, engine, chat.generation, processor.system_prompt)


def is_mico(model: str | Path) -> bool:
    """Whether a folder or hub name is a model of this project, by its ``config.json``."""
    # An unknown name is reported at once: transformers would search for half a minute.
    file = local_folder(model_folder(model), "config.json") / "config.json"
    try:
        kind = str(json.loads(file.read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{model}: its config.json cannot be read: {error}") from error
    return kind.startswith("mico")


def _loaded(model: str | Path, options: EngineOptions) -> Loaded:
    from mico_chat.checkpoints.gguf_files import gguf_files

    if (files := gguf_files(model, options.mmproj)) is not None:
        return _with_gguf(files, options)
    own = is_mico(model)
    if options.device is not None:
        check_device(options.device)
    engine, why = choose_engine(options)
    if not own:
        from mico_chat.open_models import load_in_vllm, load_open

        if options.engine == "llamacpp":
            raise ConfigError(
                f"{model}: llama.cpp reads another project's model from GGUF files, not from this "
                "folder: use --engine transformers"
            )
        if options.engine == "vllm":
            logger.info("engine: vllm (asked for)")
            return load_in_vllm(model, options)
        logger.info("engine: transformers (another project's model)")
        check_sizes("transformers", options.arguments)
        return load_open(model, options, _bitsandbytes(options.quantization))
    logger.info("engine: %s (%s)", engine, why)
    if engine == "vllm":
        return _with_vllm(model, options)
    check_sizes(engine, options.arguments)
    if engine == "llamacpp":
        try:
            return _with_llamacpp(model, options)
        except ModelError as error:
            for_both = set(options.arguments) <= set(SIZES["transformers"])
            if options.engine != "auto" or options.quantization is not None or not for_both:
                raise
            logger.info("engine: transformers (not llamacpp: %s)", error)
    return _with_transformers(model, options)


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises either of them
        raise ConfigError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error


def choose_engine(options: EngineOptions) -> tuple[str, str]:
    if options.engine != "auto":
        module = {"llamacpp": "llama_cpp", "vllm": "vllm"}.get(options.engine)
        if module and not _installed(module):
            raise MissingExtraError(f"the {options.engine} engine", options.engine)
        return options.engine, "asked for"
    if options.quantization in BITSANDBYTES:
        return "transformers", f"{options.quantization} is bitsandbytes'"
    from mico_chat.checkpoints.gguf_export import QUANTIZATIONS

    of_gguf = options.quantization in QUANTIZATIONS
    gpu = _gpu(options.device)
    if gpu is not None and not of_gguf and _installed("vllm"):
        return "vllm", f"on {gpu}"
    if not _installed("llama_cpp"):
        return "transformers", "llama-cpp-python is not installed"
    if options.quantization is not None:
        why = f"{options.quantization} is GGUF's" if of_gguf else "no other engine has it"
        return "llamacpp", why
    if gpu is None and options.device is None:
        return "llamacpp", f"the fastest on {os.cpu_count()} cores without a GPU"
    if options.device is not None and options.device.split(":")[0] == "cpu":
        return "llamacpp", "the fastest on a CPU"
    return "transformers", f"on {gpu or options.device}"


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _gpu(device: str | None) -> str | None:
    """The CUDA device that is asked for, or the machine's first; None without one."""
    import torch

    if device is not None:
        return device if torch.device(device).type == "cuda" else None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _with_gguf(files: GgufFiles, options: EngineOptions) -> Loaded:
    if options.engine not in ("auto", "llamacpp"):
        raise ConfigError(f"{files.model}: GGUF files are for --engine llamacpp")
    if not _installed("llama_cpp"):
        raise MissingExtraError("a GGUF file", "llamacpp")
    if options.quantization is not None:
        raise ConfigError(
            f"{files.model}: the file has a quantization, so --quantization has no meaning"
        )
    check_sizes("llamacpp", options.arguments)
    from mico_chat.gguf_models import load_gguf

    running = options.max_running or MAX_RUNNING
    adapter, engine = load_gguf(files.model, files.mmproj, options, max_running=running)
    reads = ", ".join(adapter.input_modalities) or "text alone"
    logger.info("engine: llamacpp (a GGUF file that reads %s)", reads)
    return Loaded(adapter, engine)


def _with_vllm(model: str | Path, options: EngineOptions) -> Loaded:
    from mico_chat.checkpoints.load import load_encoder, read_token_table
    from mico_chat.checkpoints.pretrained import plain_llm
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_start import engine_arguments

    # The encoder is loaded first: vLLM takes its share of the memory that is then free.
    chat, processor = load_encoder(model, dtype=options.dtype, device=options.device)
    llm = plain_llm(model)
    arguments = engine_arguments(
        llm,
        options.arguments,
        dtype=options.dtype,
        quantization=options.quantization,
        max_running=options.max_running,
    )
    ending = ends(processor.tokenizer, chat.llm.config)  # vLLM itself reads the generation config

    def table(dtype: Any) -> Any:
        return read_token_table(llm, dtype).embed_tokens.weight

    engine = VllmEngine(arguments, processor.tokenizer, ending, table=table)
    return Loaded.of_mico(chat, processor, engine)


def _with_llamacpp(model: str | Path, options: EngineOptions) -> Loaded:
    from mico_chat.checkpoints.gguf_export import DEFAULT_QUANTIZATION, gguf_of
    from mico_chat.checkpoints.load import load_encoder
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.llamacpp import LlamaCppModel

    file = gguf_of(model, options.quantization or DEFAULT_QUANTIZATION)
    # llama.cpp reads its file without holding Python's lock, while Python loads the encoder.
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(LlamaCppModel, file, max_batch=options.max_batch, **options.arguments)
        try:
            chat, processor = load_encoder(model, dtype=options.dtype, device=options.device)
        except BaseException:
            if loading.exception() is None:
                loading.result().close()
            raise
        llm = loading.result()
    ending = llm.ends | {processor.tokenizer.eos_token_id}
    running = options.max_running or MAX_RUNNING
    engine = BatchingEngine(llm, processor.tokenizer, ending, name="llamacpp", max_running=running)
    return Loaded.of_mico(chat, processor, engine)


def _with_transformers(model: str | Path, options: EngineOptions) -> Loaded:
    from mico_chat.checkpoints.load import load_chat

    chat, processor = load_chat(
        model,
        dtype=options.dtype,
        device=options.device,
        quantization_config=_bitsandbytes(options.quantization),
    )
    engine = transformers_engine(chat.llm, processor.tokenizer, options)
    return Loaded.of_mico(chat, processor, engine)


def transformers_engine(model: Any, tokenizer: Any, options: EngineOptions) -> Engine:
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.transformers import TransformersModel

    llm = TransformersModel(model, max_batch=options.max_batch, **options.arguments)
    ending = ends(tokenizer, model.config, model.generation_config)
    running = options.max_running or MAX_RUNNING
    return BatchingEngine(llm, tokenizer, ending, name="transformers", max_running=running)


def ends(*saying: Any) -> set[int]:
    """The tokens that end an answer, as a tokenizer and configurations say."""
    found: set[int] = set()
    for said in saying:
        given = getattr(said, "eos_token_id", None)  # some configurations lack the field
        found.update(given if isinstance(given, list) else [] if given is None else [given])
    return found


def _bitsandbytes(quantization: str | None) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if quantization is None:
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization not in BITSANDBYTES:
        raise ConfigError(
            f"quantization {quantization!r}: the transformers engine has "
            f"{', '.join(BITSANDBYTES)}; GGUF's are for --engine llamacpp, vLLM's for --engine vllm"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )

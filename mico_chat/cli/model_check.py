"""The doctor's look at a model: are its files here and whole, which engine takes it, does it fit?

Runs as a probe, after torch and transformers have been found to work. Fetches nothing; of weights
it reads the headers alone.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mico_chat.checkpoints.base_llm import PACKAGED
from mico_chat.checkpoints.folders import LORA, MODELS, PRETRAINING, llm_source, model_folder
from mico_chat.checkpoints.footprint import PROGRAM, Serving, meta_chat
from mico_chat.checkpoints.gguf_export import (
    DEFAULT_QUANTIZATION,
    QUANTIZATIONS,
    check_llama,
    gguf_path,
)
from mico_chat.checkpoints.load import chat_config
from mico_chat.cli.probes import Finding, gigabytes
from mico_chat.errors import MicoError, ModelError
from mico_chat.load import BITSANDBYTES, EngineOptions, check_device, choose_engine
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor

AGAIN = "fetch or write the checkpoint again"
ROOM = "MICO_CACHE_DIR=/a/larger/disk, or make room there"
BITS = {"nf4": "4 bit, ", "Q4_0": "4 bit, ", "int8": "8 bit, ", "Q8_0": "8 bit, "}


class ModelCheck:
    """One look at one model; ``engine`` is known once the findings are.

    ``asked``: the ``model``'s name, ``options`` of :class:`EngineOptions`, the machine's ``memory``
    (``free``, ``most``) and ``disk_free`` in bytes, and whether the user is ``offline``.
    """

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self.name, self.asked = str(asked["model"]), asked
        self.options = EngineOptions(**asked["options"])
        self.engine: str | None = None

    def findings(self) -> Iterator[Finding]:
        """From the folder to the fit; a finding that needs a failed one before it is left out."""
        try:
            place = local(model_folder(self.name))
            if place is None:
                yield self._not_here("folder", self.name)
                return
            config = chat_config(place)
        except ModelError as error:
            yield Finding("folder", "problem", str(error), "mico-chat doctor mini")
            return
        yield Finding("folder", "ok", str(place), facts={"folder": str(place)})
        chat = meta_chat(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in chat.state_dict().items()}
        yield checkpoint_finding(place, shapes, config.base_llm is not None)
        if config.base_llm is not None:
            yield from self._llm(place, config)
        yield processor_finding(place)
        import torch

        needs = Serving.of(chat, getattr(torch, self.options.dtype or "bfloat16"))
        yield weights_finding(needs)
        yield from self._engine(place, config, needs)

    def _not_here(self, what: str, name: str) -> Finding:
        """The finding of a hub name whose files the first start fetches, where it may."""
        text, fix = f"{name} is not in the local cache of the hub's models", f"hf download {name}"
        if self.asked["offline"]:
            text += ", and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE keeps it from being fetched"
            return Finding(what, "problem", text, fix)
        return Finding(what, "warning", f"{text}: the first start fetches it", fix)

    def _llm(self, place: Path, config: MicoChatConfig) -> Iterator[Finding]:
        name = str(config.base_llm)
        setup = "mico-chat setup" if name in PACKAGED else None
        try:
            found = local(llm_source(place, config))
        except ModelError as error:
            yield Finding("language model", "problem", str(error), setup)
            return
        if found is None:
            yield self._not_here("language model", name)
            return
        size, _, fault = read_weights(found)
        text = f"{name}, {gigabytes(size)} in {found}"
        if fault is None:
            yield Finding("language model", "ok", text, facts={"folder": str(found), "bytes": size})
        elif fault.startswith(".bin"):
            text += f": {fault}, of which only the transformers engine can take the token table"
            fix = "write it again as safetensors (save_pretrained)"
            yield Finding("language model", "warning", text, fix)
        else:
            fix = f"rm -r {found} && {setup}" if setup else f"hf download {name}"
            yield Finding("language model", "problem", f"{fault} (in {found})", fix)
        adapter = place / LORA
        if adapter.is_dir():
            size, _, fault = read_weights(adapter, "adapter_model")
            if fault is None and not (adapter / "adapter_config.json").is_file():
                fault = "no adapter_config.json"
            if fault is not None:
                yield Finding("adapter", "problem", f"{fault} (in {adapter})", AGAIN)
            else:
                yield Finding("adapter", "ok", f"{gigabytes(size)} in {adapter}")

    def _engine(self, place: Path, config: MicoChatConfig, needs: Serving) -> Iterator[Finding]:
        options = self.options
        quantization = options.quantization
        try:
            if options.device is not None:
                check_device(options.device)
            engine, why = choose_engine(options)
            if engine == "llamacpp":
                try:
                    check_llama(config.llm_config)
                except ModelError as error:
                    if options.engine != "auto" or quantization is not None:
                        raise
                    engine, why = "transformers", f"llamacpp cannot run this model: {error}"
        except MicoError as error:
            yield Finding("engine", "problem", str(error), "--engine transformers")
            return
        self.engine = engine
        known = {"llamacpp": QUANTIZATIONS, "transformers": BITSANDBYTES}.get(engine)
        if quantization is not None and known is not None and quantization not in known:
            text = f"no quantization {quantization!r} of {engine}; known are {', '.join(known)}"
            yield Finding("engine", "problem", text, f"--quantization {known[-1]}")
            return
        facts = {"engine": engine, "quantization": quantization}
        yield Finding("engine", "ok", f"{engine}: {why}", facts=facts)
        if engine == "llamacpp":
            yield from self._gguf(place, needs)
        if engine == "vllm" and quantization is not None:
            yield Finding(
                "fit", "note", f"vLLM itself reports the memory that {quantization} takes"
            )
            return
        own = DEFAULT_QUANTIZATION if engine == "llamacpp" else options.dtype or "bfloat16"
        memory = self._memory(engine)
        yield fit_finding(needs, self.name, engine, quantization or own, *memory)
        through = PROGRAM + needs.beside + needs.llm.get(quantization or own, 0)
        free = self.asked["memory"]["free"]
        if memory[0] != "memory" and engine == "transformers" and through > free:
            text = f"on the way to the card the weights need {gigabytes(through)} of memory"
            fix = "--quantization nf4, or a machine with more memory"
            yield Finding("loading", "problem", f"{text}: {gigabytes(free)} are free", fix)

    def _gguf(self, place: Path, needs: Serving) -> Iterator[Finding]:
        """The file that llama.cpp reads, which the first start makes."""
        quantization = self.options.quantization or DEFAULT_QUANTIZATION
        try:
            packaged = (MODELS / self.name).is_dir()
            file = gguf_path(self.name if packaged else place, quantization)
        except ModelError:
            return  # the language model is missing, which its own finding says
        facts = {"file": str(file), "there": file.is_file()}
        if file.is_file():
            text = f"{file}, {gigabytes(file.stat().st_size)}"
            yield Finding("GGUF", "ok", text, facts=facts)
            return
        size, plain = needs.llm[quantization], needs.llm["BF16"]
        text = (
            f"the first start makes it, once: {gigabytes(size)} in {file.parent}; meanwhile it "
            f"takes {gigabytes(plain)} of memory and of disk"
        )
        disk, memory = self.asked["disk_free"], self.asked["memory"]["free"]
        if size + plain > disk:
            text, fix = f"{text}; but {gigabytes(disk)} of disk are free there", ROOM
            yield Finding("GGUF", "problem", text, fix, facts)
        elif plain > memory:
            fix = "a machine with more memory, or --engine transformers --quantization nf4"
            text = f"{text}; but {gigabytes(memory)} of memory are free"
            yield Finding("GGUF", "problem", text, fix, facts)
        else:
            setup = "mico-chat setup" if self.name == "mini" else None
            yield Finding("GGUF", "note", text, setup, facts)

    def _memory(self, engine: str) -> tuple[str, int, int]:
        """Where the model would be held, its free bytes and all of its bytes."""
        import torch

        device = torch.device(
            self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        if device.type == "cuda" and engine != "llamacpp":  # which runs on the processor
            return torch.cuda.get_device_name(device), *torch.cuda.mem_get_info(device)
        return "memory", self.asked["memory"]["free"], self.asked["memory"]["most"]


def local(name_or_dir: str | Path) -> Path | None:
    """A folder, or a hub name's in the local cache; None if it is not there."""
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_dir), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def read_weights(
    folder: Path, stem: str = "model"
) -> tuple[int, dict[str, tuple[int, ...]], str | None]:
    """Bytes and shapes of the weights that Hugging Face would load, and the first fault."""
    index = folder / f"{stem}.safetensors.index.json"
    shapes: dict[str, tuple[int, ...]] = {}
    size, where = 0, {}
    if index.is_file():
        try:
            where = dict(json.loads(index.read_bytes())["weight_map"])
        except (ValueError, KeyError, TypeError):
            return 0, {}, f"{index.name} is no index of shards"
    names = sorted(set(where.values())) or [f"{stem}.safetensors"]
    for file in (folder / name for name in names):
        if not file.is_file():
            pickled = list(folder.glob("*.bin"))
            if pickled and not where:
                return sum(p.stat().st_size for p in pickled), {}, ".bin files alone"
            gone = "leads to a file that is not there" if file.is_symlink() else "is missing"
            return size, shapes, f"{file.name} {gone}"
        size += file.stat().st_size
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            with file.open("rb") as opened:
                if opened.read(19) == b"version https://git":
                    return size, shapes, f"{file.name} is a Git LFS pointer (git lfs pull)"
            return size, shapes, f"{file.name} is not whole: {str(error).splitlines()[0]}"
    lost = sorted(where.keys() - shapes.keys())
    return size, shapes, f"{lost[0]} is in no file, but {index.name} names it" if lost else None


def checkpoint_finding(
    place: Path, expected: Mapping[str, tuple[int, ...]], elsewhere: bool
) -> Finding:
    """The checkpoint's own weights against its config: each tensor there, of the right shape.

    ``elsewhere``: the weights of the language model lie in another folder.
    """
    size, found, fault = read_weights(place)
    own = {name: shape for name, shape in found.items() if not name.startswith("llm.")}
    wrong = sorted(n for n in expected.keys() | own.keys() if expected.get(n) != own.get(n))
    if fault is None and wrong:
        shapes = (own.get(wrong[0], "missing"), expected.get(wrong[0], "nothing"))
        fault = f"{wrong[0]} is {shapes[0]} in the file but {shapes[1]} by the config"
        fault += f" ({len(wrong)} such)"
    if fault is None and not elsewhere and len(own) == len(found):
        fault = "the config names no base LLM, and the files hold none"
    if fault is None and (place / PRETRAINING).is_dir():
        fault = read_weights(place / PRETRAINING)[2]
    if fault is not None:
        return Finding("checkpoint", "problem", f"{fault} (in {place})", AGAIN)
    text = f"{len(found)} tensors, {gigabytes(size)}, as the config has them"
    return Finding("checkpoint", "ok", text, facts={"bytes": size, "tensors": len(found)})


def processor_finding(place: Path) -> Finding:
    """Tokenizer, chat template and preprocessing, by loading them."""
    try:
        processor = MicoChatProcessor.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError, ImportError, MicoError) as error:
        text = textwrap.shorten(f"cannot be loaded: {error}", 200, placeholder=" ...")
        return Finding("processor", "problem", text, AGAIN)
    if processor.chat_template is None:
        return Finding("processor", "problem", f"no chat template in {place}", AGAIN)
    text = f"tokenizer of {len(processor.tokenizer)} tokens, chat template, preprocessing"
    return Finding("processor", "ok", text)


def weights_finding(needs: Serving) -> Finding:
    """The table of the parts, the language model in several precisions."""
    shown = [name for name in needs.llm if name in ("int8", "nf4", "Q8_0", "Q4_0")]
    shown.insert(0, next(iter(needs.llm)))
    rows = [("part", "parameters", *shown)]
    rows += [(name, count(n), gigabytes(size)) for name, (n, size) in needs.parts.items()]
    rows.append(("llm", count(needs.llm_parameters), *(gigabytes(needs.llm[p]) for p in shown)))
    total = needs.llm_parameters + sum(n for n, _ in needs.parts.values())
    facts = {
        "parameters": {n: p for n, (p, _) in needs.parts.items()} | {"llm": needs.llm_parameters},
        "bytes": {name: size for name, (_, size) in needs.parts.items()} | {"llm": needs.llm},
        "context": needs.context,
        "bytes_per_token": needs.kv_per_token,
    }
    text = (
        f"{count(total)} parameters; a token takes {gigabytes(needs.kv_per_token)} of keys and "
        f"values, and the longest context has {needs.context} tokens"
    )
    return Finding("weights", "note", text, facts=facts, rows=rows)


def fit_finding(
    needs: Serving, model: str, engine: str, precision: str, held_in: str, free: int, most: int
) -> Finding:
    """Whether a model fits into memory as it would be run, or else how it would."""
    by_engine = {"llamacpp": ("Q8_0", "Q4_0"), "transformers": ("int8", "nf4")}
    totals = {p: needs.total(engine, p) for p in (precision, *by_engine.get(engine, ()))}
    n = totals[precision]
    text = (
        f"{precision} with {engine} needs {gigabytes(n)}, {gigabytes(free)} of {held_in} are free"
    )
    facts = {"needed": n, "free": free, "engine": engine, "precision": precision, "totals": totals}
    if n <= free:
        return Finding("fit", "ok", f"fits: {text}", facts=facts)
    text = f"does not fit: {text}"
    if n <= most:
        text += f" of {gigabytes(most)}: other programs have the rest"
    smaller = {p: size for p, size in totals.items() if size <= free}
    if smaller:
        best = max(smaller, key=smaller.__getitem__)  # the most precise of those that fit
        text += f"; fits in {BITS.get(best, '')}{best}: {gigabytes(smaller[best])}"
        fix = f"mico-chat serve --model {model} --quantization {best}"
        return Finding("fit", "problem", text, fix, facts)
    least = min(totals.values())
    text += f"; the least, in 4 bit, is {gigabytes(least)}" if least < n else ""
    return Finding("fit", "problem", text, "a machine with more memory, or a smaller model", facts)


def count(n: int) -> str:
    """``"6.74 B"``, ``"134.5 M"``, ``"12.3 K"``."""
    for size, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "K", 1)):
        if n >= size:
            return f"{n / size:.{digits}f} {unit}"
    return str(n)

"""A model: is it here and whole, which engine takes it, does it fit?

Runs as a probe, after torch and transformers have been found to work. Hub names are looked up in
the local cache alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mico_chat.checkpoints.base_llm import PACKAGED
from mico_chat.checkpoints.folders import llm_source
from mico_chat.checkpoints.footprint import meta_chat
from mico_chat.checkpoints.gguf_export import (
    DEFAULT_QUANTIZATION,
    QUANTIZATIONS,
    check_llama,
    gguf_path,
)
from mico_chat.checkpoints.load import MODELS, chat_config, model_folder
from mico_chat.cli.doctor.files import (
    adapter_finding,
    llm_finding,
    own_weights_finding,
    processor_finding,
)
from mico_chat.cli.doctor.finding import Finding, gigabytes
from mico_chat.cli.doctor.needs import (
    Memory,
    Needs,
    Way,
    context_finding,
    fit_finding,
    loading_findings,
    weights_finding,
)
from mico_chat.errors import MicoError, ModelError
from mico_chat.load import BITSANDBYTES, EngineOptions, _check_device, _chosen
from mico_chat.model.config import MicoChatConfig

MAIN = "memory"
"""What the report calls the machine's own, beside that of its cards."""

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def probe_model(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Findings of ``asked["model"]`` and the engine that would run it.

    ``asked`` further: ``options`` of :class:`EngineOptions`, the machine's ``memory`` (``free``,
    ``most``) and ``disk_free`` in bytes, and whether the user is ``offline``.
    """
    options = EngineOptions(**asked["options"])
    examination = _Examination(str(asked["model"]), options, asked)
    findings = list(examination.findings())
    return {
        "findings": [finding.record() for finding in findings],
        "engine": examination.engine,
    }


class _Examination:
    """One look at one model; ``engine`` is known once the findings are."""

    def __init__(self, name: str, options: EngineOptions, asked: Mapping[str, Any]) -> None:
        self.name = name
        self.options = options
        self.asked = asked
        self.engine: str | None = None

    def findings(self) -> Iterator[Finding]:
        """From the folder to the fit; what cannot be looked at without the former is left out."""
        try:
            place = located(model_folder(self.name))
        except ModelError as error:
            yield Finding("folder", "problem", str(error), "mico-chat doctor mini")
            return
        if place is None:
            yield _not_here("folder", self.name, self.asked["offline"])
            return
        try:
            config = chat_config(place)
        except ModelError as error:
            mend = "name a folder that mico-chat has written"
            yield Finding("folder", "problem", str(error), mend)
            return
        yield Finding("folder", "ok", str(place), facts={"folder": str(place)})
        chat = meta_chat(config)
        yield own_weights_finding(place, chat, elsewhere=config.base_llm is not None)
        yield from self._llm(place, config)
        yield processor_finding(place)
        needs = Needs.of(chat, _dtype(self.options.dtype))
        yield weights_finding(needs)
        yield from self._engine(place, config, needs)

    def _llm(self, place: Path, config: MicoChatConfig) -> Iterator[Finding]:
        if config.base_llm is None:
            return  # its weights are in the folder's own
        try:
            found = located(llm_source(place, config))
        except ModelError as error:
            mend = "mico-chat setup" if config.base_llm in PACKAGED else None
            yield Finding("language model", "problem", str(error), mend)
            return
        if found is None:
            yield _not_here("language model", config.base_llm, self.asked["offline"])
            return
        yield llm_finding(config.base_llm, found)
        adapter = place / "lora"
        if adapter.is_dir():
            yield adapter_finding(adapter)

    def _engine(self, place: Path, config: MicoChatConfig, needs: Needs) -> Iterator[Finding]:
        options = self.options
        try:
            if options.device is not None:
                _check_device(options.device)
            engine, why = _chosen(options)
        except MicoError as error:
            yield Finding("engine", "problem", str(error), None)
            return
        said = f"{engine}: {why}"
        if engine == "llamacpp":
            try:
                check_llama(config.llm_config)
            except ModelError as error:
                if options.engine != "auto" or options.quantization is not None:
                    yield Finding("engine", "problem", str(error), "--engine transformers")
                    return
                engine, said = "transformers", f"transformers: llamacpp cannot, {error}"
        self.engine = engine
        wrong = _wrong_quantization(engine, options.quantization)
        if wrong is not None:
            yield wrong
            return
        facts = {"engine": engine, "quantization": options.quantization}
        yield Finding("engine", "ok", said, facts=facts)
        if engine == "llamacpp":
            yield from self._gguf(place, config, needs)
        yield context_finding(needs, engine)
        yield from self._fit(engine, needs)

    def _gguf(self, place: Path, config: MicoChatConfig, needs: Needs) -> Iterator[Finding]:
        """The file that llama.cpp reads, which the first start makes."""
        quantization = self.options.quantization or DEFAULT_QUANTIZATION
        try:
            file = gguf_path(place if self.name not in _packaged() else self.name, quantization)
        except ModelError:
            return  # of a base LLM that is not here, as has been said
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
        free = self.asked["disk_free"]
        if size + plain > free:
            mend = "MICO_CACHE_DIR=/a/larger/disk, or make room there"
            text += f"; but {gigabytes(free)} are free there"
            yield Finding("GGUF", "problem", text, mend, facts)
            return
        memory = self.asked["memory"]["free"]
        if plain > memory:
            mend = "a machine with more memory, or --engine transformers --quantization nf4"
            text += f"; but {gigabytes(memory)} of memory are free"
            yield Finding("GGUF", "problem", text, mend, facts)
            return
        setup = "mico-chat setup" if self.name == "mini" else None
        yield Finding("GGUF", "note", text, setup, facts)

    def _fit(self, engine: str, needs: Needs) -> Iterator[Finding]:
        if engine == "vllm" and self.options.quantization is not None:
            text = f"how much it takes in {self.options.quantization}, vLLM itself tells"
            yield Finding("fit", "note", text)
            return
        memory = self._memory(engine)
        own = DEFAULT_QUANTIZATION if engine == "llamacpp" else _dtype_name(self.options.dtype)
        taken = Way(engine, self.options.quantization or own, "")
        # Another card's or the machine's own memory is another question than this one.
        others = [way for way in self._ways(engine) if way.precision != taken.precision]
        yield fit_finding(needs, self.name, taken, others, memory)
        if memory.name != MAIN and engine == "transformers" and taken.precision not in BITSANDBYTES:
            yield from loading_findings(needs, taken.precision, self._main_memory())

    def _ways(self, engine: str) -> Iterator[Way]:
        if engine == "llamacpp":
            for precision in ("Q8_0", "Q4_0"):
                yield Way(engine, precision, f"--quantization {precision}")
        if engine == "transformers":
            for precision in ("int8", "nf4"):
                yield Way(engine, precision, f"--quantization {precision}")

    def _memory(self, engine: str) -> Memory:
        import torch

        wanted = self.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(wanted)
        # llama.cpp is run on the processor: its engine gives it no card.
        if device.type == "cuda" and engine != "llamacpp":
            free, total = torch.cuda.mem_get_info(device)
            return Memory(torch.cuda.get_device_name(device), free, total)
        return self._main_memory()

    def _main_memory(self) -> Memory:
        return Memory(MAIN, self.asked["memory"]["free"], self.asked["memory"]["most"])


# --- where --------------------------------------------------------------------------------------


def located(name_or_dir: str | Path) -> Path | None:
    """A folder, or a hub name's in the local cache; None if it is not there. Fetches nothing."""
    folder = Path(name_or_dir).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name_or_dir), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _packaged() -> set[str]:
    return {folder.name for folder in MODELS.iterdir() if folder.is_dir()}


def _not_here(what: str, name: str, offline: bool) -> Finding:
    """A hub name's files are fetched by the first start, where that may."""
    text = f"{name} is not in the local cache of the hub's models"
    if Path(name).is_absolute() or name.startswith((".", "~")):
        return Finding(what, "problem", f"{name}: no such folder", None)
    mend = f"hf download {name}"
    if offline:
        set_here = " or ".join(variable for variable in _OFFLINE if variable in os.environ)
        return Finding(what, "problem", f"{text}, and nothing is fetched ({set_here})", mend)
    return Finding(what, "warning", f"{text}: the first start fetches it", mend)


# --- how ----------------------------------------------------------------------------------------


def _wrong_quantization(engine: str, quantization: str | None) -> Finding | None:
    known = {"llamacpp": QUANTIZATIONS, "transformers": BITSANDBYTES}.get(engine)
    if quantization is None or known is None or quantization in known:
        return None
    text = f"no quantization {quantization!r} of {engine}; known are {', '.join(known)}"
    usual = DEFAULT_QUANTIZATION if engine == "llamacpp" else known[-1]
    return Finding("engine", "problem", text, f"--quantization {usual}")


def _dtype_name(dtype: str | None) -> str:
    return dtype or "bfloat16"


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, _dtype_name(name))

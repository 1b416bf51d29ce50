"""The files of a GGUF model: its language model, and the projector of its media (mmproj).

A model is named by its file, by a folder with GGUF files, or by the hub name under which
``mico-chat pull`` fetched it: ``owner/model`` or ``owner/model:Q4_K_M``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mico_chat.checkpoints.folders import is_packaged
from mico_chat.checkpoints.hub import HubName, cached_folder, needed_files
from mico_chat.errors import ConfigError, ModelError

QUANTIZED = ("Q8_0", "Q4_K_M", "Q4_0")
"""llama.cpp makes them. A K-quant needs rows of a multiple of 256 weights; in narrower ones, such
as the mini's 576, ``Q4_K_M`` falls back to Q5_0 and Q8_0, so its file is larger than the name
says."""

QUANTIZATIONS = ("F32", "F16", "BF16", *QUANTIZED)

DEFAULT_QUANTIZATION = "Q8_0"

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True)
class GgufFiles:
    """``name`` is that under which the model is served; ``mmproj`` is None if it has no media."""

    name: str
    model: Path
    mmproj: Path | None

    @property
    def bytes(self) -> int:
        """The size of the files, all parts of a split model included."""
        parts = [self.model]
        if _PART.search(self.model.stem):
            parts = sorted(self.model.parent.glob(_PART.sub("-*", self.model.stem) + ".gguf"))
        return sum(file.stat().st_size for file in [*parts, *filter(None, [self.mmproj])])


def gguf_files(model: str | Path, mmproj: Path | None = None) -> GgufFiles | None:
    """The files of a model that is named as GGUF models are; None if it is of another kind.

    Without ``mmproj`` it is the one beside the model, if there is one.

    Raises:
        ConfigError, ModelError: files that are missing, or of which one must be chosen.
    """
    found = _named(str(model))
    if found is None:
        if mmproj is not None:
            said = f"it goes with a GGUF file, and the model is {model}"
            raise ConfigError(f"--mmproj {mmproj}: {said}")
        return None
    name, file, beside = found
    if mmproj is None:
        if len(beside) > 1:
            listed = ", ".join(one.name for one in beside)
            raise ConfigError(f"{model}: choose one with --mmproj: {listed}")
        mmproj = beside[0] if beside else None
    elif not mmproj.is_file():
        raise ConfigError(f"--mmproj {mmproj}: there is no such file")
    return GgufFiles(name, file, mmproj)


def _named(model: str) -> tuple[str, Path, list[Path]] | None:
    """A model's name, its file, and the projectors to choose from."""
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model}: there is no such file")
        return path.stem, path, sorted(path.parent.glob("*mmproj*.gguf"))
    if is_packaged(model):
        return None
    folder, name = path, HubName(str(path))
    if not path.is_dir():
        try:
            name = HubName.of(model)
        except ConfigError:
            return None
        cached = cached_folder(name.repo, allow_patterns="*.gguf")
        if cached is None:
            if name.quantization is None:
                return None
            raise ModelError(f"{model}: it is not on this machine: mico-chat pull {model}")
        folder = cached
    files = [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]
    if not files or (name.quantization is None and (folder / "config.json").is_file()):
        return None
    chosen = [folder / file for file in needed_files(name, sorted(files))]
    projectors = [file for file in chosen if "mmproj" in file.name.lower()]
    models = [file for file in chosen if file not in projectors]
    served = path.resolve().name if path.is_dir() else model
    return served, models[0], projectors

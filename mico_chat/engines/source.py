"""A model before it is loaded: where it is, of which form it is, and what it reads.

No weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mico_chat.adapters.base import shown_kinds
from mico_chat.checkpoints.folders import local_folder, model_folder
from mico_chat.checkpoints.gguf_files import GgufFiles, gguf_files
from mico_chat.errors import ModelError
from mico_chat.late import late
from mico_chat.media.kinds import KINDS, Kind

with late():
    from mico_chat.adapters import mtmd, processor

Form = Literal["chat", "open", "gguf"]

FORMS: dict[Form, str] = {
    "chat": "this project's folders",
    "open": "other projects' folders",
    "gguf": "GGUF files",
}


@dataclass(frozen=True)
class Source:
    """A model's files: a folder with the content of its ``config.json``, or GGUF files."""

    model: str | Path
    form: Form
    folder: Path
    config: Mapping[str, Any]
    files: GgufFiles | None = None

    @classmethod
    def of(cls, model: str | Path, mmproj: Path | None = None) -> Source:
        """A model by its name; the config of a hub name is fetched, if it is not here."""
        if (files := gguf_files(model, mmproj)) is not None:
            return cls(model, "gguf", files.model.parent, {}, files)
        # An unknown name is reported at once: transformers would search for half a minute.
        return cls.of_folder(model, local_folder(model_folder(model), "config.json"))

    @classmethod
    def here(cls, model: str | Path, mmproj: Path | None = None) -> Source | None:
        """A model by its name; None if it must be fetched first."""
        if gguf_files(model, mmproj) is not None:
            return cls.of(model, mmproj)
        name = model_folder(model)
        try:
            folder = local_folder(name, "config.json", local_files_only=True)
        except ModelError:
            return None
        return cls.of_folder(model, folder)

    @classmethod
    def of_folder(cls, model: str | Path, folder: Path) -> Source:
        config = json_of(folder / "config.json")
        return cls(model, "chat" if is_ours(config.get("model_type")) else "open", folder, config)

    @property
    def input_modalities(self) -> tuple[Kind, ...]:
        """The kinds of media that the model reads."""
        if self.files is not None:
            mmproj = self.files.mmproj
            return shown_kinds(() if mmproj is None else mtmd.reads(mmproj))
        if self.form == "chat":
            return KINDS
        named = processor.class_reads(self.config.get("architectures") or ())
        # SmolVLM's class names pictures alone, but its processor takes clips.
        clips = "video_processor" in json_of(self.folder / "processor_config.json")
        if named and (clips or (self.folder / "video_preprocessor_config.json").is_file()):
            named |= {"video"}
        return shown_kinds([kind for kind in KINDS if kind in named]) if named else ()

    @property
    def reads_text_alone(self) -> bool:
        """Whether it is another project's model, of a class of transformers that takes no media."""
        named = processor.class_reads(self.config.get("architectures") or ())
        return self.form == "open" and named == {"text"}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files with a model's weights, of one of their formats."""
        if self.files is not None:
            return self.files.bytes
        for pattern in ("*.safetensors", "*.gguf", "*.bin"):
            if found := sum(file.stat().st_size for file in self.folder.glob(pattern)):
                return found
        return 0


def is_ours(model_type: object) -> bool:
    """Whether a config's ``model_type`` is one of this project's."""
    return str(model_type).startswith("mico")


def json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: this is no JSON file to read ({error})") from error
    return content if isinstance(content, dict) else {}

"""The configuration of a checkpoint, its name, and a digest of its language model."""

import hashlib
from pathlib import Path
from typing import Any

from mico_chat.checkpoints.folders import PACKAGED, llm_source, local_folder, model_folder
from mico_chat.errors import ModelError
from mico_chat.model.auto import AutoConfig
from mico_chat.model.config import MicoChatConfig

_FORMAT = 2
"""Raise this number when the same checkpoint gives another GGUF file: it is then built anew."""

_WHOLE = 64 << 20
"""These are bytes. The digest takes the size and time of a larger file instead of its content,
because reading 13 GB of weights takes as long as the rest of an engine's start."""


def read_part(auto: Any, name_or_dir: str | Path, part: str) -> Any:
    """What an Auto class reads from a model's folder; its error becomes one line."""
    try:
        return auto.from_pretrained(name_or_dir)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(f"{name_or_dir}: the {part} cannot be read: {reason}") from error


def chat_config(folder: str | Path) -> MicoChatConfig:
    """The config of a chat model's folder or hub name; a :class:`ModelError` if it is another's."""
    config = read_part(AutoConfig, local_folder(folder, "config.json"), "configuration")
    if not isinstance(config, MicoChatConfig):
        raise ModelError(f"{folder}: a model of type {config.model_type!r}, expected 'mico_chat'")
    return config


def named_folder(model: str | Path) -> tuple[str, Path]:
    """A model's short name, and its folder."""
    found = model_folder(model)
    return Path(found).resolve().name, local_folder(found)


def digest_of(folder: Path) -> str:
    """Twelve hexadecimal digits that change with a checkpoint's language model or tokenizer.

    With ``base_llm`` the checkpoint's own weights do not count: they are encoder and bridge.
    """
    config = MicoChatConfig.without_llm(folder) or chat_config(folder)
    parts = [f"format {_FORMAT}"]
    about_media = ("processor_config.json", "generation_config.json")
    files = [path for path in folder.glob("*.json") if path.name not in about_media]
    files += [*folder.glob("*.jinja"), *folder.glob("*.model"), *folder.glob("lora/*.*")]
    if config.base_llm in PACKAGED:
        parts.append(PACKAGED[config.base_llm].sha256)
    else:
        base = folder if config.base_llm is None else llm_source(folder, config)
        if isinstance(base, Path):
            files += [*base.glob("*.safetensors"), *base.glob("*.bin")]
        else:
            parts.append(local_folder(base, "config.json").name)  # the hub's revision
    for file in files:
        stat = file.stat()
        identity = f"{stat.st_size} bytes of {stat.st_mtime_ns}"
        if stat.st_size <= _WHOLE:
            identity = hashlib.sha256(file.read_bytes()).hexdigest()
        parts.append(f"{file.name} {identity}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]

"""Where a model's name leads, and the parts of a checkpoint that lie in folders of their own.

``llm/`` is a plain Hugging Face folder of the language model (``mico-chat merge`` and full
fine-tuning write it), ``lora/`` an adapter on a language model that lies elsewhere,
``pretraining/`` the text branch that pretraining gave the encoder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico_chat.checkpoints.base_llm import base_llm_path
from mico_chat.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mico_chat.model.config import ChatParts, MicoChatConfig

MODELS = Path(__file__).parents[1] / "models"
"""Models that the package brings: ``mini``."""

LLM = "llm"
"""Also the value of ``config.base_llm`` for a language model in this folder of the checkpoint."""

LORA = "lora"
PRETRAINING = "pretraining"

PREPROCESSING_FILE = "preprocessing.json"
"""In a stage 1 folder: the settings that turn a file into a unit's pixels."""

IF_THERE: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
"""For transformers' ``cached_file``: None where the file is missing."""


def model_folder(name_or_dir: str | Path) -> str:
    """``"mini"`` to the package's folder; a folder or a hub name as it is.

    Raises:
        ModelError: if a known name's folder is missing, or a path-like name leads nowhere.
    """
    text = str(name_or_dir)
    if "/" not in text and (MODELS / text / "config.json").is_file():
        return str(MODELS / text)
    if Path(text).is_dir():
        if not (Path(text) / "config.json").is_file():
            raise ModelError(f"{text}: no config.json there; is it a model folder?")
        return text
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{text}: there is no such folder")
    if "/" not in text:
        known = sorted(p.name for p in MODELS.glob("*") if p.is_dir())
        here = [p.name for p in Path().glob("*") if p.is_dir()]
        close = get_close_matches(text, [*known, *here], 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ModelError(
            f"no model {text!r}: there is no such folder, and mico-chat brings "
            f"{', '.join(known) or 'none'}{meant}"
        )
    return text


def local_folder(name_or_dir: str | Path, patterns: str | None = None, **hub: Any) -> Path:
    """A folder, fetched from the hub if it is a hub name.

    Only the files of ``patterns``, such as ``"lora/*"``, are fetched where given; ``hub`` holds
    ``revision``, ``cache_dir``, ``token``.

    Raises:
        ModelError: if the hub does not give it.
    """
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_dir), allow_patterns=patterns, **hub))
    except (OSError, ValueError) as error:
        reason = _hub_reason(error)
        raise ModelError(f"{name_or_dir}: there is no such folder, and {reason}") from error


def _hub_reason(error: OSError | ValueError) -> str:
    """Why the hub does not give a model, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    causes: list[BaseException] = [error]
    while (before := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(before)
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE keeps the hub from being asked"
    if isinstance(error, GatedRepoError):
        return "the hub gives this model only to those who accepted its terms (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or a private one (hf auth login)"
    if isinstance(error, LocalEntryNotFoundError):
        return "the hub (Hugging Face) cannot be reached: is there a network?"
    return f"the hub does not give it: {str(error).strip().splitlines()[0]}"


def part_of(name_or_dir: str | Path, part: str, **hub: Any) -> Path | None:
    """A checkpoint's folder ``part`` on this machine; ``None`` if it has none.

    Arguments and errors as those of :func:`local_folder`.
    """
    folder = local_folder(name_or_dir, f"{part}/*", **hub) / part
    return folder if folder.is_dir() else None


def llm_source(
    name_or_dir: str | Path, config: ChatParts | MicoChatConfig, **hub: Any
) -> str | Path:
    """The folder on this machine, or the hub name, of a checkpoint's language model.

    ``hub`` holds ``revision``, ``cache_dir``, ``token`` of the checkpoint.

    Raises:
        ModelError: for a language model inside the checkpoint's own weights, one that should lie
            in ``llm/`` but does not, or a packaged one that is not in the cache folder yet.
    """
    if config.base_llm is None:
        raise ModelError(
            f"{name_or_dir}: its language model is inside the model's own weights; "
            "`mico-chat merge` gives it a folder"
        )
    if config.base_llm != LLM:
        return base_llm_path(config.base_llm)
    folder = part_of(name_or_dir, LLM, **hub)
    if folder is None:
        raise ModelError(f"{name_or_dir}: no folder {LLM!r} with the language model there")
    return folder


def generation_of(
    folder: str | Path, hub: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """The content of a checkpoint's ``generation_config.json``, if there is one.

    Raises:
        ModelError: if it is not JSON.
    """
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    file = cached_file(folder, GENERATION_CONFIG_NAME, **IF_THERE, **(hub or {}))
    if file is None:
        return None
    try:
        content: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder}: {GENERATION_CONFIG_NAME} is not JSON: {error}") from error
    return content


def check_new(output: Path) -> None:
    """Refuse to write over a file, or into a folder that holds something.

    Raises:
        ConfigError: if there is one.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: it is there already; name a new one")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name when it is finished or not at all.

    Raises:
        ConfigError: if there is something already.
    """
    check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        written = Path(temporary) / output.name
        written.mkdir()
        yield written
        for path in written.rglob("*.safetensors"):
            path.chmod(0o644)  # as its other files: another user may serve them
        if output.is_dir():
            output.rmdir()
        written.rename(output)

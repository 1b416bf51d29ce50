"""The chat template of a language model: its own, a known one, or one from a file.

Models before mid-2023 came without a template: only their training code shows their format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mico_chat.errors import ConfigError, ModelError

_FOLDER = Path(__file__).parent / "chat_templates"

VICUNA = "vicuna_v1.1"


def known_templates() -> list[str]:
    """Names of the templates that the package brings."""
    return sorted(path.name.removesuffix(".jinja") for path in _FOLDER.glob("*.jinja"))


def read_template(name_or_file: str) -> str:
    """A template by its name, or from a file.

    Raises:
        ConfigError: if there is neither.
    """
    if name_or_file in known_templates():
        return (_FOLDER / f"{name_or_file}.jinja").read_text(encoding="utf-8").rstrip("\n")
    try:
        return Path(name_or_file).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(known_templates())
        raise ConfigError(
            f"chat template {name_or_file!r}: it is neither a file that can be read nor one "
            f"of the names {known}"
        ) from error


def template_of(
    llm: str | Path, tokenizer: PreTrainedTokenizerBase, chosen: str | None = None
) -> str:
    """The chat template of a language model.

    ``chosen`` is a name or file to use instead of its own.

    Raises:
        ConfigError: for a chosen template that cannot be read, or does not render.
        ModelError: if the model lacks one, and its format is unknown.
    """
    if chosen is not None:
        template = read_template(chosen)
        _check(template, tokenizer, chosen)
        return template
    if isinstance(own := tokenizer.chat_template, str):
        return own
    if _is_vicuna(llm):
        return read_template(VICUNA)
    raise ModelError(
        f"{llm}: its tokenizer lacks a chat template: give a Jinja file or one of the "
        f"names {', '.join(known_templates())}"
    )


def _is_vicuna(llm: str | Path) -> bool:
    """Judged by its name or by the name in its config; version 0 had another format."""
    config: dict[str, Any]
    config, _ = PreTrainedConfig.get_config_dict(llm)
    names = (Path(llm).name, str(config.get("_name_or_path", "")))
    return config.get("model_type") == "llama" and any(
        "vicuna" in name.lower() and "v0" not in name.lower() for name in names
    )


def _check(template: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    said = "\ue000what is said\ue000"
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], chat_template=template, tokenize=False
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise ConfigError(
            f"chat template {name}: it cannot format a user's message: {error}"
        ) from error
    if said not in str(rendered):
        raise ConfigError(f"chat template {name}: it leaves out the user's message")

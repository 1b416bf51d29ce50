"""What several files of the ``mico-chat`` command need."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Annotated, Any

import typer

from mico_chat.errors import MissingExtraError

Model = Annotated[
    str | None,
    typer.Option(help="mini, a folder, or a hub name. Default: MICO_MODEL, or else mini."),
]


def other(module: str, feature: str, extra: str) -> Any:
    """Import a module that stands outside the core's dependencies.

    By name, because the library must not depend on the packages that depend on it.

    Raises:
        MissingExtraError: when it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing.split(".")[0] == "mico_chat":
            raise  # a part of this very package: no extra brings it
        raise MissingExtraError(f"{feature} (module {missing!r})", extra) from error


def log_to_stderr() -> None:
    """Show what the library logs; the commands that only answer stay silent."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "gguf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

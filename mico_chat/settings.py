"""The library's settings, and one-line errors for mistakes on command lines."""

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic_settings import BaseSettings, SettingsConfigDict

from mico_chat.errors import ConfigError


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MICO_", frozen=True)

    cache_dir: Path = Path("~/.cache/mico-chat")
    model: str = "mini"
    reads: bool | None = None
    """Whether text in pictures and speech in recordings are recognised and put into the prompt.
    None: where the parts for it are installed, and not in evaluations."""
    depth_model: str | None = None
    """Estimates the distances in a picture, where a question asks for it: mini, or a depth
    estimator of transformers. None: a server takes the network of the mini, if it is there. Empty:
    it refuses to."""
    speech_model: str | None = None
    """Writes speech down: a Whisper of CTranslate2, by its size ("small"), its name on the hub or
    its folder. None: Whisper base."""
    voice: str = "heart"
    """Reads answers aloud: a voice of hibari, an ONNX file of one, or a folder or repository of the
    hub with one ("somebody/voices"; of several "somebody/voices:emma")."""


def cache_dir() -> Path:
    return Settings().cache_dir.expanduser().absolute()


# --- command lines --------------------------------------------------------------------------------


def misused(message: str, flags: Iterable[str], command: str) -> ConfigError:
    unknown = re.match(r"unrecognized arguments: ([^\s=]+)", message)
    if unknown is None:
        return ConfigError(f"{message}; see `{command} --help`")
    return unknown_option(unknown[1], flags, command)


def unknown_option(name: str, flags: Iterable[str], command: str) -> ConfigError:
    if not name.startswith("-"):
        return ConfigError(f"unexpected argument {name!r}; see `{command} --help`")
    close = get_close_matches(name, list(flags), n=1, cutoff=0.7)
    meant = f"did you mean {close[0]}? See" if close else "see"
    return ConfigError(f"there is no option {name}; {meant} `{command} --help`")


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


count = partial(_at_least, 0)
positive = partial(_at_least, 1)


class Parser(argparse.ArgumentParser):
    """A parser that raises an error of one line; argparse would print the whole usage."""

    def error(self, message: str) -> NoReturn:
        flags: dict[str, Any] = self._option_string_actions
        raise misused(message, flags, self.prog)

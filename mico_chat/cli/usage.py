"""One line for a command line that makes no sense, whichever parser read it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from mico_chat.errors import ConfigError

_UNKNOWN = re.compile(r"unrecognized arguments: ([^\s=]+)")


def misused(message: str, flags: Iterable[str], command: str) -> ConfigError:
    """The error for what ``argparse`` says of the command line of ``command``."""
    unknown = _UNKNOWN.match(message)
    if unknown is None:
        return ConfigError(f"{message}; see `{command} --help`")
    return unknown_option(unknown[1], flags, command)


def unknown_option(name: str, flags: Iterable[str], command: str) -> ConfigError:
    """The error for an option that there is not; the nearest one is named."""
    if not name.startswith("-"):
        return ConfigError(f"nothing is expected at {name!r}; see `{command} --help`")
    close = get_close_matches(name, list(flags), n=1, cutoff=0.7)
    meant = f"did you mean {close[0]}? See" if close else "see"
    return ConfigError(f"there is no option {name}; {meant} `{command} --help`")


def count(text: str) -> int:
    """A whole number from 0 on, as a ``type`` of argparse."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number from 1 on, as a ``type`` of argparse."""
    return _at_least(1, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is below {least}")
    return value


class Parser(argparse.ArgumentParser):
    """Raises its errors, as one line, where argparse prints the whole usage."""

    def error(self, message: str) -> NoReturn:
        """For what argparse finds wrong.

        Raises:
            ConfigError: always.
        """
        flags: dict[str, Any] = self._option_string_actions
        raise misused(message, flags, self.prog)

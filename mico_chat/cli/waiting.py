"""What a command is doing, on one line of a terminal: nobody knows how long silence lasts."""

from __future__ import annotations

import os
import shutil
import threading
from types import TracebackType
from typing import Self, TextIO

_TURNS_S = 0.1
_MOVING = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII = "|/-\\"


class Waiting:
    """A turning sign and some words on ``out`` while the block runs, if it is a terminal.

    The line is gone when the block ends or :meth:`done` is called, and before an error is printed.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = out.isatty() and os.environ.get("TERM") != "dumb"
        self._what = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._turn, daemon=True)
        try:
            _MOVING.encode(out.encoding or "ascii")
            self._signs = _MOVING
        except (UnicodeEncodeError, LookupError):
            self._signs = _ASCII

    def say(self, what: str) -> None:
        """What is being done from now on."""
        with self._lock:
            self._what = what
        self._draw(0)

    def done(self) -> None:
        """Clear the line, for good; may be called more than once."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._shown:
            with self._lock:
                self._out.write("\r\x1b[K")
                self._out.flush()

    def _turn(self) -> None:
        turn = 0
        while not self._ended.wait(_TURNS_S):
            turn += 1
            self._draw(turn)

    def _draw(self, turn: int) -> None:
        with self._lock:
            if not self._shown or self._ended.is_set() or not self._what:
                return
            room = shutil.get_terminal_size().columns - 3
            sign = self._signs[turn % len(self._signs)]
            self._out.write(f"\r\x1b[K{sign} {_printable(self._what)[:room]}")
            self._out.flush()

    def __enter__(self) -> Self:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.done()


def _printable(text: str) -> str:
    """A file's name may hold what a terminal obeys."""
    return "".join(character if character.isprintable() else "?" for character in text)

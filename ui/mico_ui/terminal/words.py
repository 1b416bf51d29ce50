"""Text on a terminal: harmless to it, and broken between words while it is still being said."""

from __future__ import annotations

import unicodedata
from typing import IO

from rich.cells import cell_len

_BIDI = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""They turn what follows around, and could make one thing look like another."""

_LONGEST_HELD = 20
"""Cells of a word that is shown before its end: some scripts put no spaces between words."""


def printable(text: str) -> str:
    """Text without what a terminal would obey instead of show, such as escape sequences."""
    return "".join(c for c in text.expandtabs(4) if c == "\n" or _is_shown(c))


def _is_shown(character: str) -> bool:
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in _BIDI


def one_line(text: str, width: int) -> str:
    """Printable text as one line of at most ``width`` cells."""
    shown = " ".join(printable(text).split())
    if cell_len(shown) <= width:
        return shown
    while shown and cell_len(shown) > width - 1:
        shown = shown[:-1]
    return f"{shown}…"


class Flow:
    """Writes an answer piece by piece, in lines of at most ``width`` cells.

    A word is held back until it ends, so that it is never broken.
    """

    def __init__(self, out: IO[str], width: int) -> None:
        self._out = out
        self._width = max(width, 20)
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> None:
        """The next piece."""
        for character in printable(text):
            if character == "\n":
                self._end_word()
                self._write("\n")
            elif character == " ":
                self._end_word()
                if self._column < self._width - 1:
                    self._write(" ")
                else:
                    self._column = self._width  # the line's end stands for it
            else:
                self._word += character
                if cell_len(self._word) >= _LONGEST_HELD:
                    self._end_word()
        self._out.flush()

    def end(self) -> None:
        """The last word, and the end of the line."""
        self._end_word()
        if self._column:
            self._write("\n")
        self._out.flush()

    def _end_word(self) -> None:
        if self._column and self._column + cell_len(self._word) > self._width and self._word:
            self._write("\n")
        self._write(self._word)
        self._word = ""

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._column = 0 if text == "\n" else self._column + cell_len(text)

"""Token ids to text, piece by piece: a piece is given out once nothing can change it any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# What a tokenizer shows for bytes that are not (yet) a whole character.
_INCOMPLETE = "\ufffd"


class Tokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str: ...


class Detokenizer:
    """The text of a growing list of token ids.

    Holds back an unfinished character, and a tail that may become a stop text. ``text`` is what
    was given out so far; ``stopped`` says that a stop text ended it (and is not part of it).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self.text = ""
        self.stopped = False

    def update(self, ids: list[int], *, final: bool = False) -> str:
        """The text that ``ids`` (all of them so far) add; with ``final`` nothing is held back."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(ids, skip_special_tokens=True)
        ends = [at for at in (whole.find(text) for text in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            whole = whole[: min(ends)]
        elif not final:
            whole = whole.rstrip(_INCOMPLETE)
            whole = whole[: len(whole) - self._may_be_stop(whole)]
        piece = whole[len(self.text) :]
        self.text += piece
        return piece

    def _may_be_stop(self, text: str) -> int:
        """Length of the longest tail of ``text`` that begins a stop text."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )

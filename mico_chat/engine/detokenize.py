"""Token ids to text, token by token: text is given out once nothing can change it any more."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """The text of a growing list of tokens, special ones left out.

    Holds back an unfinished character, and a tail that may become a stop text. ``text`` is what
    was given out so far; ``stopped`` says that a stop text ended it (and is not part of it).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._held += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        return self._give(final=False)

    def finish(self) -> str:
        """All that was held back; an unfinished character shows as U+FFFD."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(whole, str)
        if whole.startswith(self.text + self._held):
            self._held = whole[len(self.text) :]
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        held = self._held
        ends = [at for at in (held.find(text) for text in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            piece, self._held = held[: min(ends)], ""
        else:
            certain = len(held) if final else len(held) - self._may_be_stop(held)
            piece, self._held = held[:certain], held[certain:]
        self.text += piece
        return piece

    def _may_be_stop(self, text: str) -> int:
        """Length of the longest tail of ``text`` that begins a stop text."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )

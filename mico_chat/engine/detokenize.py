"""Token ids to text, token by token: text is given out once nothing can change it any more."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from mico_chat.model.prompt_tokens import SPACE

UNFINISHED = "\ufffd"
"""What a tokenizer makes of the first bytes of a character whose others are still to come."""


class Detokenizer:
    """The text of a growing list of tokens, special ones left out.

    Holds back an unfinished character, and a tail that may become a stop text. ``text`` is what
    was given out so far; ``stopped`` says that a stop text ended it (and is not part of it).

    tokenizers' own ``DecodeStream`` does not give out an unfinished character at the end, and
    raises where a token changes how those before it are written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stop = tuple(text for text in stop if text)
        # Tokens of the last piece of text, ``_before``, and those since. The piece is decoded
        # again with what follows: how a token is written may depend on the one before it.
        self._ids: list[int] = []
        self._n_before = 0
        self._before = ""
        self._held = ""
        self.text = ""
        self.stopped = False

    def of_token(self, token: int) -> str:
        """The text of a token by itself, were it the next one."""
        text = str(self._backend.decode([token], skip_special_tokens=False))
        piece = self._backend.id_to_token(token) or ""
        # SentencePiece's decoder takes a space off the start, which only an answer's start is.
        taken = piece.startswith(SPACE) and text == piece.replace(SPACE, " ")[1:]
        return f" {text}" if taken and self._ids else text

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        if self.stopped:
            return ""
        self._ids.append(token)
        written = self._decode()
        if len(written) <= len(self._before) or written.endswith(UNFINISHED):
            return ""
        self._held += written[len(self._before) :]
        del self._ids[: self._n_before]
        self._n_before = len(self._ids)
        self._before = self._decode()
        return self._give(final=False)

    def finish(self) -> str:
        """All that was held back; an unfinished character shows as U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._decode()[len(self._before) :]
        return self._give(final=True)

    def _decode(self) -> str:
        return str(self._backend.decode(self._ids, skip_special_tokens=True))

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

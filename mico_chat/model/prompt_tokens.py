"""The pieces of a rendered conversation to token ids.

Its text has two sorts of pieces: the chat template's, whose special tokens count, and what
somebody says, which never becomes markup. How they are put together depends on the tokenizer:

* **Apart**: byte-level BPE cuts text into words before it merges, so that little crosses a seam,
  and each piece is tokenized by itself.
* **Joined**: SentencePiece merges over everything between two special tokens, and puts a space
  (``▁``) before a text. "ASSISTANT: " and "A cat." apart are other tokens than "ASSISTANT: A cat."
  is, which is what the published models have learnt from. So the text between two special tokens
  is tokenized as one, and characters' places tell which piece a token is of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SPACE = "▁"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class Text:
    """What somebody says, or (``markup``) a piece of the chat template."""

    text: str
    markup: bool = False


@dataclass(frozen=True)
class Placeholders:
    """A medium's place: ``n`` times the same id, which is no token's."""

    token: int
    n: int


Piece: TypeAlias = Text | Placeholders

Tokens: TypeAlias = list[tuple[int, int]]
"""Token ids, each with the number of the piece that it is of."""


class PieceTokenizer(Protocol):
    """Turns the pieces of one conversation into tokens, in order."""

    def __call__(self, pieces: Sequence[Piece]) -> Tokens:
        """Tokens of all pieces; one that spans several is the last one's."""
        ...


def piece_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PieceTokenizer:
    """The way that suits a tokenizer."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        written = tokenizer.convert_ids_to_tokens(_plain(tokenizer, "a b"))
        if any(SPACE in token for token in written):
            joined = Joined(tokenizer)
            if joined.agrees():
                return joined
            logger.warning(
                "the pieces of a conversation are tokenized apart: unknown SentencePiece"
            )
    return Apart(tokenizer)


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return cast(list[int], ids)


class Apart:
    """Each piece by itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, pieces: Sequence[Piece]) -> Tokens:
        """See :class:`PieceTokenizer`."""
        tokens: Tokens = []
        for number, piece in enumerate(pieces):
            if isinstance(piece, Placeholders):
                ids = [piece.token] * piece.n
            elif piece.markup:
                ids = self._tokenizer(piece.text, add_special_tokens=False).input_ids
            else:
                ids = _plain(self._tokenizer, piece.text)
            tokens += [(token, number) for token in ids]
        return tokens


class Joined:
    """All text between two special tokens as one, as SentencePiece tokenizes a whole string.

    A medium stands as a special token would. The beginning-of-text token at the very start cuts
    nothing off: the tokenizer itself puts it before a text, and what follows is that text's start.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # Copies: the tokenizer has a switch for special tokens, which every call of it turns.
        self._markup = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._markup.encode_special_tokens = False
        self._markup.no_padding()
        self._markup.no_truncation()
        self._bos = tokenizer.bos_token_id
        added = tokenizer.added_tokens_decoder
        self._special = {number for number, token in added.items() if token.special}
        # It never puts a space of its own: this class does, where SentencePiece would.
        self._text = _without_prefix(self._markup)
        self._starts_with_space = self._puts_space("a")
        # transformers' "legacy" tokenizers begin anew behind a special token.
        self._space_after_special = any(
            self._puts_space(f"{added[number].content}a") for number in sorted(self._special)[:1]
        )

    def _puts_space(self, text: str) -> bool:
        tokens = self._markup.encode(text, add_special_tokens=False).tokens
        return tokens[-1].startswith(SPACE) or tokens[-2:-1] == [SPACE]

    def agrees(self) -> bool:
        """Whether a text is tokenized as by the tokenizer itself."""
        text = "a b: c\nd  e"
        ours = [token for token, _ in self([Text(text)])]
        return ours == self._markup.encode(text, add_special_tokens=False).ids

    def __call__(self, pieces: Sequence[Piece]) -> Tokens:
        """See :class:`PieceTokenizer`."""
        tokens: Tokens = []
        run: list[tuple[str, int]] = []
        space = self._starts_with_space
        for number, piece in enumerate(pieces):
            if isinstance(piece, Placeholders):
                tokens += self._run(run, space) + [(piece.token, number)] * piece.n
                run, space = [], self._space_after_special
                continue
            if not piece.markup:
                run.append((piece.text, number))
                continue
            for part in self._cut(piece.text):
                if isinstance(part, str):
                    run.append((part, number))
                    continue
                first = not tokens and not any(text for text, _ in run)
                tokens += [*self._run(run, space), (part, number)]
                run = []
                if not (first and part == self._bos):
                    space = self._space_after_special
        return tokens + self._run(run, space)

    def _cut(self, markup: str) -> list[str | int]:
        """A template's piece as its texts and special tokens."""
        parts: list[str | int] = []
        at = 0
        encoding = self._markup.encode(markup, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._special:
                parts += [markup[at:start], token]
                at = end
        return [*parts, markup[at:]]

    def _run(self, run: Sequence[tuple[str, int]], space: bool) -> Tokens:
        """Texts with their pieces' numbers, as one."""
        text = "".join(piece for piece, _ in run)
        if not text:
            return []
        owners = [number for piece, number in run for _ in piece]
        if space:
            text, owners = " " + text, [owners[0], *owners]
        encoding = self._text.encode(text, add_special_tokens=False)
        # The bytes of a character all have its place.
        places = [max(end - 1, 0) for _, end in encoding.offsets]
        return [(token, owners[at]) for token, at in zip(encoding.ids, places, strict=True)]


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, but it puts no space before a text, and no text is a special token."""
    spec = json.loads(backend.to_str())
    normalizer = _never(spec["normalizer"])
    spec["normalizer"], spec["pre_tokenizer"] = normalizer, _never(spec["pre_tokenizer"])
    spec["post_processor"] = None
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()
    return plain


def _never(step: Any) -> Any:
    """A normalizer or pre-tokenizer without what puts a space before a text."""
    match step:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return {**step, "prepend_scheme": "never"}
        case {"type": "Sequence", "normalizers": list(steps)}:
            kept = [_never(inner) for inner in steps]
            return {**step, "normalizers": [inner for inner in kept if inner is not None]}
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return {**step, "pretokenizers": [_never(inner) for inner in steps]}
    return step

"""A prompt in parts, markup or text, and the tokenizers that keep text from becoming markup.

Special tokens are recognised only in the template's own parts. Text that a user types,
``<|im_end|>`` included, stays plain text. The tokenizer decides how parts are put together:

* Byte-level BPE cuts text into words before it merges, so little crosses from one part to the
  next: each part is tokenized by itself.
* SentencePiece merges over everything between two special tokens, and puts a space (``▁``) before
  a text. "ASSISTANT: " and "A cat." on their own have other tokens than "ASSISTANT: A cat.", from
  which the published models have learned. :class:`JoinedParts` tokenizes the text between two
  special tokens as one, and the place of each character says which part its token belongs to.
"""

import json
import logging
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, TypeAlias, cast

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mico_chat.errors import ModelError, RequestError

logger = logging.getLogger(__name__)

SPACE = "▁"


@dataclass(frozen=True)
class PromptText:
    """Text that somebody wrote, or (``markup``) a part of the chat template."""

    text: str
    markup: bool = False


@dataclass(frozen=True)
class Placeholders:
    """Places for the context tokens of a medium: ``n`` times one id outside the vocabulary."""

    token: int
    n: int


PromptPart: TypeAlias = PromptText | Placeholders

PartTokens: TypeAlias = list[tuple[int, int]]
"""Token ids, each with the number of its part; a token over several parts has the last one's."""

PartTokenizer: TypeAlias = Callable[[Sequence[PromptPart]], PartTokens]

P = ParamSpec("P")


def _may_panic(tokenize: Callable[P, PartTokens]) -> Callable[P, PartTokens]:
    @wraps(tokenize)
    def tokens(*args: P.args, **named: P.kwargs) -> PartTokens:
        try:
            return tokenize(*args, **named)
        except BaseException as error:
            # Rust's panic is no Exception, and its class cannot be imported. Oniguruma gives up a
            # regular expression of tokenizer.json after 10 million steps, and panics.
            if type(error).__name__ != "PanicException":
                raise
            raise ModelError(f"the model's tokenizer (tokenizer.json) failed: {error}") from error

    return tokens


_IN_BRACKETS = re.compile(r"[<\[].*[>\]]", re.DOTALL)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that are markup: special ones, and added ones in brackets, as Qwen's ``<tool_call>``.

    Other added tokens, such as several spaces or a word, are text.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {n: t.content for n, t in added if t.special or _IN_BRACKETS.fullmatch(t.content)}


def part_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PartTokenizer:
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        written = tokenizer.convert_ids_to_tokens(_plain(tokenizer, "a b"))
        if any(SPACE in token for token in written):
            joined = JoinedParts(tokenizer)
            if joined.agrees():
                return joined
            logger.warning(
                "this kind of SentencePiece is unknown: a conversation's parts are tokenized apart"
            )
    return partial(_tokenize_apart, tokenizer, _plain_tokenizer(tokenizer))


def string_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PartTokenizer:
    """Tokenizes parts as the tokenizer does the whole prompt as one string, wherever it is known
    how: other people's models have learned from such prompts.
    """
    joined = JoinedParts(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else None
    return joined if joined is not None and joined.agrees() else part_tokenizer(tokenizer)


def plain_tokens(
    tokenizer: Any, prompt: str | tuple[int, ...], *, special: bool = True, where: str = "prompt"
) -> tuple[int, ...]:
    """The tokens of a whole prompt, with the ``special`` ones that the tokenizer puts around it.

    Raises:
        RequestError: one of the ids, which are the field ``where``, is none of the model's.
    """
    if isinstance(prompt, tuple):
        if prompt and not 0 <= min(prompt) <= max(prompt) < len(tokenizer):
            raise RequestError.at(where, f"the model's tokens are 0 to {len(tokenizer) - 1}")
        return prompt
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        whole = tokenizer.whole if special else tokenizer.inner
        return cast("tuple[int, ...]", whole(prompt))
    ids = _may_panic(
        lambda: [(n, 0) for n in tokenizer(prompt, add_special_tokens=special).input_ids]
    )
    return tuple(n for n, _ in ids())


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return cast(list[int], ids)


def _plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Tokenizes a text that holds no markup, whatever it looks like."""
    control = control_tokens(tokenizer)
    special = {number for number, t in tokenizer.added_tokens_decoder.items() if t.special}
    if control.keys() <= special or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return partial(_plain, tokenizer)
    spec = _without_tokens(tokenizer.backend_tokenizer, control)
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.no_padding()
    plain.no_truncation()
    return lambda text: list(plain.encode(text, add_special_tokens=False).ids)


def _without_tokens(backend: Tokenizer, control: Collection[int]) -> dict[str, Any]:
    """The specification of a tokenizer that takes no text for a control token."""
    spec = json.loads(backend.to_str())
    in_model = backend.get_vocab(with_added_tokens=False).values()
    kept = []
    for token in spec["added_tokens"]:
        if token["id"] in control:
            if token["id"] in in_model:
                continue
            # Its place keeps the numbers of the tokens behind it; nobody can type its new name.
            token = {**token, "content": secrets.token_hex(16)}
        kept.append(token)
    return {**spec, "added_tokens": kept, "post_processor": None}


@_may_panic
def _tokenize_apart(
    tokenizer: PreTrainedTokenizerBase,
    plain: Callable[[str], list[int]],
    parts: Sequence[PromptPart],
) -> PartTokens:
    tokens: PartTokens = []
    for number, part in enumerate(parts):
        if isinstance(part, Placeholders):
            ids = [part.token] * part.n
        elif part.markup:
            ids = tokenizer(part.text, add_special_tokens=False).input_ids
        else:
            ids = plain(part.text)
        tokens += [(token, number) for token in ids]
    return tokens


class JoinedParts:
    """Tokenizes all text between two special tokens as one, as SentencePiece does with a string.

    A medium counts as a special token. The beginning-of-text token at the start does not divide:
    the tokenizer itself puts it before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        # Copies: the tokenizer has a switch for special tokens, which every call of it turns.
        self._markup = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._markup.encode_special_tokens = False
        self._markup.no_padding()
        self._markup.no_truncation()
        self._bos = tokenizer.bos_token_id
        control = control_tokens(tokenizer)
        self._control = frozenset(control)
        # This copy never puts a space of its own: the class does, where SentencePiece would.
        self._text = _without_prefix(self._markup, control)
        self._starts_with_space = self._puts_space("a")
        # transformers' "legacy" tokenizers begin anew behind a special token.
        self._space_after_special = any(
            self._puts_space(f"{control[number]}a") for number in sorted(control)[:1]
        )

    def _puts_space(self, text: str) -> bool:
        tokens = self._markup.encode(text, add_special_tokens=False).tokens
        return tokens[-1].startswith(SPACE) or tokens[-2:-1] == [SPACE]

    def agrees(self) -> bool:
        text = "a b: c\nd  e"
        ours = [token for token, _ in self([PromptText(text)])]
        return ours == self._markup.encode(text, add_special_tokens=False).ids

    @_may_panic
    def __call__(self, parts: Sequence[PromptPart]) -> PartTokens:
        tokens: PartTokens = []
        run: list[tuple[str, int]] = []
        space = self._starts_with_space
        for number, part in enumerate(parts):
            if isinstance(part, Placeholders):
                tokens += self._run(run, space) + [(part.token, number)] * part.n
                run, space = [], self._space_after_special
                continue
            if not part.markup:
                run.append((part.text, number))
                continue
            for cut in self._cut(part.text):
                if isinstance(cut, str):
                    run.append((cut, number))
                    continue
                first = not tokens and not any(text for text, _ in run)
                tokens += [*self._run(run, space), (cut, number)]
                run = []
                if not (first and cut == self._bos):
                    space = self._space_after_special
        return tokens + self._run(run, space)

    def _cut(self, markup: str) -> list[str | int]:
        """A part of the template as its texts and special tokens."""
        parts: list[str | int] = []
        at = 0
        encoding = self._markup.encode(markup, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control:
                parts += [markup[at:start], token]
                at = end
        return [*parts, markup[at:]]

    def _run(self, run: Sequence[tuple[str, int]], space: bool) -> PartTokens:
        """Tokenize texts, given with the numbers of their parts, as one."""
        text = "".join(own for own, _ in run)
        if not text:
            return []
        owners = [number for own, number in run for _ in own]
        if space:
            text, owners = " " + text, [owners[0], *owners]
        encoding = self._text.encode(text, add_special_tokens=False)
        # All bytes of a character have its place.
        places = [max(end - 1, 0) for _, end in encoding.offsets]
        return [(token, owners[at]) for token, at in zip(encoding.ids, places, strict=True)]


def _without_prefix(backend: Tokenizer, control: Collection[int]) -> Tokenizer:
    """A copy that puts no space before a text and takes no text for a control token."""
    spec = _without_tokens(backend, control)
    for part in ("normalizer", "pre_tokenizer"):
        spec[part] = _without_space(spec[part])
    return Tokenizer.from_str(json.dumps(spec))


def _without_space(step: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    match step:
        case {"type": "Prepend"}:
            return {"type": "Sequence", "normalizers": []}
        case {"type": "Metaspace"}:
            return {**step, "prepend_scheme": "never"}
        case dict():
            return {name: _without_space(value) for name, value in step.items()}
        case list():
            return [_without_space(inner) for inner in step]
    return step

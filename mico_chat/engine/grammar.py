"""Answers of a form that the client gives, by ``llguidance``: which tokens may come next.

A form is a JSON schema, a regular expression, a choice of texts, a grammar, or structures behind
triggers. It is a client's program, so its work is bounded in steps: of the lexer's derivatives, of
grammar symbols and of parser items. A form beyond a bound is an error of its request alone. The
bounds were chosen by measurement: schemas of 120,000 bytes and 10,000 values pass, and no step of a
hostile one takes longer than half a second on a busy core.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import Any, TypeVar

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mico_chat.errors import RequestError
from mico_chat.fields import check_object, object_at, string_at

T = TypeVar("T")

MOST_SCHEMA_BYTES = 128 << 10
"""OpenAI lets the names and values of a schema have 120,000 characters together."""

MOST_GRAMMAR_BYTES = 16 << 10
"""The time to read a grammar grows with the square of its rules: 31 s for 5,000 of them in GBNF."""

STACK_BYTES = 512 << 20
"""llguidance calls itself for each level of a grammar, and 1,000 levels overflow a usual stack,
which would end the process. The longest schema has about 7,000; memory is taken as it is used."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

_JSON: Any = {
    # A small model writes spaces without end where it may: one, or a line break and an indent.
    "whitespace_pattern": r"( |\n{1,2}[ \t]{0,20})",
}
"""Defaults: the member ``x-guidance`` of a schema changes them. A schema with a keyword that
llguidance does not know is refused, unless ``lenient`` there is true."""

_GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")


class Grammar:
    """The tokens that may follow in one answer: some of the first ``n_tokens`` of a model."""

    def __init__(self, matcher: LLMatcher, name: str, n_tokens: int) -> None:
        self._matcher, self._name, self._n_tokens = matcher, name, n_tokens

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self._name, self._n_tokens)

    def allowed(self, n_vocab: int) -> NDArray[np.bool_]:
        """For each of ``n_vocab`` tokens, whether it may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.zeros(n_vocab, bool)
        known = np.unpackbits(bits, bitorder="little")[:n_vocab]
        found[: len(known)] = known
        if not found.any():
            raise RequestError(f"{self._name}: the model has no token for what must follow")
        return found

    def allows(self, token: int) -> bool:
        """What :meth:`allowed` says of one token, but False where the answer is complete."""
        if forced := self._matcher.compute_ff_tokens():  # no other way to write the same text
            return token == forced[0]
        return token < self._n_tokens and self._matcher.validate_tokens([token]) == 1

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("\n", 1)[0][:200]
            raise RequestError(f"{self._name}: it cannot be followed: {reason}")


class Grammars:
    """Grammars over the tokens of a fast tokenizer, or of a GGUF file's
    :class:`~mico_chat.adapters.vocabulary.Vocabulary`; ``ends`` are the tokens that end an answer.
    """

    def __init__(self, backend_tokenizer: Any, ends: Collection[int]) -> None:
        self._backend, self._ends = backend_tokenizer, sorted(ends)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, name: str, value: Any) -> Grammar:
        """The grammar of a form, an option's name and value: its language is what they allow. It
        computes without Python's lock: call it in a thread.

        Raises:
            RequestError: it is no such form, or more than the bounds allow.
        """
        try:
            text = value if isinstance(value, str) else json.dumps(value)
        except RecursionError as error:
            raise RequestError(f"{name}: nested too deeply") from error
        most = MOST_GRAMMAR_BYTES if name == "grammar" else MOST_SCHEMA_BYTES
        if len(text) > most:
            raise RequestError(f"{name}: {len(text)} bytes, more than {most}; send a smaller one")
        tokenizer = self.prepare()

        def matched() -> LLMatcher:
            source = _source(name, value, text, tokenizer)
            found = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
            if not found.is_error():
                found.compute_bitmask()  # the longest step: not in the engine's thread
            return found

        try:
            reason = (matcher := _with_deep_stack(matched)).get_error()
        except ValueError as error:
            reason = str(error)
        if reason:
            reason = reason.split("\n", 1)[0][:200]
            raise RequestError(f"{name}: cannot be turned into a grammar: {reason}")
        return Grammar(matcher, name, tokenizer.vocab_size)

    def prepare(self) -> LLTokenizer:
        """llguidance's form of the tokenizer: making it holds Python's lock for half a second."""
        with self._lock:
            if self._tokenizer is None:
                source: Any
                if isinstance(self._backend, Tokenizer):
                    own = copy(self._backend)
                    own.no_padding()
                    own.no_truncation()
                    source = own.to_str()
                else:
                    source = TokenizerWrapper(self._backend)
                try:
                    self._tokenizer = LLTokenizer(source, eos_token=self._ends)
                except ValueError as error:
                    reason = f"llguidance cannot read this model's tokenizer: {error}"
                    raise RequestError(reason) from error
            return self._tokenizer


def _source(name: str, value: Any, text: str, tokenizer: LLTokenizer) -> str:
    """llguidance's own form of a form."""
    match name:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(text, defaults=_JSON)
        case "grammar":
            return llguidance.grammar_from("gbnf" if _GBNF.search(text) else "lark", text)
        case "structural_tag":
            tags = _tags(value)
            # Only such a trigger is one of the model's own tokens, and no text.
            own = [tokenizer.tokenize_str(tag.trigger, parse_special=True) for tag in tags]
            special = all(len(ids) == 1 and tokenizer.is_special_token(ids[0]) for ids in own)
            return StructTag.to_grammar(tags, assume_special=special)
    return llguidance.grammar_from("choice" if name == "choice" else "regex", text)


def _tags(value: dict[str, Any]) -> list[StructTag]:
    """The structures of a structural tag, each with the trigger that it begins with."""
    triggers, structures = value.get("triggers"), value.get("structures")
    if not (
        triggers and isinstance(triggers, list) and structures and isinstance(structures, list)
    ):
        reason = "expected lists structures and triggers, neither of them empty; no other is known"
        raise RequestError.at("structural_tag", reason)
    found = []
    for number, one in enumerate(structures):
        where = f"structural_tag.structures[{number}]"
        check_object(one, where)
        begin, end = string_at(one, "begin", where), string_at(one, "end", where)
        known = [own for own in triggers if isinstance(own, str) and own and begin.startswith(own)]
        if not known:
            raise RequestError.at(f"{where}.begin", "it begins with none of the triggers")
        schema = {"x-guidance": _JSON, **object_at(one, "schema", where)}
        found.append(StructTag(trigger=known[0], begin=begin, grammar=schema, end=end))
    return found


def _with_deep_stack(work: Callable[[], T]) -> T:
    """The result of ``work`` in a thread with a stack of :data:`STACK_BYTES`."""
    before = threading.stack_size(STACK_BYTES)
    try:
        thread = ThreadPoolExecutor(1, "mico-grammar")
        done = thread.submit(work)
    finally:
        threading.stack_size(before)
    with thread:
        return done.result()

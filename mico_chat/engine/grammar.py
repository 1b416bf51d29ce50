"""Answers that follow a JSON schema, by ``llguidance``: which tokens may come next.

A schema is a client's program, so its work is bounded in steps: of the lexer's derivatives, of
grammar symbols and of parser items. A schema beyond a bound is an error of its request alone. The
bounds were chosen by measurement: schemas of 120,000 bytes and 10,000 values pass, and no step of a
hostile one takes longer than half a second on a busy core.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from copy import copy
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mico_chat.errors import RequestError

MOST_SCHEMA_BYTES = 128 << 10
"""OpenAI lets the names and values of a schema have 120,000 characters together."""

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
    "lenient": True,  # a keyword that it does not know limits nothing
}


class Grammar:
    """The tokens that may follow in one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy())

    def allowed(self, n_vocab: int) -> NDArray[np.bool_]:
        """For each of ``n_vocab`` tokens, whether it may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.zeros(n_vocab, bool)
        known = np.unpackbits(bits, bitorder="little")[:n_vocab]
        found[: len(known)] = known
        if not found.any():
            raise RequestError("json_schema: the model has no token for what must follow")
        return found

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().split("\n", 1)[0][:200]
            raise RequestError(f"json_schema: it cannot be followed: {reason}")


class Grammars:
    """Grammars over the tokens of a fast tokenizer, or of a GGUF file's
    :class:`~mico_chat.adapters.vocabulary.Vocabulary`; ``ends`` are the tokens that end an answer.
    """

    def __init__(self, backend_tokenizer: Any, ends: Collection[int]) -> None:
        self._backend, self._ends = backend_tokenizer, sorted(ends)
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any]) -> Grammar:
        """A schema's grammar. It computes without Python's lock: call it in a thread.

        Raises:
            RequestError: it is no schema, or more than the bounds allow.
        """
        try:
            text = json.dumps(schema)
        except RecursionError as error:
            raise RequestError("json_schema: nested too deeply") from error
        if len(text) > MOST_SCHEMA_BYTES:
            raise RequestError(
                f"json_schema: {len(text)} bytes, more than {MOST_SCHEMA_BYTES}; send a smaller one"
            )
        tokenizer = self.prepare()
        try:
            source = LLMatcher.grammar_from_json_schema(text, overrides=_JSON)
            matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
            reason = matcher.get_error()
        except ValueError as error:
            reason = str(error)
        if reason:
            reason = reason.split("\n", 1)[0][:200]
            raise RequestError(f"json_schema: cannot be turned into a grammar: {reason}")
        matcher.compute_bitmask()  # the first step is the longest: not in the engine's thread
        return Grammar(matcher)

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
                    raise RequestError(f"json_schema: {reason}") from error
            return self._tokenizer

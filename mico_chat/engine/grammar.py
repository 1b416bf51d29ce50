"""Answers of a form that the client gives, by ``llguidance``: which tokens may come next.

A form is a JSON schema, a regular expression, a choice of texts, a grammar, or structures behind
triggers. It is a client's program. Its steps are bounded: the lexer's derivatives, grammar symbols
and parser items. The bounds were chosen by measurement: schemas of 120,000 bytes and 10,000 values
pass, and no step of a hostile one takes longer than half a second on a busy core. But some forms
never end (``multipleOf`` of a large number), and nothing ends a thread: each form is compiled first
in a process that has :data:`LONGEST_S`, and here only if it compiled there.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mico_chat import system
from mico_chat.errors import ModelError, RequestError
from mico_chat.fields import check_object, object_at, string_at

T = TypeVar("T")

MOST_SCHEMA_BYTES = 128 << 10
"""OpenAI lets the names and values of a schema have 120,000 characters together."""

MOST_GRAMMAR_BYTES = 16 << 10
"""The time to read a grammar grows with the square of its rules: 31 s for 5,000 of them in GBNF."""

STACK_BYTES = 512 << 20
"""llguidance calls itself for each level of a grammar, and 1,000 levels overflow a usual stack,
which would end the process. The longest schema has about 7,000; memory is taken as it is used."""

LONGEST_S = 4.0
"""Seconds that a form may take to compile. The longest schema takes 0.7 on an idle core."""

MOST_BYTES = 2 << 30
"""Address space of the process in which a form is compiled first, the stack included."""

MOST_KEPT = 16  # compiled forms

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
        self._trying: set[_Trial] = set()
        self._idle: _Trial | None = None
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._closed = False

    def compile(self, name: str, value: Any) -> Grammar:
        """The grammar of a form, an option's name and value: its language is what they allow. It
        computes without Python's lock: call it in a thread. Of each owner call it once at a time.

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
        digest = hashlib.sha256(f"{name}\0{text}".encode(errors="surrogatepass")).digest()
        with self._lock:
            if (known := self._kept.get(digest)) is not None:
                self._kept.move_to_end(digest)
                return known.copy()
        tokenizer = self.prepare()
        tried = (
            ("tags", _tags_source(value, tokenizer)) if name == "structural_tag" else (name, text)
        )
        with self._trial(tokenizer) as trial:
            reason, source = trial.compiled(*tried)
        if reason and self._closed:
            raise ModelError("the model is closed")
        try:
            matcher = None if reason else _matcher(tokenizer, source)
        except ValueError as error:  # its first tokens need more steps in the model's vocabulary
            matcher, reason = None, str(error).split("\n", 1)[0][:200]
        if matcher is None:
            raise RequestError(f"{name}: cannot be turned into a grammar: {reason}")
        found = Grammar(matcher, name, tokenizer.vocab_size)
        with self._lock:
            self._kept[digest] = found
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return found.copy()

    @contextmanager
    def _trial(self, tokenizer: LLTokenizer) -> Iterator[_Trial]:
        with self._lock:
            if self._closed:
                raise ModelError("the model is closed")
            trial, self._idle = self._idle or _Trial(tokenizer, self._ends), None
            self._trying.add(trial)
        try:
            yield trial
        finally:
            with self._lock:
                self._trying.remove(trial)
                if self._closed or self._idle is not None or not trial.runs:
                    trial.end()
                else:
                    self._idle = trial

    def close(self) -> None:
        """End the processes, and with them what they compile."""
        with self._lock:
            self._closed = True
            for trial in self._trying:
                trial.kill()
            if self._idle is not None:
                self._idle.end()

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


class _Trial:
    """A process in which forms are compiled. Of a model's tokens it knows the number and those that
    are special: what can be compiled does not depend on the others.
    """

    def __init__(self, tokenizer: LLTokenizer, ends: list[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._process = system.start_apart(_MAIN)
        self._ready = False
        self.end = weakref.finalize(self, system.end, self._process)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def compiled(self, name: str, text: str) -> tuple[str, str]:
        """Why a form cannot be compiled, or llguidance's own form of it."""
        if not self._ready:
            n_tokens = self._tokenizer.vocab_size
            special = filter(self._tokenizer.is_special_token, range(n_tokens))
            named = [(token, self._tokenizer.decode_str([token])) for token in special]
            self._ready = self._said(n_tokens, named, self._ends) is not None
            if not self._ready:
                said = self._process.stderr.read().decode() if self._process.stderr else ""
                last = said.strip().split("\n")[-1] or "it was ended"
                raise ModelError(f"the process that compiles forms does not start: {last}")
        if (found := self._said(name, text)) is not None:
            return found[0], found[1]
        reason = f"it takes more than {LONGEST_S:g} seconds or {MOST_BYTES >> 30} GiB of memory"
        return f"{reason}; send one with smaller numbers, or fewer repetitions", ""

    def kill(self) -> None:
        """End the process under the thread that asks it, which then ends this trial."""
        system.kill(self._process)

    def _said(self, *values: Any) -> Any:
        """The process's answer; None if it has ended."""
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps(values).encode() + b"\n")
            pipes.stdin.flush()
            return json.loads(pipes.stdout.readline())
        except (OSError, ValueError):
            system.kill(pipes)
            pipes.wait()
            return None


_MAIN = "from mico_chat.engine.grammar import try_forms\ntry_forms()"


class _Tokens:
    """Bytes, special tokens, and as many others as make the number right."""

    bos_token_id = None

    def __init__(self, n_tokens: int, special: list[tuple[int, str]], ends: list[int]) -> None:
        self.eos_token_id = ends[0]
        self.special_token_ids = [token for token, _ in special]
        numbers = range(max(n_tokens, 256 + len(special)))  # each byte is a token, or none is read
        self.tokens = [b"\xff%d" % number for number in numbers]
        others = (token for token in numbers if token not in set(self.special_token_ids))
        for byte, token in zip(range(256), others, strict=False):
            self.tokens[token] = bytes([byte])
        for token, text in special:
            self.tokens[token] = text.encode()

    def __call__(self, text: bytes) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text]


def try_forms() -> None:
    """The process of :class:`_Trial`: it compiles a form for each line, or ends in the attempt."""
    if sys.platform == "linux":
        system.limit("RLIMIT_AS", MOST_BYTES)
        system.limit("RLIMIT_CORE", 0)
    n_tokens, special, ends = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(n_tokens, special, ends)), eos_token=ends)
    print(json.dumps(True), flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(LONGEST_S, exit=True)
        name, text = json.loads(line)
        reason = source = ""
        try:
            source = _source(name, text)
            _matcher(tokenizer, source)
        except ValueError as error:
            reason = str(error).split("\n", 1)[0][:200]
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps([reason, source]), flush=True)


def _matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """Raises: ValueError: it is no grammar."""

    def made() -> LLMatcher:
        found = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        if not found.is_error():
            found.compute_bitmask()  # the longest step: not in the engine's thread
        return found

    matcher = _with_deep_stack(made)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _source(name: str, text: str) -> str:
    """llguidance's own form of a form."""
    match name:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(text, defaults=_JSON)
        case "grammar":
            return llguidance.grammar_from("gbnf" if _GBNF.search(text) else "lark", text)
        case "tags":
            return text
    return llguidance.grammar_from("choice" if name == "choice" else "regex", text)


def _tags_source(value: dict[str, Any], tokenizer: LLTokenizer) -> str:
    tags = _tags(value)
    # Only such a trigger is one of the model's own tokens, and no text.
    own = [tokenizer.tokenize_str(tag.trigger, parse_special=True) for tag in tags]
    special = all(len(ids) == 1 and tokenizer.is_special_token(ids[0]) for ids in own)
    return StructTag.to_grammar(tags, assume_special=special)


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

"""The protocol of every engine: options and a prompt in, deltas of an answer out.

A prompt is token ids and blocks of context tokens.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import AsyncGenerator, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mico_chat.errors import ConfigError, RequestError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import PLACEHOLDER, Segment
from mico_chat.wire import Explanation, FinishReason, TokenLogprob, Usage

if TYPE_CHECKING:
    from torch import Tensor


StopText = Annotated[str, Field(max_length=1000)]
"""Each of an answer's tokens is compared with the stop texts: their length is work."""


class GenerationOptions(BaseModel):
    """How an answer is generated. The default is greedy: the same request, the same answer.

    A checkpoint may set other defaults (:meth:`of_checkpoint`). ``temperature`` 0 is greedy.
    ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 keep every token. The penalties count the answer's
    tokens, not the prompt's: ``repetition_penalty`` divides a repeated token's logit (and
    multiplies a negative logit), ``presence_penalty`` is subtracted once, ``frequency_penalty`` as
    often as the token occurs. ``stop`` lists at most 16
    texts of at most 1,000 characters: the answer ends before the first of them.
    ``seed`` makes a sampled answer repeatable: while such a request runs alone, it is computed as
    by an engine that has just started. ``logprobs`` asks for the model's own log-probability of
    each token, without temperature and penalties, and for this number of the likeliest tokens; the
    token that ends the answer has none. ``n`` answers are sampled from one prompt. ``json_schema``
    limits the answer to JSON that fits the schema. ``prefix`` is the beginning of the answer: the
    model continues it, and its tokens count as prompt tokens. ``explain`` asks which media the
    answer rests on (:mod:`mico_chat.explain`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    stop: tuple[StopText, ...] = Field((), max_length=16, fail_fast=True)
    logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1, le=16)
    json_schema: dict[str, Any] | None = None
    prefix: str = ""
    explain: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Options from a user's values, whose numbers may be text.

        Raises:
            RequestError: naming the first option that is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise request_error(error.errors()[0]) from error

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> GenerationOptions:
        """The options that ``generation_config.json`` sets; greedy unless ``do_sample`` is true."""
        names = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
        if config.get("do_sample"):
            names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
        return cls.of({ours: config[n] for n, ours in names.items() if config.get(n) is not None})

    def over(self, defaults: GenerationOptions) -> GenerationOptions:
        """These options; an option that was not set comes from ``defaults``."""
        return defaults.model_copy(update={n: getattr(self, n) for n in self.model_fields_set})


def request_error(details: Mapping[str, Any], *, outer: int = 0) -> RequestError:
    """The error of a field that pydantic refuses, without the ``outer`` first parts of its path."""
    path = details["loc"][outer:]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    reason = details["msg"][:1].lower() + details["msg"][1:]
    got = reprlib.repr(details["input"])  # shortened: it may be long
    return RequestError.at(name.removeprefix(".") or "request", f"{reason}, got {got}")


@dataclass(frozen=True, eq=False)
class Prompt:
    """Segments in order. Prompts of the same ``salt`` share the computation of a common start.

    The first ``unsalted`` tokens are the service's own, such as its system prompt: prompts of every
    salt share them, except in vLLM.

    ``shown`` are special tokens that the text of the answer shows; it leaves out the others. The
    last ``scored`` tokens are an answer that is there already: instead of continuing the prompt, an
    engine gives these tokens with their log-probabilities.
    """

    segments: tuple[Segment, ...]
    salt: str = ""
    shown: frozenset[int] = frozenset()
    scored: int = 0
    unsalted: int = 0

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def media_tokens(self) -> int:
        return sum(len(s) for s in self.segments if isinstance(s, ContextBlock))

    @cached_property
    def answer(self) -> list[int]:
        """The tokens that are scored."""
        return self.tokens(len(self) - self.scored, len(self))[0]

    def with_answer(self, tokens: Sequence[int]) -> Prompt:
        """This prompt and an answer to it that is to be scored."""
        return replace(self, segments=(*self.segments, tuple(tokens)), scored=len(tokens))

    @cached_property
    def identities(self) -> tuple[Hashable, ...]:
        """A value for each token. Two prompts share a start as far as their values are equal.

        The first value behind the ``unsalted`` tokens has the salt, so nothing behind it is shared
        with another salt.
        """
        found: list[Hashable] = []
        for segment in self.segments:
            if isinstance(segment, ContextBlock):
                found += [(segment.key, place) for place in range(len(segment))]
            else:
                found += segment
        if self.salt:
            found[self.unsalted] = (self.salt, found[self.unsalted])
        return tuple(found)

    @cached_property
    def blocks(self) -> tuple[tuple[int, ContextBlock], ...]:
        """The media's blocks, each with the place of its first token."""
        found, place = [], 0
        for segment in self.segments:
            if isinstance(segment, ContextBlock):
                found.append((place, segment))
            place += len(segment)
        return tuple(found)

    def stop(self, start: int, room: int) -> tuple[int, bool]:
        """The end of a step's tokens from ``start``, and whether their attention is causal.

        They are at most ``room``, but a block that is not causal is not cut, and has its own step.
        """
        end = min(len(self), start + room)
        for place, block in self.blocks:
            if not block.causal and place >= start:
                return (place + len(block), False) if place == start else (min(end, place), True)
        return end, True

    def before_block(self, place: int) -> int:
        """``place``, or the start of the block that it would cut."""
        for start, block in self.blocks:
            if start < place < start + len(block):
                return start
        return place

    @cached_property
    def positions(self) -> Tensor | None:
        """Positions (A, S + 1) of the tokens, and of the token after them, on the A axes of a
        rotary embedding; None if each is the token's place.
        """
        blocks = [segment for segment in self.segments if isinstance(segment, ContextBlock)]
        axes = {len(block.positions) for block in blocks if block.positions is not None}
        if not axes:
            return None
        import torch  # here and not above: prompts of a model without axes need none

        parts, at = [], 0
        for segment in self.segments:
            if isinstance(segment, ContextBlock) and segment.positions is not None:
                parts.append(segment.positions + at)
                at += segment.n_positions
            else:
                parts.append(torch.arange(at, at + len(segment)).expand(max(axes), -1))
                at += len(segment)
        return torch.cat([*parts, torch.full((max(axes), 1), at)], dim=1)

    def tokens(self, start: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """Ids, and context tokens (m, L), of the places from ``start`` up to, not with, ``stop``.

        The id of a context token is :data:`~mico_chat.model.splice.PLACEHOLDER`.
        """
        ids: list[int] = []
        context: list[Tensor] = []
        offset = 0
        for segment in self.segments:
            first, last = max(start - offset, 0), min(stop - offset, len(segment))
            if first < last:
                if isinstance(segment, ContextBlock):
                    ids += [PLACEHOLDER] * (last - first)
                    context.append(segment.tokens[first:last])
                else:
                    ids += segment[first:last]
            offset += len(segment)
        return ids, context


def equal_start(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many values at the start of both are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


class Delta(BaseModel):
    """The text and tokens that one step adds to answer ``index``. Text may come after its tokens.

    The last delta of an answer has a ``finish_reason``: "stop" if the model or a stop text ended
    the answer, "length" if ``max_tokens`` did. The last delta of a request has its ``usage``.

    If the prompt has media, the last delta of an answer has ``avg_logprob``: the mean
    log-probability of the answer's tokens, which are those that have ``logprobs``. The first of
    several is left out: it is how an answer begins. It is None for an answer without tokens. The
    assistant adds ``unsure`` and, to the last delta of a request, the ``explanation``.
    """

    model_config = ConfigDict(frozen=True)

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    avg_logprob: float | None = None
    unsure: bool | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    explanation: Explanation | None = None

    @property
    def confidence(self) -> float | None:
        """The geometric mean of the probabilities that ``avg_logprob`` has, 0 to 1."""
        return None if self.avg_logprob is None else exp(self.avg_logprob)


class EngineStats(BaseModel):
    model_config = ConfigDict(frozen=True)

    running: int
    waiting: int
    slots: int
    cells_used: int
    """Tokens whose keys and values are held; some are of finished requests, kept for reuse."""
    cells: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Engine(Protocol):
    """A loaded language model that continues many prompts at once."""

    name: str
    max_position: int  # tokens that a prompt and its answer may have together
    repeats: bool
    """Whether a request with a seed gives the same answer whatever ran before, if it runs alone."""
    scores: bool
    """Whether it can give the log-probabilities of an answer that is there already."""

    @property
    def failure(self) -> str | None:
        """Why the engine ended without being closed; None while it works."""
        ...

    def generate(self, prompt: Prompt, options: GenerationOptions) -> AsyncGenerator[Delta, None]:
        """Continue ``prompt``. Closing the iterator frees its slots before the next step."""
        ...

    def stats(self) -> EngineStats: ...

    def prepare(self) -> None:
        """Do now what would hold up everybody during the first request that needs it."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds since the present step began; 0 where the engine watches its own steps."""
        ...

    def give_up(self, reason: str) -> None:
        """Answer all requests with an error, where that can be: a step does not end, and the
        process is about to be started anew.
        """
        ...

    def close(self) -> None: ...


def check_names(engine: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    for name in arguments:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif len(known) < 10:
            hint = f"its options are {', '.join(sorted(known))}"
        else:
            hint = f"the documentation of {engine} lists its options"
        raise ConfigError(f"the {engine} engine lacks the option {name!r}; {hint}")

"""The protocol of every engine: options and a prompt in, deltas of an answer out.

A prompt is token ids and blocks of context tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import BaseModel, ConfigDict

from mico_chat.errors import ConfigError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import PLACEHOLDER, Segment
from mico_chat.options import GenerationOptions as GenerationOptions
from mico_chat.thoughts import ThoughtFormat
from mico_chat.tools import CallPiece
from mico_chat.wire import DeltaEvent, Explanation, FinishReason, Usage

if TYPE_CHECKING:
    from torch import Tensor

    from mico_chat.checkpoints.lora import Lora

Preference: TypeAlias = Literal["pauses", "first-token"]
"""What is kept short where a prompt meets running answers: their pauses, or its own wait."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Segments in order. Prompts of the same ``tenant`` share the computation of a common start.

    The first ``common`` tokens are the service's own, such as its system prompt: prompts of every
    tenant share them, except in vLLM.

    ``shown`` are special tokens that the text of the answer shows; it leaves out the others. The
    last ``scored`` tokens are an answer that is there already: instead of continuing the prompt, an
    engine gives these tokens with their log-probabilities. ``thoughts`` is the form of what the
    model may think before the answer. Nothing is shared with prompts of another adapter ``lora``.
    """

    segments: tuple[Segment, ...]
    tenant: str = ""
    shown: frozenset[int] = frozenset()
    scored: int = 0
    common: int = 0
    thoughts: ThoughtFormat | None = None
    lora: Lora | None = None

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def media_tokens(self) -> int:
        return sum(len(block) for _, block in self.blocks)

    @cached_property
    def answer(self) -> list[int]:
        """The tokens that are scored."""
        return self.tokens(len(self) - self.scored, len(self))[0]

    def with_answer(self, tokens: Sequence[int]) -> Prompt:
        """This prompt and an answer to it that is to be scored."""
        segments = (*self.segments, tuple(tokens))
        return replace(self, segments=segments, scored=len(tokens), thoughts=None)

    @cached_property
    def identities(self) -> tuple[Hashable, ...]:
        """A value for each token: two prompts share a start as far as their values are equal.

        The first value behind the ``common`` tokens has the tenant: what follows is not shared.
        """
        found: list[Hashable] = []
        for segment in self.segments:
            if isinstance(segment, ContextBlock):
                found += [(segment.key, place) for place in range(len(segment))]
            else:
                found += segment
        if self.lora is not None:
            found[0] = (self.lora.key, found[0])
        if self.tenant:
            found[self.common] = (self.tenant, found[self.common])
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
        axes = {len(block.positions) for _, block in self.blocks if block.positions is not None}
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


class Delta(DeltaEvent):
    """The text and tokens that one step adds to answer ``index``. Text may come after its tokens.

    The engine's text has the calls of tools as the model writes them. The assistant takes them out
    of it: a delta of the assistant has a piece of text or, as its ``call``, a piece of a call.
    ``reasoning_content`` is a piece of what the model thinks before it answers.

    The last delta of an answer has a ``finish_reason``: "stop" if the model or a stop text ended
    the answer, "length" if ``max_tokens`` did; ``stop_text`` is that stop text. The last delta of a
    request has its ``usage``.

    If the prompt has media, the last delta of an answer has ``avg_logprob``: the mean
    log-probability of the answer's tokens, which are those that have ``logprobs``. The first of
    several is left out: it is how an answer begins, and the tokens of thoughts have none. It is
    None for an answer without tokens. The assistant adds ``unsure`` and, to the last delta of a
    request, the ``explanation``.
    """

    index: int = 0
    text: str = ""
    call: CallPiece | None = None
    token_ids: tuple[int, ...] = ()
    avg_logprob: float | None = None
    unsure: bool | None = None
    finish_reason: FinishReason | None = None
    stop_text: str | None = None
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
    state_bytes: int = 0
    """Bytes of the recurrent states that are held, those kept for reuse too."""


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

    def generate(self, prompt: Prompt, options: GenerationOptions) -> AsyncGenerator[Delta, None]:
        """Continue ``prompt``. Closing the iterator frees its slots before the next step."""

    def stats(self) -> EngineStats: ...

    def prepare(self) -> None:
        """Do now what would hold up everybody during the first request that needs it."""

    @property
    def busy_s(self) -> float:
        """Seconds since the present step began; 0 where the engine watches its own steps."""

    def give_up(self, reason: str) -> None:
        """Answer all requests with an error: a step does not end, and the process is restarted."""

    def close(self) -> None: ...


@runtime_checkable
class TakesLoras(Protocol):
    """An engine whose prompts may wear adapters."""

    def load_lora(self, lora: Lora) -> None:
        """Take an adapter, in any thread; a :class:`ModelError` if it does not fit the model."""

    def unload_lora(self, lora: Lora) -> None:
        """Free an adapter that no prompt wears any more."""


def check_names(engine: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    for name in arguments:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"the documentation of {engine} lists its options"
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif len(known) < 10:
            hint = f"its options are {', '.join(sorted(known))}"
        raise ConfigError(f"the {engine} engine lacks the option {name!r}; {hint}")

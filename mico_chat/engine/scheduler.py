"""Continuous batching: which tokens of which sequences one step of the language model computes.

A :class:`Sequence` is one answer in the making, a :class:`Slot` a place where the model keeps keys
and values, the :class:`Scheduler` gives sequences slots and makes steps. A step carries the next
token of every sequence that decodes and, beside them, as much of the waiting prompts as does not
hold them up (chunked prefill). What a finished sequence left in its slot stays there until the
room is needed: a prompt of the same salt that begins like it takes it over.

Pure Python, one thread, no clock but the one given: tests run it on a fake model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mico_chat.engine.base import EngineStats, GenerationOptions, Prompt
from mico_chat.engine.pace import Pace
from mico_chat.wire import FinishReason

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of one slot, from position ``start``: lists of ids and rows (m, L)."""

    slot: int
    start: int
    length: int
    pieces: Many[list[int] | Tensor]
    wants_logits: bool
    """Whether the logits after the last token are asked for."""


@dataclass(frozen=True)
class Sampled:
    """A sampled token; where asked for, its log-probability and the likeliest (id, value)."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler(Protocol):
    """Picks the tokens of one sequence, and remembers them for penalties and grammar."""

    def sample(self, logits: Any) -> Sampled:
        """The next token.

        Raises:
            RequestError: where the options leave none.
        """
        ...

    def close(self) -> None: ...


class Model(Protocol):
    """A language model that keeps keys and values in numbered slots.

    ``n_cells`` tokens in all slots together, ``max_position`` in one, ``max_batch`` in a step.
    ``max_idle_cells`` tokens are kept for reuse, and those of the sequence that ended last: where
    a step takes longer the more is held, they must not cost more than they save.
    """

    n_slots: int
    n_cells: int
    max_idle_cells: int
    max_position: int
    max_batch: int

    def run(self, batch: Many[Chunk]) -> list[Any]:
        """Compute chunks of different slots in one step; logits of those that want them."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give slot ``target``, which is empty, the first ``length`` tokens of ``source``."""
        ...

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a slot."""
        ...

    def sampler(self, options: GenerationOptions, index: int) -> Sampler:
        """A sampler for answer ``index`` of a request."""
        ...

    def close(self) -> None: ...


@dataclass(eq=False)
class Slot:
    """A place for keys and values. ``held`` names the tokens that are in it, in order."""

    number: int
    salt: str = ""
    held: list[Hashable] = field(default_factory=list)
    sequence: Sequence | None = None
    used: int = 0
    """The step of its last use: the least recent is given up first."""

    @property
    def reserved(self) -> int:
        """Cells that it has, and those its sequence may still fill."""
        return len(self.held) if self.sequence is None else self.sequence.most

    def common(self, sequence: Sequence) -> int:
        """Tokens at the start of a sequence's prompt that are held here already."""
        return _common(self.held, sequence) if self.salt == sequence.prompt.salt else 0


class Sequence:
    """One answer in the making: a prompt, and the tokens that followed it so far."""

    def __init__(self, prompt: Prompt, options: GenerationOptions, index: int = 0) -> None:
        self.prompt = prompt
        self.options = options
        self.index = index
        self.length = len(prompt)
        self.tokens: list[int] = []
        self.computed = 0
        self.cached = 0
        self.sampler: Sampler | None = None
        self.slot: Slot | None = None
        self.finished = False

    @property
    def most(self) -> int:
        """Tokens it can come to."""
        return self.length + self.options.max_tokens

    @property
    def decoding(self) -> bool:
        """Whether its whole prompt is computed."""
        return bool(self.tokens)

    def chunk(self, room: int) -> Chunk:
        """Its next token, or up to ``room`` more tokens of its prompt."""
        assert self.slot is not None
        start = self.computed
        if self.decoding:
            return Chunk(self.slot.number, start, 1, [[self.tokens[-1]]], True)
        stop = min(self.length, start + room)
        pieces = list(self.prompt.pieces(start, stop))
        return Chunk(self.slot.number, start, stop - start, pieces, stop == self.length)


@dataclass(frozen=True)
class Step:
    """What a step gave a sequence: a token, and the reason if it was the last.

    Or the error of its sampler, which ends this sequence and no other.
    """

    sequence: Sequence
    sampled: Sampled | None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


class Scheduler:
    """Gives sequences slots and makes steps.

    ``ends`` are the tokens that end an answer; ``max_running`` is how many sequences have a slot
    at once, fewer than the model's slots so that some are left to keep what was computed.
    """

    def __init__(
        self,
        model: Model,
        ends: Collection[int],
        *,
        max_running: int,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.slots = [Slot(number) for number in range(model.n_slots)]
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._ends = frozenset(ends)
        # A step carries a token of each that decodes.
        self._max_running = min(max_running, model.n_slots, model.max_batch)
        self._pace = pace or Pace()
        self._clock = clock
        self._steps = 0
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    @property
    def most(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.max_position, self.model.n_cells)

    @property
    def idle(self) -> bool:
        """Nothing runs or waits."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; it must fit (see :attr:`most`).

        Raises:
            RequestError: for an option that the model's sampler has not.
        """
        assert 0 < sequence.length < sequence.most <= self.most
        sequence.sampler = self.model.sampler(sequence.options, sequence.index)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not; its slot is free at once."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            left, sequence.slot = sequence.slot, None
            left.sequence = None
            # The last conversation may go on however long it is.
            self._keep(self.model.max_idle_cells, self._idle(), left)
        if sequence.sampler is not None:
            sequence.sampler.close()

    def step(self) -> list[Step]:
        """Admit what fits, compute one step, sample; what each sequence got by it.

        Where the model raises, nobody knows what the slots hold: remove all sequences and
        :meth:`forget`.
        """
        self._admit()
        self._steps += 1
        batch = self._batch()
        if not batch:
            return []
        chunks = [chunk for _, chunk in batch]
        decoding = sum(sequence.decoding for sequence, _ in batch)
        before = self._clock()
        logits = self.model.run(chunks)
        for sequence, chunk in batch:
            self._note(sequence, chunk)
        wanting = [sequence for sequence, chunk in batch if chunk.wants_logits]
        steps = [self._sample(*pair) for pair in zip(wanting, logits, strict=True)]
        prompt = sum(chunk.length for chunk in chunks) - decoding
        self._pace.observe(decoding, prompt, self._clock() - before)
        return steps

    def forget(self) -> None:
        """Give up everything that is held for reuse, and what a failed step may have left."""
        for slot in self.slots:
            if slot.sequence is None:
                slot.held.clear()
                self.model.truncate(slot.number, 0)

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            slots=len(self.slots),
            cells_used=sum(len(slot.held) for slot in self.slots),
            cells=self.model.n_cells,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )

    # --- slots ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """First come, first served, as far as slots and cells go.

        A sequence waits for another whose prompt begins like its own and is being computed:
        computing it twice would take longer.
        """
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_running:
                return
            donor, common = self._donor(sequence)
            if self._coming(sequence) > common:
                continue
            slot = self._slot_for(sequence, donor, common)
            if slot is None:
                return
            self.waiting.remove(sequence)
            slot.sequence, slot.salt = sequence, sequence.prompt.salt
            sequence.slot = slot
            sequence.computed = sequence.cached = common
            self.running.append(sequence)
            self._prompt_tokens += sequence.length
            self._cached_tokens += common

    def _donor(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds most of a prompt's start, of several the last used; how much."""
        found = [(slot.common(sequence), slot) for slot in self.slots]
        common, donor = max(found, key=lambda pair: (pair[0], pair[1].used))
        return (donor, common) if common else (None, 0)

    def _coming(self, sequence: Sequence) -> int:
        """The longest common start with a prompt that is being computed."""
        return max(
            (
                _common(other.prompt.identities, sequence)
                for other in self.running
                if not other.decoding and other.prompt.salt == sequence.prompt.salt
            ),
            default=0,
        )

    def _slot_for(self, sequence: Sequence, donor: Slot | None, common: int) -> Slot | None:
        """An idle slot that holds the ``common`` tokens of ``donor`` and nothing else.

        None if there is no room until another sequence ends.
        """
        idle = self._idle()
        taken = sum(slot.reserved for slot in self.slots if slot.sequence is not None)
        room = self.model.n_cells - taken - sequence.most
        if not idle or room < 0:
            return None
        spare = [slot for slot in idle if slot is not donor]
        if donor is None or not self._in_place(donor, common, room if spare else 0):
            slot = spare.pop(0)
        else:
            slot = donor
        held = [other for other in idle if other is not slot]
        self._keep(room, held, donor)
        self._fill(slot, donor, common)
        return slot

    def _idle(self) -> list[Slot]:
        """Slots without a sequence, in the order in which they are given up."""
        idle = [slot for slot in self.slots if slot.sequence is None]
        return sorted(idle, key=lambda slot: (bool(slot.held), slot.used))

    def _keep(self, cells: int, idle: Many[Slot], spared: Slot | None = None) -> None:
        """Let idle slots hold so many tokens at the most; the last to be given up comes last."""
        held = sum(len(slot.held) for slot in idle)
        for slot in idle:
            if held <= cells:
                break
            if slot is not spared:
                held -= len(slot.held)
                self._empty(slot)

    def _in_place(self, donor: Slot, common: int, room: int) -> bool:
        """Whether a sequence runs in the donor itself, which loses what else it holds.

        Otherwise it gets a copy: the donor runs a sequence, or holds much more than the common
        start, for which there are ``room`` cells.
        """
        held = len(donor.held)
        return donor.sequence is None and (2 * common >= held or held > room)

    def _fill(self, slot: Slot, donor: Slot | None, common: int) -> None:
        """Leave the common start in a slot, its own or copied."""
        if slot is donor:
            if len(slot.held) > common:
                self.model.truncate(slot.number, common)
                del slot.held[common:]
        else:
            self._empty(slot)
            if donor is not None:
                self.model.copy(donor.number, slot.number, common)
                slot.held = donor.held[:common]
                donor.used = self._steps

    def _empty(self, slot: Slot) -> None:
        if slot.held:
            self.model.truncate(slot.number, 0)
            slot.held.clear()

    # --- a step ---------------------------------------------------------------------------------

    def _batch(self) -> list[tuple[Sequence, Chunk]]:
        """The next token of all that decode, and prompts in order, as many as the pace allows."""
        decoding = [sequence for sequence in self.running if sequence.decoding]
        batch = [(sequence, sequence.chunk(1)) for sequence in decoding]
        room = self._pace.room(len(decoding), self.model.max_batch - len(decoding))
        for sequence in self.running:
            if not sequence.decoding and room > 0:
                chunk = sequence.chunk(room)
                room -= chunk.length
                batch.append((sequence, chunk))
        return batch

    def _note(self, sequence: Sequence, chunk: Chunk) -> None:
        """A chunk was computed."""
        slot = sequence.slot
        assert slot is not None
        if sequence.decoding:
            slot.held.append(sequence.tokens[-1])
        else:
            slot.held += sequence.prompt.identities[chunk.start : chunk.start + chunk.length]
        slot.used = self._steps
        sequence.computed += chunk.length

    def _sample(self, sequence: Sequence, logits: Any) -> Step:
        """The next token; a sequence that it ends is out at once."""
        assert sequence.sampler is not None
        try:
            sampled = sequence.sampler.sample(logits)
        except Exception as error:
            self.remove(sequence)
            return Step(sequence, None, error=error)
        sequence.tokens.append(sampled.token)
        self._completion_tokens += 1
        reason: FinishReason | None = None
        if sampled.token in self._ends:
            reason = "stop"
        elif len(sequence.tokens) == sequence.options.max_tokens:
            reason = "length"
        if reason is not None:
            self.remove(sequence)
        return Step(sequence, sampled, reason)


def _common(held: Many[Hashable], sequence: Sequence) -> int:
    """Equal tokens at the start; the prompt's last must be computed, for its logits are needed."""
    wanted = sequence.prompt.identities
    most = min(len(held), sequence.length - 1)
    return next((at for at in range(most) if held[at] != wanted[at]), most)

"""Continuous batching: which tokens of which sequences one step of the language model computes.

A :class:`Sequence` is a prompt and its growing answer. A :class:`Slot` is a place where the model
keeps keys and values. The :class:`Scheduler` gives slots to sequences and makes steps. A step
computes the next token of every sequence that decodes, and some prompt tokens of other sequences:
as many as slow the step down little (chunked prefill, :class:`PrefillBudget`). The keys and values
of a finished sequence stay in its slot until the room is needed: a prompt with the same start
reuses them. A recurrent state cannot go back, so such a model's slots are copied where prompts may
go apart, and a copy is reused as a whole.

Tenants come in turn: a tenant's sequences take the places, and the tokens of a step, that others
leave. A tenant without any finds a place although ``max_running`` sequences of others run, and its
prompt is not computed behind theirs.

The scheduler is pure Python in one thread, and its clock is an argument: tests use a fake model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Hashable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from mico_chat.engine.base import EngineStats, GenerationOptions, Preference, Prompt, equal_start
from mico_chat.engine.grammar import Grammar
from mico_chat.errors import RequestError
from mico_chat.fair import Shares, owner_of
from mico_chat.wire import FinishReason

if TYPE_CHECKING:
    from torch import Tensor

    from mico_chat.checkpoints.lora import Lora

STEP_S = 0.15
"""Where several tenants ask, a step that computes prompts alone takes about so long: who comes then
waits for it."""

SHARED_S = 60.0  # several tenants ask: within these seconds

RESERVED = 16
"""One cell in 16 is for tenants that have no sequence running yet."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive tokens of one slot, from position ``start``.

    The id of a context token is :data:`~mico_chat.model.splice.PLACEHOLDER`; ``context`` has the
    tokens, (m, W) of each medium. The logits after each of the last ``wanted`` tokens are needed.
    ``positions`` (A, n) are those of the tokens on the A axes of a rotary embedding, where they are
    not the places from ``start`` on. The tokens of a chunk of a ``prompt`` that is not ``causal``
    attend to all of its tokens. The slot's prompt wears the adapter ``lora``.
    """

    slot: int
    start: int
    ids: Many[int]
    wanted: int
    context: Many[Tensor] = ()
    positions: Tensor | None = None
    prompt: Prompt | None = None
    causal: bool = True
    lora: Lora | None = None

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Sampled:
    """A token and its log-probability, which is None if the engine did not compute it.

    ``top`` has the ids and log-probabilities of the likeliest tokens, as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler(Protocol):
    """Samples the tokens of one sequence, and remembers them for penalties and grammar."""

    def sample(self, logits: Any) -> Sampled: ...

    def score(self, logits: Any, token: int) -> Sampled:
        """A token that somebody else chose."""

    def close(self) -> None: ...


class Model(Protocol):
    """A language model that keeps keys and values in numbered slots.

    All slots together hold ``n_cells`` tokens, one slot holds ``max_position``, and a step computes
    ``max_batch``, besides chunks that are not causal, which are computed apart. Finished sequences
    keep ``max_idle_cells`` tokens for reuse, besides those of the last finished sequence: in some
    engines a step takes longer if more tokens are held. A model that does not reuse the starts of
    prompts gets each prompt whole, one in a step. An error may be in the place of logits. One that
    ``decodes_apart`` computes the next tokens of answers and the tokens of prompts in forwards of
    their own. One that ``scores`` gives the logits after more than the last token of a chunk. One
    with the attribute ``one_lora`` gets chunks of one adapter in a step. ``state_bytes`` are those
    of a slot's recurrent state: a model that has one copies and truncates slots as a whole alone.
    """

    n_slots: int
    n_cells: int
    max_idle_cells: int
    max_position: int
    max_batch: int
    reuses_starts: bool
    decodes_apart: bool
    scores: bool
    state_bytes: int

    def run(self, batch: Many[Chunk]) -> list[Any]:
        """Compute chunks of different slots in one step; the logits that are wanted, in order."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of slot ``source`` to the empty slot ``target``."""

    def truncate(self, slot: int, length: int) -> None: ...

    def sampler(self, sequence: Sequence) -> Sampler:
        """The sampler of an answer; it keeps the sequence's grammar up to date."""

    def close(self) -> None: ...


@dataclass(eq=False)
class Slot:
    """A place for keys and values. ``held`` identifies its tokens, in order."""

    number: int
    held: list[Hashable] = field(default_factory=list)
    sequence: Sequence | None = None
    used: int = 0  # the last step that used it: the least recently used slot is emptied first

    @property
    def reserved(self) -> int:
        """The cells that are filled, or that the slot's sequence may fill."""
        return len(self.held) if self.sequence is None else self.sequence.max_length


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer number ``index``: the ``tokens`` that it has so far.

    One of the tokens ``ends`` ends it. Of its tokens, ``computed`` are in the ``slot``, and
    ``cached`` of these were there before. No step computes tokens on both sides of a place in
    ``forks``, where the slot of a model with a recurrent state is copied.
    """

    prompt: Prompt
    options: GenerationOptions
    index: int = 0
    grammar: Grammar | None = None
    ends: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    scored: int = 0
    computed: int = 0
    cached: int = 0
    forks: tuple[int, ...] = ()
    slot: Slot | None = None
    finished: bool = False
    sampler: Sampler = field(init=False)  # the scheduler makes it when it takes the sequence

    def __post_init__(self) -> None:
        self.length = len(self.prompt)

    @property
    def max_length(self) -> int:
        return self.length + (0 if self.prompt.scored else self.options.max_tokens)

    @property
    def first_wanted(self) -> int:
        """The place of the first token whose logits are wanted: the one before the answer."""
        return self.length - self.prompt.scored - 1

    @property
    def decoding(self) -> bool:
        return bool(self.tokens)

    def bias(self, n_vocab: int) -> dict[int, float]:
        """What is added to the logits of tokens before the next one is sampled."""
        found = dict(self.options.logit_bias)
        if (last := max(found, default=0)) >= n_vocab:
            raise RequestError.at("logit_bias", f"{last} is none of the model's {n_vocab} tokens")
        if len(self.tokens) < self.options.min_tokens and self.grammar is None:
            found |= {token: -inf for token in self.ends if token < n_vocab}
        return found

    def chunk(self, room: int) -> Chunk:
        """The next token of the answer, or the next tokens of the prompt: at most ``room``, or a
        whole block that is not causal.
        """
        assert self.slot is not None
        start = self.computed
        positions = self.prompt.positions
        if self.decoding:
            own = None if positions is None else positions[:, -1:] + (start - self.length)
            lora = self.prompt.lora
            return Chunk(self.slot.number, start, self.tokens[-1:], 1, (), own, lora=lora)
        stop, causal = self.prompt.stop(start, room)
        stop = min([stop, *(fork for fork in self.forks if fork > start)])
        if self.prompt.scored:  # nothing follows the answer's last token
            stop = min(stop, self.length - 1)
        ids, context = self.prompt.tokens(start, stop)
        own = None if positions is None else positions[:, start:stop]
        wanted = max(0, stop - max(start, self.first_wanted))
        given = context, own, self.prompt, causal, self.prompt.lora
        return Chunk(self.slot.number, start, ids, wanted, *given)


class PrefillBudget:
    """How many prompt tokens a step computes beside decoding, from the time of earlier steps.

    Such a step should take at most ``SLOWDOWN`` times as long as a step that only decodes. Each
    further prompt that waits adds the same room: questions that come together then soon decode
    together. If a model computes prompt tokens in a forward ``apart``, which takes about as long as
    decoding for its first tokens, that time is allowed too.

    An operator may ``prefer`` short pauses of the running answers: then a step may compute a single
    token of all prompts. Or the prompt's first token soon: then it computes at least a whole run.
    """

    FIRST = 32
    LEAST = 8
    LEAST_APART = 32  # a forward of 8 tokens reads all weights too, and takes nearly as long
    LEAST_RUN = 64  # llama.cpp's attention takes fewer one by one
    SLOWDOWN = 2.0

    def __init__(self, *, apart: bool = False, prefer: Preference | None = None) -> None:
        self._passes = 2 if apart else 1
        self._least = self.LEAST_APART if apart else self.LEAST
        self._short_pauses = prefer == "pauses"
        if prefer == "first-token":
            self._least = self.LEAST_RUN
        elif self._short_pauses and not apart:
            self._least = 1
        self._decode: float | None = None  # seconds of a step that only decodes
        self._token: float | None = None  # seconds that a prompt token adds

    def observe(self, decoding: int, prompt: int, seconds: float) -> None:
        if not prompt:
            self._decode = _mean(self._decode, seconds)
        elif not decoding:
            self._token = _mean(self._token, seconds / prompt)
        elif self._decode is not None:
            added = max(0.0, seconds - self._passes * self._decode)
            self._token = _mean(self._token, added / prompt)

    def within(self, seconds: float) -> int:
        """Prompt tokens that a step computes in so many seconds, in whole runs of 64."""
        runs = int(seconds / self._token) // self.LEAST_RUN if self._token else 0
        return self.LEAST_RUN * max(1, runs)

    def tokens(self, decoding: int, waiting: int, most: int) -> int:
        if not decoding:
            return most
        found: float = max(self.FIRST, self._least)
        if self._decode and self._token:
            found = max(self._least, (self.SLOWDOWN - 1) * self._decode / self._token)
        return min(most, int(found * (1 if self._short_pauses else max(1, waiting))))


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else 0.7 * mean + 0.3 * value


@dataclass(frozen=True)
class Step:
    """A sequence's token, with the reason if it is the last; or the error of its sampler."""

    sequence: Sequence
    result: Sampled | Exception
    finish_reason: FinishReason | None = None


class Scheduler:
    """Gives sequences slots and makes steps.

    ``ends`` are the tokens that end an answer. At most ``max_running`` sequences run at once: fewer
    than the model has slots, so that some slots keep finished prompts.
    """

    def __init__(
        self,
        model: Model,
        ends: Collection[int],
        *,
        max_running: int,
        prefer: Preference | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.slots = [Slot(number) for number in range(model.n_slots)]
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._ends = frozenset(ends)
        # A step must have room for a token of each sequence that decodes.
        most = min(model.n_slots, model.max_batch)
        self._shares = Shares(min(max_running, most), min(2 * max_running, most))
        self._prefill = PrefillBudget(apart=model.decodes_apart, prefer=prefer)
        self._clock = clock
        self._steps = 0
        self._asked: dict[str, float] = {}  # when each tenant asked last
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0

    @property
    def max_position(self) -> int:
        return min(self.model.max_position, self.model.n_cells)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def _shared(self) -> bool:
        """Whether several tenants asked of late. The bits that a seed is to repeat depend on the
        length of steps: where one answer with a seed runs alone, it has the engine for itself.
        """
        if len(self.running) == 1 and self.running[0].options.seed is not None:
            return False
        now = self._clock()
        self._asked = {name: at for name, at in self._asked.items() if now - at < SHARED_S}
        return len(self._asked) > 1

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, which must fit into :attr:`max_position` tokens; a
        :class:`RequestError` if a medium has too many tokens for the one step that it needs.
        """
        whole = [len(block) for _, block in sequence.prompt.blocks if not block.causal]
        if max(whole, default=0) > self.model.max_batch:
            reason = f"a medium has {max(whole)} tokens that must be computed together, but a step"
            raise RequestError(f"{reason} has at most {self.model.max_batch}: send a smaller one")
        options = sequence.options
        own = frozenset(options.stop_token_ids)
        endless = options.ignore_eos and sequence.grammar is None
        sequence.ends = own if endless else self._ends | own
        if self.model.state_bytes:
            sequence.forks = _forks(sequence.prompt, sequence.first_wanted, self._ends)
        sequence.sampler = self.model.sampler(sequence)
        self._asked[sequence.prompt.tenant] = self._clock()
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._shares.give_back(sequence.prompt.tenant)
            left, sequence.slot = sequence.slot, None
            left.sequence = None
            # The sequence that ended last keeps its tokens: its conversation may continue.
            idle = self._idle()
            if self.model.state_bytes:  # copies of the start of a conversation share its cells
                used = [left.held, *(slot.held for slot in self.slots if slot.sequence is not None)]
                idle = [
                    s for s in idle if s is left or all(s.held != u[: len(s.held)] for u in used)
                ]
            self._empty_idle(self.model.max_idle_cells, idle, left)
        sequence.sampler.close()

    def step(self) -> list[Step]:
        """Admit the sequences that fit, compute a step, sample a token where logits are known.

        If the model raises an error, the content of the slots is unknown: remove all sequences and
        call :meth:`forget`.
        """
        self._admit()
        self._steps += 1
        batch = self._batch()
        if not batch:
            return []
        decoding = sum(sequence.decoding for sequence, _ in batch)
        prompt = sum(chunk.length for _, chunk in batch) - decoding
        before = self._clock()
        logits = self.model.run([chunk for _, chunk in batch])
        for sequence, chunk in batch:
            self._record(sequence, chunk)
        wanting = [pair for pair in batch for _ in range(pair[1].wanted)]
        steps = [
            self._score(sequence, at) if sequence.prompt.scored else self._sample(sequence, at)
            for (sequence, _), at in zip(wanting, logits, strict=True)
        ]
        self._prefill.observe(decoding, prompt, self._clock() - before)
        return steps

    def forget(self) -> None:
        """Empty the slots without a sequence, also of the rest of a failed step."""
        for slot in self.slots:
            if slot.sequence is None:
                slot.held.clear()
                self.model.truncate(slot.number, 0)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            slots=len(self.slots),
            cells_used=sum(len(slot.held) for slot in self.slots),
            cells=self.model.n_cells,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            state_bytes=self.model.state_bytes * sum(bool(slot.held) for slot in self.slots),
        )

    # --- slots ----------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give slots to waiting sequences, tenant by tenant, until slots or cells run out.

        A sequence whose prompt begins like one that is being computed waits, and then reuses the
        common start. The last bits of what a model computes depend on the cells that are used: a
        sequence with a seed that is alone finds none used.
        """
        if self._shares.total == self._shares.most:
            return
        queues: dict[str, deque[Sequence]] = {}
        for sequence in self.waiting:
            own = queues.setdefault(sequence.prompt.tenant, deque())
            if len(own) < self._shares.places:  # to compare prompts takes time
                own.append(sequence)
        full = False  # no cells for somebody: only who has nothing running may still pass
        while queues:
            tenant = self._shares.next(queues)
            assert tenant is not None
            sequence = queues[tenant].popleft()
            if not self._shares.may_enter(tenant) or (full and self._shares.holds(tenant)):
                del queues[tenant]
                continue
            if not queues[tenant]:
                del queues[tenant]
            if sequence.options.seed is not None and not self.running:
                self.forget()
            donor, common = self._donor(sequence)
            coming = (other for other in self.running if not other.decoding)
            if any(self._coming(other, sequence) > common for other in coming):
                continue
            slot = self._slot_for(sequence, donor, common)
            if slot is None:
                full = True
                queues.pop(tenant, None)
                continue
            self.waiting.remove(sequence)
            self._shares.take(tenant)
            slot.sequence, sequence.slot = sequence, slot
            sequence.computed = sequence.cached = common
            self.running.append(sequence)
            self._prompt_tokens += sequence.length
            self._cached_tokens += common

    def _donor(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds the longest start of a prompt, and the length; None and 0 if none."""
        if not self.model.reuses_starts:
            return None, 0
        found = [(_common(slot.held, sequence), slot) for slot in self.slots]
        if self.model.state_bytes:
            found = [(n if n == len(slot.held) else 0, slot) for n, slot in found]
        common, donor = max(found, key=lambda pair: (pair[0], pair[1].used))
        return (donor, common) if common else (None, 0)

    def _coming(self, other: Sequence, sequence: Sequence) -> int:
        """How many first tokens a sequence will find in the slot of another that is computed."""
        common = _common(other.prompt.identities, sequence)
        if not self.model.state_bytes:
            return common
        return max((fork for fork in other.forks if other.computed < fork <= common), default=0)

    def _slot_for(self, sequence: Sequence, donor: Slot | None, common: int) -> Slot | None:
        """An idle slot with the ``common`` first tokens of ``donor``; None if there is no room."""
        idle = self._idle()
        room = self.model.n_cells - self._taken() - sequence.max_length
        if self._shares.holds(sequence.prompt.tenant):  # some are left for other tenants
            room -= self.model.n_cells // RESERVED
        if not idle or room < 0:
            return None
        spare = [slot for slot in idle if slot is not donor]
        # The sequence takes the donor itself, which loses its other tokens, or a copy of the start:
        # a new conversation, which needs the service's own words alone, takes a copy.
        held = 0 if donor is None else len(donor.held)
        # A copy of a recurrent state may serve others again.
        same = 2 * common >= held and common > sequence.prompt.common
        same = same and not self.model.state_bytes
        slot = donor if donor in idle and (same or held > (room if spare else 0)) else spare[0]
        self._empty_idle(room, [other for other in idle if other is not slot], donor)
        self._cut(slot, common if slot is donor else 0)
        if donor is not None and donor is not slot:
            self.model.copy(donor.number, slot.number, common)
            slot.held = donor.held[:common]
            donor.used = self._steps
        return slot

    def _fork(self, slot: Slot) -> None:
        """Copy a slot whose recurrent state goes on, if there is room."""
        idle = self._idle()
        room = self.model.n_cells - self._taken() - len(slot.held)
        if not idle or room < 0 or any(other.held == slot.held for other in idle):
            return
        target = idle[0]
        self._empty_idle(room, idle[1:])
        self._cut(target, 0)
        self.model.copy(slot.number, target.number, len(slot.held))
        target.held, target.used = slot.held.copy(), self._steps

    def _taken(self) -> int:
        """The cells that running sequences fill or may fill."""
        return sum(slot.reserved for slot in self.slots if slot.sequence is not None)

    def _idle(self) -> list[Slot]:
        """Slots without a sequence, in the order in which they are emptied."""
        idle = [slot for slot in self.slots if slot.sequence is None]
        return sorted(idle, key=lambda slot: (bool(slot.held), slot.used))

    def _empty_idle(self, cells: int, idle: Many[Slot], spared: Slot | None = None) -> None:
        """Empty idle slots, in order, until together they hold at most ``cells`` tokens."""
        held = sum(len(slot.held) for slot in idle)
        for slot in idle:
            if held <= cells:
                break
            if slot is not spared:
                held -= len(slot.held)
                self._cut(slot, 0)

    def _cut(self, slot: Slot, length: int) -> None:
        if len(slot.held) > length:
            self.model.truncate(slot.number, length)
            del slot.held[length:]

    # --- a step ---------------------------------------------------------------------------------

    def _batch(self) -> list[tuple[Sequence, Chunk]]:
        """The next token of each answer, and as many prompt tokens as the prefill budget allows."""
        running = self.running
        if hasattr(self.model, "one_lora") and running:  # those of the adapter whose turn it is
            loras = list(dict.fromkeys(sequence.prompt.lora for sequence in running))
            turn = loras[self._steps % len(loras)]
            running = [sequence for sequence in running if sequence.prompt.lora is turn]
        decoding = [sequence for sequence in running if sequence.decoding]
        batch = [(sequence, sequence.chunk(1)) for sequence in decoding]
        prompts = [sequence for sequence in running if not sequence.decoding]
        waiting = _n_waiting(running, prompts)
        if not self.model.reuses_starts:  # the prompt of the tenant whose turn it is, as a whole
            first = _in_turn(prompts, 0)[:1]
            return batch + [(sequence, sequence.chunk(sequence.length)) for sequence, _ in first]
        most = self.model.max_batch - len(decoding)
        if self._shared:
            most = min(most, self._prefill.within(STEP_S))
        room = self._prefill.tokens(len(decoding), waiting, most)
        for sequence, most in _in_turn(prompts, room):
            if room > 0:
                chunk = sequence.chunk(min(most, room))
                room -= chunk.length
                batch.append((sequence, chunk))
        return batch

    def _record(self, sequence: Sequence, chunk: Chunk) -> None:
        slot = self.slots[chunk.slot]
        if sequence.decoding:
            slot.held.append(sequence.tokens[-1])
        else:
            slot.held += sequence.prompt.identities[chunk.start : chunk.start + chunk.length]
        slot.used = self._steps
        sequence.computed += chunk.length
        if sequence.computed in sequence.forks:
            self._fork(slot)

    def _sample(self, sequence: Sequence, logits: Any) -> Step:
        try:
            if isinstance(logits, Exception):
                raise logits
            sampled = sequence.sampler.sample(logits)
        except Exception as error:
            self.remove(sequence)
            return Step(sequence, error)
        sequence.tokens.append(sampled.token)
        self._completion_tokens += 1
        ended = sampled.token in sequence.ends
        if not ended and len(sequence.tokens) < sequence.options.max_tokens:
            return Step(sequence, sampled)
        self.remove(sequence)
        return Step(sequence, sampled, "stop" if ended else "length")

    def _score(self, sequence: Sequence, logits: Any) -> Step:
        """The log-probability of the answer's next token; it is not computed again by itself."""
        answer = sequence.prompt.answer
        sampled = sequence.sampler.score(logits, answer[sequence.scored])
        sequence.scored += 1
        if sequence.scored < len(answer):
            return Step(sequence, sampled)
        self.remove(sequence)
        return Step(sequence, sampled, "length")


def _n_waiting(running: Many[Sequence], prompts: Many[Sequence]) -> int:
    """For how many prompts a step may take longer: a tenant's own prompts may slow down its
    answers, but beside other tenants they count as one.
    """
    for name_of in (owner_of, str):
        if len({name_of(sequence.prompt.tenant) for sequence in running}) > 1:
            return len({name_of(sequence.prompt.tenant) for sequence in prompts})
    return len(prompts)


def _in_turn(prompts: Many[Sequence], room: int) -> list[tuple[Sequence, int]]:
    """Prompts in the order in which a step computes them, and the most tokens of each.

    With prompts of several tenants, a step has as many tokens of each tenant's first prompt as the
    shortest of these lacks: a short prompt is complete after a step of few times its length.
    """
    first: dict[str, Sequence] = {}
    for sequence in prompts:
        first.setdefault(sequence.prompt.tenant, sequence)
    if len(first) < 2:
        return [(sequence, room) for sequence in prompts]
    shortest = min(sequence.length - sequence.computed for sequence in first.values())
    most = max(PrefillBudget.FIRST, min(shortest, room // len(first)))
    order = sorted(first.values(), key=lambda sequence: sequence.length - sequence.computed)
    return [(sequence, most) for sequence in order]


def _common(held: Many[Hashable], sequence: Sequence) -> int:
    """How many tokens at the start are equal; those whose logits are wanted are computed.

    A medium is shared as a whole: its tokens may have one position together.
    """
    prompt = sequence.prompt
    return prompt.before_block(min(sequence.first_wanted, equal_start(held, prompt.identities)))


def _forks(prompt: Prompt, last: int, ends: Collection[int]) -> tuple[int, ...]:
    """Where prompts that begin like this one may go apart: behind its first turn, its last medium
    and its last turn, or at ``last``, where no token ``ends`` a turn.
    """
    ids = prompt.tokens(0, last)[0]
    turns = [place + 1 for place, token in enumerate(ids) if token in ends] or [last]
    media = [place + len(block) for place, block in prompt.blocks if place + len(block) <= last]
    found = {turns[0], turns[-1], *media[-1:]}
    return tuple(sorted({prompt.before_block(place) for place in found} - {0}))

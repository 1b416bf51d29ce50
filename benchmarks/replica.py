"""A replica of the service on one GPU, simulated event by event; nothing here runs on a GPU.

The language model computes in steps, as vLLM does: each step gives a token to every running answer
and takes some tokens of new prompts along. Turns wait, first come first served, for room among the
keys and values. What an ended answer leaves there stays for the conversation's next turn until its
room is needed.
"""

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.traffic import Traffic, Turn
from mico_chat.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU with the model. ``bandwidth`` and ``flops`` are those reached, bytes and FLOP/s.

    ``weights``: bytes that a step reads. ``per_token``: FLOPs of a token. ``kv``: bytes of a
    token's keys and values. ``room``: tokens whose keys and values fit. ``most``, ``budget``:
    answers, and tokens, of a step (vLLM's max_num_seqs and max_num_batched_tokens).
    """

    bandwidth: float
    flops: float
    weights: float
    per_token: float
    kv: float
    room: float = math.inf
    most: int = 256
    budget: int = 2048

    def step(self, tokens: int, context: float, encoding: float = 0.0) -> float:
        """Seconds of a step: all bytes are read, all products made; the slower of the two.

        ``context``: tokens whose keys and values are read. ``encoding``: FLOPs of media.
        """
        read = (self.weights + context * self.kv) / self.bandwidth
        return max(read, tokens * self.per_token / self.flops) + encoding / self.flops

    def steps_until(self, n: int, context: float, seconds: float, most: int) -> tuple[int, float]:
        """How many steps of ``n`` answers begin before ``seconds`` are over, and their seconds."""
        first, longer = self.step(n, context), n * self.kv / self.bandwidth
        if self.weights + context * self.kv < n * self.per_token / self.flops * self.bandwidth:
            return 1, first  # products are the slower: the next step may differ
        count = most
        if seconds < most * first + longer * most * (most - 1) / 2:
            if longer:
                b = first - longer / 2
                root = (math.sqrt(b * b + 2 * longer * seconds) - b) / longer
            else:
                root = seconds / first
            count = min(max(math.ceil(root), 1), most)
        return count, count * first + longer * count * (count - 1) / 2


@dataclass
class Run:
    """What a simulation saw of the turns that came after the warm-up; lists have one for each."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    token: list[float] = field(default_factory=list)  # mean seconds between an answer's tokens
    answers: list[int] = field(default_factory=list)  # tokens
    held: list[int] = field(default_factory=list)  # tokens of prompt and answer
    computed: list[int] = field(default_factory=list)  # prompt tokens
    encoded: list[float] = field(default_factory=list)  # FLOPs of media
    took: list[float] = field(default_factory=list)  # seconds from question to end
    followups: int = 0
    kept: int = 0  # follow-ups whose conversation was still there
    shown_again: int = 0
    encoded_again: int = 0
    running: float = 0.0  # mean number of answers that are written
    busy: float = 0.0  # share of the time

    def p99(self) -> tuple[float, float]:
        return float(np.quantile(self.first, 0.99)), float(np.quantile(self.token, 0.99))


def simulate(card: Card, traffic: Traffic, seconds: float, seed: int = 0) -> Run:
    """Answer the turns of conversations that begin in ``seconds``.

    A tenth of the time, at most an hour, is warm-up.
    """
    if card.room < traffic.context:
        raise ConfigError(
            f"the card has room for {card.room:,.0f} tokens, but a conversation may have "
            f"{traffic.context:,}; take a larger card, smaller weights or shorter conversations"
        )
    return _Replica(card, traffic, seconds, seed).run()


class _Replica:
    def __init__(self, card: Card, traffic: Traffic, seconds: float, seed: int) -> None:
        self.card, self.traffic, self.warm, self.end = (
            card,
            traffic,
            min(seconds / 10, 3600),
            seconds,
        )
        self.rng = rng = np.random.default_rng(seed)
        starts = traffic.starts(rng, seconds)
        turns = rng.geometric(1 / traffic.turns, len(starts))
        total = int(turns.sum())
        self.prompts = iter(traffic.lengths(rng, traffic.prompt, total).tolist())
        self.answers = iter(traffic.lengths(rng, traffic.answer, total).tolist())
        self.coming: list[tuple[float, int, Turn]] = []
        for i, (at, n) in enumerate(zip(starts.tolist(), turns.tolist(), strict=True)):
            shown = traffic.media and rng.random() < traffic.shown
            medium = traffic.media[rng.integers(len(traffic.media))] if shown else None
            tokens = traffic.system + next(self.prompts) + (medium.tokens if medium else 0)
            turn = Turn(i, at, tokens, next(self.answers), n - 1, medium)
            self.coming.append((at, i, turn))  # in order, and so a heap
        self.now, self.steps, self.context, self.used = 0.0, 0, 0, 0
        self.waiting: deque[Turn] = deque()
        self.prefilling: deque[Turn] = deque()
        self.running: list[tuple[int, int, Turn]] = []  # a heap by the step in which they end
        self.kept = _Kept()  # tokens of ended answers
        self.encoded = _Kept()  # bytes of media
        self.seen = Run()

    def run(self) -> Run:
        while self.coming or self.waiting or self.prefilling or self.running:
            while self.coming and self.coming[0][0] <= self.now:
                self.waiting.append(heapq.heappop(self.coming)[2])
            self._admit()
            n, before = len(self.running), self.now
            if self.prefilling:
                self._mixed_step()
            elif self.running:
                gap = self.coming[0][0] - self.now if self.coming else math.inf
                most = self.running[0][0] - self.steps
                count, seconds = self.card.steps_until(n, self.context, gap, most)
                self._advance(count, seconds)
            else:
                self.now = before = self.coming[0][0]
            if self.warm <= before < self.end:
                self.seen.running += n * (self.now - before) / (self.end - self.warm)
                self.seen.busy += (self.now - before) / (self.end - self.warm)
        return self.seen

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.prefilling) < self.card.most:
            turn = self.waiting[0]
            own = self.kept.take(turn.conversation)
            if self.used + turn.need > self.card.room:
                self.kept.put(turn.conversation, own, self.card.room - self.used)
                return
            self.waiting.popleft()
            self.used += turn.need
            self.kept.shrink(self.card.room - self.used)
            turn.left = turn.before + turn.prompt - own
            again = False
            if turn.medium is not None:
                again = self.encoded.take(turn.conversation) > 0
                turn.encoding = 0.0 if again else turn.medium.flops
                if self.traffic.sticky:
                    self.encoded.put(turn.conversation, turn.medium.cached, self.traffic.cache)
            if self._counts(turn):
                self.seen.computed.append(turn.left)
                self.seen.encoded.append(turn.encoding)
                self.seen.held.append(turn.need)
                self.seen.answers.append(turn.answer)
                self.seen.followups += not turn.first
                self.seen.kept += own > 0
                self.seen.shown_again += not turn.first and turn.medium is not None
                self.seen.encoded_again += again
            self.prefilling.append(turn)

    def _mixed_step(self) -> None:
        """A step of the running answers and of the next part of the new prompts."""
        budget = max(self.card.budget - len(self.running), 1)
        tokens, context, encoding = len(self.running), self.context, 0.0
        done: list[Turn] = []
        while self.prefilling and budget:
            turn = self.prefilling[0]
            part = min(turn.left, budget)
            turn.left, budget, tokens = turn.left - part, budget - part, tokens + part
            context += turn.before + turn.prompt - turn.left
            encoding, turn.encoding = encoding + turn.encoding, 0.0
            if turn.left:
                break
            done.append(self.prefilling.popleft())
        self._advance(1, self.card.step(tokens, context, encoding))
        for turn in done:
            turn.began = self.now
            self.context += turn.before + turn.prompt + 1
            heapq.heappush(self.running, (self.steps + turn.answer - 1, turn.conversation, turn))
        self._advance(0, 0.0)  # answers of one token have ended

    def _advance(self, steps: int, seconds: float) -> None:
        self.now += seconds
        self.steps += steps
        self.context += steps * len(self.running)
        while self.running and self.running[0][0] <= self.steps:
            self._ended(heapq.heappop(self.running)[2])

    def _ended(self, turn: Turn) -> None:
        self.context -= turn.need
        self.used -= turn.need
        if self.traffic.sticky:
            self.kept.put(turn.conversation, turn.need, self.card.room - self.used)
        if self._counts(turn):
            self.seen.first.append(turn.began - turn.at)
            self.seen.took.append(self.now - turn.at)
            if turn.answer > 1:
                self.seen.token.append((self.now - turn.began) / (turn.answer - 1))
        if turn.more:
            at = self.now + float(self.rng.exponential(self.traffic.think))
            prompt, answer = next(self.prompts), next(self.answers)
            if at < self.end and turn.need + prompt + answer <= self.traffic.context:
                new = replace(turn, at=at, prompt=prompt, answer=answer, more=turn.more - 1)
                new.before, new.first = turn.need, False
                heapq.heappush(self.coming, (at, turn.conversation, new))

    def _counts(self, turn: Turn) -> bool:
        return self.warm <= turn.at < self.end


class _Kept:
    """Sizes by conversation, of which the longest unused go where there is no room."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def take(self, key: int) -> int:
        size = self._sizes.pop(key, 0)
        self._total -= size
        return size

    def put(self, key: int, size: int, room: float) -> None:
        if size:
            self._sizes[key] = size
            self._total += size
            self.shrink(room)

    def shrink(self, room: float) -> None:
        while self._total > room:
            self._total -= self._sizes.popitem(last=False)[1]

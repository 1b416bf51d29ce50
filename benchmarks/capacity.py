"""What a service and its data cost, on paper: nothing here runs on a GPU.

``capacity`` (docs/capacity.md explains it) counts the parameters and FLOPs of MiCo-Chat-7B on
torch's meta device, measures on this machine what the service costs beside the GPU, and simulates
the queue of a replica on each card. ``--set peak=3`` changes an assumption. ``data-cost`` takes the
seconds of each stage from the tables of a finished build, and works out those of models on GPUs.
"""

import heapq
import math
import re
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import brentq
from scipy.special import i0e

from benchmarks.harness import Panel, Report
from benchmarks.service import cost
from mico_chat.checkpoints.assemble import read_template
from mico_chat.checkpoints.footprint import LiveMemory, Serving, fake, meta_chat
from mico_chat.checkpoints.load import load_encoder
from mico_chat.encode import DEFAULT_CACHE_BYTES
from mico_chat.errors import ConfigError
from mico_chat.media.file import MediaLimits
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_corpus.looking.summary import CUTTING, summarize
from mico_corpus.places import Place
from mico_training.estimate import GPUS, REACHED

# --- assumptions ----------------------------------------------------------------------------------

BANDWIDTH = {"l4": 0.3e12, "a100-80gb": 2.04e12, "h100-80gb": 3.35e12}
"""Bytes a second of the memory, as the maker states them."""
CPU_PRICE, STORAGE_PRICE = 0.05, 0.023
GPU_PRICES = "l4=0.80,a100-80gb=2.70,h100-80gb=6.90"
"""In US $, of a core and of each GPU for an hour, and of 1 GB for a month: round ones of clouds."""
DAY, HOURS, DAYS = 86_400.0, 730, 365
"""Seconds of a day, hours of a month, days of a year."""
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Given(BaseModel):
    """What is neither counted nor measured here; ``reports.yaml`` says what each means."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    turns: float = Field(2.0, ge=1)
    prompt: Positive = 69.5
    answer: Positive = 214.5
    sigma: Positive = 1.0
    longest: int = Field(1024, ge=1)
    think: Positive = 100.0
    shown: float = Field(1.0, ge=0, le=1)
    peak: float = Field(2.0, ge=1, le=10)
    first: Positive = 1.0
    token: Positive = 0.05
    simulated: int = Field(10_000, ge=100)
    seed: int = Field(0, ge=0)
    bandwidth_share: Share = 0.7
    flops_share: Share = REACHED
    step_tokens: int = Field(512, ge=64)
    users: Positive = 1e6
    answers: Positive = 8.0
    core_share: Share = 0.5
    cpu_price: Positive = CPU_PRICE
    storage_price: Positive = STORAGE_PRICE
    disk_price: Positive = 0.1
    gpu_prices: str = GPU_PRICES

    @classmethod
    def read(cls, pairs: Sequence[str]) -> Self:
        """Those of ``name=value`` texts; a :class:`ConfigError` says what is wrong."""
        given = dict(pair.partition("=")[::2] for pair in pairs)
        try:
            found = cls.model_validate(given)
        except ValidationError as error:
            first, names = error.errors()[0], ", ".join(cls.model_fields)
            name = str(first["loc"][0])
            said = f"--set {name}={given[name]}: {first['msg']}"
            raise ConfigError(f"{said}; write it as name=value, of the names {names}") from error
        if missing := sorted(BANDWIDTH.keys() - prices_of(found.gpu_prices).keys()):
            raise ConfigError(f"gpu_prices={found.gpu_prices}: it lacks {', '.join(missing)}")
        return found


def prices_of(given: str) -> dict[str, float]:
    """The price of each GPU in ``l4=0.8,h100-80gb=6.9``."""
    found = {}
    for one in given.split(","):
        gpu, _, price = one.partition("=")
        found[gpu] = float(price) if re.fullmatch(r"\d+\.?\d*|\.\d+", price) else 0.0
        if gpu not in BANDWIDTH or not found[gpu]:
            names = ", ".join(BANDWIDTH)
            raise ConfigError(f"gpu_prices: {one!r}: write it as l4=0.8, in US $; GPUs: {names}")
    return found


# --- a replica of the service on one GPU, simulated event by event --------------------------------


class Medium(NamedTuple):
    """What one medium of a kind costs: ``tokens`` of context, ``flops``, ``cached`` bytes."""

    tokens: int
    flops: float
    cached: int


class Traffic(Given):
    """Conversations with a service; ``rate``: answers a second, on the mean of the day.

    ``system``: tokens before the first question. Each kind of ``media`` is shown as often.
    ``sticky``: follow-ups meet the replica that answered before. ``cache``: bytes for encoded
    media. Lengths of texts are log-normal.
    """

    peak: float = Field(1.0, ge=1, le=10)
    rate: float
    system: int = 0
    context: int = 4096
    media: tuple[Medium, ...] = ()
    sticky: bool = True
    cache: float = DEFAULT_CACHE_BYTES

    def but(self, **changes: Any) -> Self:
        return self.model_copy(update=changes)

    def lengths(self, rng: np.random.Generator, mean: float, n: int) -> Iterator[int]:
        drawn = rng.lognormal(math.log(mean) - self.sigma**2 / 2, self.sigma, n)
        return iter(np.clip(np.rint(drawn), 1, self.longest).astype(np.int64).tolist())

    def starts(self, rng: np.random.Generator, seconds: float) -> NDArray[np.float64]:
        """When conversations begin, by a Poisson process over the curve of the day."""
        most = self.rate * self.peak / self.turns
        at = np.cumsum(rng.exponential(1 / most, int(most * seconds * 1.2) + 100))
        at = at[at < seconds]
        return at[rng.random(len(at)) * self.peak < day_curve(at / DAY, self.peak)]


def day_curve(part: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """The rate over its mean at a part of the day; the peak is at noon (von Mises' density)."""
    if peak == 1:
        return np.ones_like(part)
    kappa = brentq(lambda k: 1 / i0e(k) - peak, 1e-9, 1e4)  # i0e(k) = I0(k) exp(-k)
    curve: NDArray[np.float64] = np.exp(-kappa * (1 + np.cos(2 * np.pi * part))) * peak
    return curve


@dataclass(slots=True)
class Turn:
    """A question and its answer; sizes are tokens, times are seconds since the start."""

    conversation: int
    at: float
    prompt: int  # new tokens of the prompt, with the medium's
    answer: int
    more: int  # turns after this one
    medium: Medium | None
    before: int = 0  # tokens of the conversation so far
    followup: bool = False
    computed: int = 0  # prompt tokens that are not there already
    encoded: float = 0.0  # FLOPs of its medium
    kept: bool = False  # the conversation was still there
    again: bool = False  # the encoded medium was still there
    left: int = 0  # prompt tokens still to compute
    encoding: float = 0.0  # FLOPs still to compute
    first: float = 0.0  # seconds to the first token
    took: float = 0.0  # seconds to the end
    token: float = math.nan  # mean seconds between the answer's tokens, if there are two

    @property
    def need(self) -> int:
        return self.before + self.prompt + self.answer


@dataclass
class Run:
    """The turns that came after the warm-up; ``running``: answers that are written, on the mean."""

    turns: list[Turn]
    running: float = 0.0
    busy: float = 0.0  # share of the time

    def of(self, name: str) -> NDArray[Any]:
        """An attribute of all turns."""
        return np.array([getattr(turn, name) for turn in self.turns])

    def p99(self) -> tuple[float, float]:
        """Seconds to the first token, and between tokens, of 99 of 100."""
        first, token = np.nanquantile([self.of("first"), self.of("token")], 0.99, axis=1)
        return float(first), float(token)

    def keeps(self, given: Given) -> bool:
        first, token = self.p99()
        return first <= given.first and token <= given.token

    def share(self, part: str, shown: bool = False) -> str:
        """Of the follow-ups, or of those in conversations with a medium."""
        found = [getattr(t, part) for t in self.turns if t.followup and (t.medium or not shown)]
        return f"{sum(found) / len(found):.0%}" if found else "none"


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
            b = first - longer / 2
            more = b * b + 2 * longer * seconds
            root = (math.sqrt(more) - b) / longer if longer else seconds / first
            count = min(max(math.ceil(root), 1), most)
        return count, count * first + longer * count * (count - 1) / 2


class Kept:
    """Sizes by conversation, of which the longest unused go where there is no room."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self.total = 0

    def take(self, key: int) -> int:
        size = self._sizes.pop(key, 0)
        self.total -= size
        return size

    def put(self, key: int, size: int, room: float) -> None:
        if size:
            self._sizes[key] = size
            self.total += size
            self.shrink(room)

    def shrink(self, room: float) -> None:
        while self.total > room:
            self.total -= self._sizes.popitem(last=False)[1]


class Simulation:
    """A replica on one card, event by event.

    The language model computes in steps, as vLLM does: each step gives a token to every running
    answer and takes some tokens of new prompts along. Turns wait, first come first served, for room
    among the keys and values. What an ended answer leaves there stays for the conversation's next
    turn until its room is needed. Conversations begin in ``seconds``, of which a tenth, at most an
    hour, is warm-up.
    """

    def __init__(self, card: Card, traffic: Traffic, seconds: float, seed: int = 0) -> None:
        if card.room < traffic.context:
            raise ConfigError(
                f"the card has room for {card.room:,.0f} tokens, but a conversation may have "
                f"{traffic.context:,}; take a larger card, smaller weights or shorter conversations"
            )
        self.card, self.traffic, self.end = card, traffic, seconds
        self.warm = min(seconds / 10, 3600)
        self.rng = rng = np.random.default_rng(seed)
        starts = traffic.starts(rng, seconds)
        turns = rng.geometric(1 / traffic.turns, len(starts))
        total = int(turns.sum())
        self.prompts = traffic.lengths(rng, traffic.prompt, total)
        self.answers = traffic.lengths(rng, traffic.answer, total)
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
        self.kept = Kept()  # tokens of ended answers
        self.encoded = Kept()  # bytes of media
        self.seen = Run([])

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
                self.advance(*self.card.steps_until(n, self.context, gap, most))
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
            self.prefilling.append(self.waiting.popleft())
            self.used += turn.need
            self.kept.shrink(self.card.room - self.used)
            turn.left = turn.computed = turn.before + turn.prompt - own
            turn.kept = own > 0
            if turn.medium is not None:
                turn.again = self.encoded.take(turn.conversation) > 0
                turn.encoding = turn.encoded = 0.0 if turn.again else turn.medium.flops
                if self.traffic.sticky:
                    self.encoded.put(turn.conversation, turn.medium.cached, self.traffic.cache)

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
        self.advance(1, self.card.step(tokens, context, encoding))
        for turn in done:
            turn.first = self.now - turn.at
            self.context += turn.before + turn.prompt + 1
            heapq.heappush(self.running, (self.steps + turn.answer - 1, turn.conversation, turn))
        self.advance(0, 0.0)  # answers of one token have ended

    def advance(self, steps: int, seconds: float) -> None:
        self.now += seconds
        self.steps += steps
        self.context += steps * len(self.running)
        while self.running and self.running[0][0] <= self.steps:
            self._ended(heapq.heappop(self.running)[2])

    def _ended(self, turn: Turn) -> None:
        turn.took = self.now - turn.at
        if turn.answer > 1:
            turn.token = (turn.took - turn.first) / (turn.answer - 1)
        self.context -= turn.need
        self.used -= turn.need
        if self.traffic.sticky:
            self.kept.put(turn.conversation, turn.need, self.card.room - self.used)
        if self.warm <= turn.at < self.end:
            self.seen.turns.append(turn)
        if turn.more:
            at = self.now + float(self.rng.exponential(self.traffic.think))
            prompt, answer = next(self.prompts), next(self.answers)
            if at < self.end and turn.need + prompt + answer <= self.traffic.context:
                new = Turn(turn.conversation, at, prompt, answer, turn.more - 1, turn.medium)
                new.before, new.followup = turn.need, True
                heapq.heappush(self.coming, (at, turn.conversation, new))


def run_at(card: Card, traffic: Traffic, rate: float, seed: int, answers: int) -> Run:
    """So many answers or more at a steady rate, and 36 times as long as a user thinks: an hour."""
    seconds = max(answers / rate, 36 * traffic.think)
    return Simulation(card, traffic.but(rate=rate, peak=1.0), seconds, seed).run()


def fluid_rate(card: Card, run: Run, limit: float) -> float:
    """Answers a second that no queue could exceed: a full batch at every moment, no chance.

    With n answers of A tokens at once and P tokens computed for a prompt, a token takes at least
    the time to read the weights and their contexts, and to make the products of 1 + P / A tokens.
    ``limit``: the most seconds that it may take.
    """
    answers, held = run.of("answer"), run.of("need")
    a, p, e = answers.mean(), run.of("computed").mean(), run.of("encoded").mean()
    context = float((answers * (held - answers / 2)).sum() / answers.sum())
    room = min(card.most, int(card.room / ((answers * held).sum() / answers.sum())))
    best = 0.0
    for n in range(1, room + 1):
        token = card.step(n, n * context)
        token = max(token, n * (1 + p / a) * card.per_token / card.flops) + n * e / a / card.flops
        if token <= limit:
            best = max(best, float(n / (a * token)))
    return best


def largest_rate(card: Card, traffic: Traffic) -> tuple[float, float]:
    """The most answers a second within the limits, at a steady rate, and the fluid bound."""
    answers, seed = traffic.simulated, traffic.seed
    bound = fluid_rate(card, run_at(card, traffic, answers / 1e6, seed, answers), traffic.token)
    low, high = 0.0, bound
    while high - low > bound / 100:
        rate = (low + high) / 2
        kept = run_at(card, traffic, rate, seed, answers).keeps(traffic)
        low, high = (rate, high) if kept else (low, rate)
    return low, bound


def checks(seconds: float = 300_000.0, seed: int = 0) -> Iterator[tuple[str, str, float, float]]:
    """Queues whose answer is known: the queue, the quantity, as simulated, by the formula.

    A step takes 10 ms whoever is in it. With one answer at a time the replica is a queue with one
    server, M/D/1 for answers of one length and M/G/1 for others; with room for all it is M/G/inf.
    """
    step, n = 0.01, 100
    card = Card(bandwidth=1e12, flops=1e15, weights=step * 1e12, per_token=1e9, kv=0.0)
    for name, sigma, load in (("M/D/1", 1e-9, 0.5), ("M/D/1", 1e-9, 0.8), ("M/G/1", 0.5, 0.7)):
        traffic = Traffic(rate=load / (n * step), turns=1.0, answer=n, sigma=sigma)
        run = Simulation(replace(card, most=1), traffic, seconds, seed).run()
        service, rate = run.of("answer") * step, traffic.rate
        # Pollaczek and Khinchine: E[wait] = rate E[S^2] / (2 (1 - rate E[S]))
        known = rate * (service**2).mean() / (2 * (1 - rate * service.mean()))
        what = f"mean wait at a load of {load:g}, s"
        yield name, what, float(run.of("first").mean()) - step, float(known)
    traffic = Traffic(rate=5.0, answer=2 * n)
    run = Simulation(replace(card, most=10_000), traffic, seconds / 30, seed).run()
    # The first token is the prompt's.
    known = traffic.rate * (float(run.of("answer").mean()) - 1) * step
    yield "M/G/inf", "answers at once", run.running, known


# --- the model on each card -----------------------------------------------------------------------

MODEL = "mico-g-vicuna-7b"
CARDS = (("l4", 16), ("l4", 8), ("a100-80gb", 16), ("h100-80gb", 16), ("h100-80gb", 8))
"""Cards, and bits of the language model's weights; 8 are vLLM's ``--quantization fp8``."""
USED, CONTEXT = 0.92, 0.6e9
"""The share of a card's memory that is used (docs/serving.md), and the bytes of CUDA's context
(``mico_training.estimate``)."""
VLLM_TOKENS = 2048
"""Tokens of a step, if vLLM is not told another number (its DEFAULT_MAX_NUM_BATCHED_TOKENS)."""
LARGE_CACHE = 4 << 30
SPARE, LEAST, COPIES = 1, 3, 2
"""Replicas more than needed, so that one may fail; the fewest; copies of the database."""
SOUND: dict[Kind, int] = {"audio": Preprocessing().max_slices}
PARTS: dict[Kind, dict[Kind, int]] = {
    "image": {"image": 1},
    "audio": SOUND,
    "video": {"video": MediaLimits().max_frames, **SOUND},
}
"""The stills, frames and slices that a medium is encoded as; a clip has its sound track."""


def counted(tokenizer: Any) -> tuple[Serving, dict[Kind, Medium], int]:
    """The model's sizes on torch's meta device, each medium's, and tokens before a question."""
    config = MicoChatConfig.named(MODEL)
    serving = Serving.of(meta_chat(config), torch.bfloat16)
    chat: Any = meta_chat(config)
    chat.eval()
    fake(chat)
    side, media = config.encoder_config.image_size, {}
    for kind, parts in PARTS.items():
        flops = tokens = 0
        for part, units in parts.items():
            with torch.no_grad(), LiveMemory() as live:
                kinds, counts = torch.tensor([KINDS.index(part)]), torch.tensor([units])
                chat.context_tokens(kinds, counts, torch.empty(units, 3, side, side))
            flops += live.flops
            tokens += config.context_length(part, units)
        media[kind] = Medium(tokens, flops, tokens * config.llm_width * 4)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        chat_template=read_template("vicuna_v1.1"),
        add_generation_prompt=True,
        tokenize=False,
    )
    return serving, media, len(tokenizer(written).input_ids)


def load_of(given: Given, costs: cost.Costs) -> Any:
    """What a day brings beside the replicas; ``database``, ``objects``: US $ a month in a year."""
    load, media, turn = SimpleNamespace(), costs.media.values(), costs.turn
    load.daily = given.users * given.answers
    load.peak = load.daily / DAY * given.peak
    new = mean(one.decode + one.prepare + one.read for one in media)
    load.cpu = costs.answer + new * given.shown / given.turns
    load.cores = COPIES * load.peak * turn.seconds / given.core_share
    disk = COPIES * load.daily * DAYS * turn.bytes / 1e9 * given.disk_price
    load.database = load.cores * given.cpu_price * HOURS + disk
    load.uploads = load.daily / given.turns * given.shown * mean(one.bytes for one in media)
    load.objects = load.uploads * DAYS / 1e9 * given.storage_price
    return load


def card_of(gpu: str, bits: int, serving: Serving, given: Given) -> Card:
    flops, gigabytes = GPUS[gpu]
    token_table = serving.table.numel()
    size = serving.llm["bfloat16" if bits == 16 else "int8"]
    return Card(
        bandwidth=BANDWIDTH[gpu] * given.bandwidth_share,
        flops=flops * given.flops_share,
        weights=size - 2 * token_table,
        per_token=2 * (serving.llm_parameters - token_table),
        kv=serving.kv_per_token,
        room=(USED * gigabytes * 1e9 - size - serving.beside - CONTEXT) // serving.kv_per_token,
        budget=given.step_tokens,
    )


def replica_of(card: Card, price: float, traffic: Traffic, given: Given, load: Any) -> Any:
    """What simulations find of a card, for the report; rates are answers a second."""
    rate, bound = largest_rate(card, traffic)
    # A card that keeps no limit is shown with one answer now and then.
    steady = traffic.but(rate=max(rate, 0.01))

    def again(traffic: Traffic) -> Run:
        """At the largest rate, with other draws."""
        return run_at(card, traffic, steady.rate, given.seed + 1, given.simulated)

    run = again(steady)
    one = SimpleNamespace(card=card, price=price, rate=rate, p99=run.p99(), curves=[])
    if not rate:
        return one
    day = steady.but(rate=rate / given.peak, peak=given.peak)
    one.run, one.large, one.bound = run, again(steady.but(cache=LARGE_CACHE)), bound
    one.day = Simulation(card, day, DAY, given.seed + 1).run()
    one.alone = largest_rate(card, traffic.but(sticky=False))[0]
    one.default = largest_rate(replace(card, budget=VLLM_TOKENS), traffic)[0]
    one.tokens = rate * run.of("answer").mean()
    one.talk = (run.of("took").mean() + given.think * (1 - 1 / given.turns)) * rate
    one.followups = run.of("followup").mean()
    one.busy = math.ceil(load.peak / rate)
    one.n = max(one.busy + SPARE, LEAST)
    one.cores = load.peak * load.cpu / given.core_share + one.n  # vLLM's own loop takes one
    one.month = (one.n * price + one.cores * given.cpu_price) * HOURS
    one.whole = one.month + load.database + load.objects
    one.million = one.whole / (load.daily * HOURS / 24 / 1e6)
    rates = (rate * np.linspace(0.1, 1.15, 8)).tolist()
    runs = [run_at(card, steady, at, given.seed, 6000).p99() for at in rates]
    one.curves = [(rates, seconds) for seconds in zip(*runs, strict=True)]
    return one


def measure(
    database_url: Annotated[str | None, "an empty PostgreSQL database; otherwise SQLite"] = None,
    set_: Annotated[list[str] | None, "assumptions: name=value"] = None,
) -> Report:
    given = Given.read(set_ or [])
    _, processor = load_encoder()
    serving, media, system = counted(processor.tokenizer)
    costs = cost.measured(processor, database_url, given.prompt, given.answer)
    draws = {**given.model_dump(), "peak": 1.0, "rate": 1.0, "system": system}
    traffic, load = Traffic(**draws, media=tuple(media.values())), load_of(given, costs)
    prices, replicas = prices_of(given.gpu_prices), {}
    for gpu, bits in CARDS:
        card = card_of(gpu, bits, serving, given)
        replicas[f"{gpu}, {bits} bit"] = replica_of(card, prices[gpu], traffic, given, load)
    limits = {"first token": given.first, "between tokens": given.token}
    panels = []
    for at, (what, limit) in enumerate(limits.items()):
        drawn = {name: one.curves[at] for name, one in replicas.items() if one.curves}
        y = f"{what}, s, 99 of 100"
        panels.append(Panel("answers/s of a replica", y, drawn, log="xy", level=limit))
    values = {"given": given, "serving": serving, "media": media, "parts": PARTS, "system": system}
    values |= {"costs": costs, "pace": cost.PACE, "at_once": cost.AT_ONCE, "copies": COPIES}
    values |= {"cache": DEFAULT_CACHE_BYTES, "large": LARGE_CACHE, "load": load}
    values |= {"replicas": replicas, "checks": list(checks(seed=given.seed))}
    return Report(values, plots={"capacity": panels})


# --- the data of a large run ----------------------------------------------------------------------

CLIP_SECONDS = 13.4
"""The mean clip of HD-VILA-100M, from which VAST-27M was taken (371,500 hours, 100 M clips)."""
PER_SECOND = (CUTTING, "speech", "pack")
"""Stages whose time grows with a clip's length; the others take a fixed number of frames."""
AT_ONCE = 64
"""Clips that a language model writes about at once: they share one reading of the weights."""
MODELS = {
    "caption, 8 frames: Qwen3-VL-8B": (8.2e9, 8.2e9, 8 * 256 + 40, 60),
    "caption, sound: Qwen3-Omni-30B-A3B": (3.3e9, 30e9, 13 * 14 + 40, 60),
    "fuse: Qwen3-8B": (8.2e9, 8.2e9, 400, 60),
    "depth, 518 x 518: Depth Anything V2 small": (25e6, 0, 37 * 37, 0),
    "safety, 4 frames: ViT-B/16": (86e6, 0, 4 * 197, 0),
}
"""Those of ``training/recipes/data-vast.yaml``: the parameters that one token meets, those that a
step reads with many clips at once, and for a clip the tokens that go in and those that come out."""


def on_gpu(gpu: str, active: float, read: float, seen: int, written: int) -> float:
    """Seconds of one clip: its tokens at 40 % of the FLOP/s, and its share of steps' reading."""
    prompt = 2 * active * seen / (REACHED * GPUS[gpu][0])
    return prompt + written * 2 * read / (BANDWIDTH[gpu] * AT_ONCE)


def data_cost(
    shards: str,
    clips: int = 27_000_000,
    cpu_price: Annotated[float, "of one core for an hour, in US $"] = CPU_PRICE,
    gpu_prices: Annotated[str, "of one GPU for an hour: l4=0.8,..."] = GPU_PRICES,
    storage_price: Annotated[float, "of 1 GB for a month, in US $"] = STORAGE_PRICE,
    days: float = 7.0,
) -> Report:
    summary = summarize(Place(shards))
    kept = sum(amount.count for amount in summary.written.values())
    length = sum(amount.seconds for amount in summary.written.values()) / kept
    watched = sum(amount.seconds for amount in summary.files.values())
    stages = {}  # seconds of one core for a clip of CLIP_SECONDS
    for name, took in summary.stages.items():
        longer = CLIP_SECONDS / length if name in PER_SECOND else 1.0
        clip = watched / CLIP_SECONDS if name == CUTTING else took.count / longer
        stages[name] = took.seconds / clip
    apart = {name: stages.pop(name) for name in ("caption", "tags", "depth") if name in stages}
    gpus = {
        gpu: (price, {name: on_gpu(gpu, *sizes) for name, sizes in MODELS.items()})
        for gpu, price in prices_of(gpu_prices).items()
    }
    stored = sum(path.stat().st_size for path in Path(shards).glob("*.tar")) / kept
    whole = stored * clips * CLIP_SECONDS / length
    values = {"apart": apart, "stages": stages, "gpus": gpus, "stored": stored, "length": length}
    values |= {"whole": whole, "sources": summary.sources, "kept": kept, "clip_s": CLIP_SECONDS}
    return Report({**values, "reached": REACHED, "at_once": AT_ONCE})

"""The replicas that a service of MiCo-Chat-7B needs, and what stands beside them."""

import asyncio
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from benchmarks.assumptions import Assumptions
from benchmarks.data_cost import BANDWIDTH, prices_of
from benchmarks.model_size import Model
from benchmarks.queueing import largest_rate, run_at
from benchmarks.replica import Card, Run, simulate
from benchmarks.service_cost import (
    MediumCost,
    TurnCost,
    answer_cost,
    medium_cost,
    real_media,
    turn_cost,
)
from benchmarks.traffic import DAY, Traffic
from mico_chat.checkpoints.load import load_encoder
from mico_chat.media.kinds import Kind
from mico_chat.reading import installed_reader
from mico_training.estimate import GPUS

MODEL = "mico-g-vicuna-7b"
CARDS = (("l4", 16), ("l4", 8), ("a100-80gb", 16), ("h100-80gb", 16), ("h100-80gb", 8))
"""Cards, and bits of the language model's weights; 8 are vLLM's ``--quantization fp8``."""
USED, CONTEXT = 0.92, 0.6e9
"""The share of a card's memory that is used (docs/serving.md), and the bytes of CUDA's context
(``mico_training.estimate``)."""
VLLM_TOKENS = 2048
"""Tokens of a step, if vLLM is not told another number (its DEFAULT_MAX_NUM_BATCHED_TOKENS)."""
LARGE_CACHE = 4 << 30
HOURS, DAYS = 730, 365
"""Of a month, of a year."""
SPARE, LEAST = 1, 3
"""Replicas more than needed, so that one may fail; and the fewest."""
COPIES = 2
"""Of the database: one that writes and one that can take over."""


@dataclass(frozen=True)
class Replica:
    """A card with the model, and what its simulations found; rates are answers a second."""

    gpu: str
    bits: int
    price: float
    card: Card
    traffic: Traffic  # its rate is the largest
    rate: float  # the largest within the limits
    bound: float
    alone: float  # if follow-ups meet any replica
    default: float  # with vLLM's own number of tokens a step
    run: Run  # at the largest rate, other draws
    large: Run  # the same with a large cache for media
    day: Run  # a day whose peak is that rate

    @property
    def name(self) -> str:
        return f"{self.gpu}, {self.bits} bit"

    @property
    def seconds(self) -> float:
        """From a question to the end of its answer, on the mean."""
        return mean(self.run.took)

    @property
    def tokens(self) -> float:
        """Written a second, of all answers."""
        return self.rate * mean(self.run.answers)


def card_of(gpu: str, bits: int, model: Model, given: Assumptions) -> Card:
    serving = model.serving
    flops, gigabytes = GPUS[gpu]
    token_table = serving.table.numel()
    size = serving.llm["bfloat16" if bits == 16 else "int8"]
    free = USED * gigabytes * 1e9 - size - serving.beside - CONTEXT
    return Card(
        bandwidth=BANDWIDTH[gpu] * given.bandwidth_share,
        flops=flops * given.flops_share,
        weights=size - 2 * token_table,
        per_token=2 * (serving.llm_parameters - token_table),
        kv=serving.kv_per_token,
        room=free // serving.kv_per_token,
        budget=given.step_tokens,
    )


def replica_of(gpu: str, bits: int, model: Model, given: Assumptions) -> Replica:
    card = card_of(gpu, bits, model, given)
    traffic = given.traffic(1.0, list(model.media.values()), model.system)

    def largest(card: Card, sticky: bool = True) -> tuple[float, float]:
        asked = replace(traffic, sticky=sticky)
        return largest_rate(card, asked, given.limits, answers=given.simulated, seed=given.seed)

    rate, bound = largest(card)
    others = largest(card, sticky=False)[0], largest(replace(card, budget=VLLM_TOKENS))[0]
    # A card that keeps no limit is shown with one answer now and then.
    steady = replace(traffic, rate=max(rate, 0.01))
    large, seed = replace(steady, cache=LARGE_CACHE), given.seed + 1
    runs = (
        run_at(card, steady, steady.rate, seed, given.simulated),
        run_at(card, large, steady.rate, seed, given.simulated),
        simulate(card, given.over_the_day(steady), DAY, seed),
    )
    return Replica(
        gpu, bits, prices_of(given.gpu_prices)[gpu], card, steady, rate, bound, *others, *runs
    )


@dataclass(frozen=True)
class Capacity:
    """All that was counted, measured and simulated."""

    given: Assumptions
    model: Model
    answer: float  # seconds of a core
    media: dict[Kind, MediumCost]
    turn: TurnCost
    replicas: Sequence[Replica]

    @property
    def daily(self) -> float:
        return self.given.users * self.given.answers

    @property
    def peak(self) -> float:
        """Answers a second in the day's largest hour."""
        return self.daily / DAY * self.given.peak

    @property
    def cpu(self) -> float:
        """Seconds of a core for an answer: the service's, and its share of a new medium."""
        media = mean(one.decode + one.prepare + one.read for one in self.media.values())
        return self.answer + media * self.given.shown / self.given.turns

    @property
    def database(self) -> tuple[float, float]:
        """Cores of the database, and US $ a month after a year."""
        cores = COPIES * self.peak * self.turn.seconds / self.given.core_share
        disk = COPIES * self.daily * DAYS * self.turn.bytes / 1e9 * self.given.disk_price
        return cores, cores * self.given.cpu_price * HOURS + disk

    @property
    def uploads(self) -> float:
        """Bytes of a day's media."""
        size = mean(one.bytes for one in self.media.values())
        return self.daily / self.given.turns * self.given.shown * size

    @property
    def objects(self) -> float:
        """US $ a month after a year."""
        return self.uploads * DAYS / 1e9 * self.given.storage_price

    def needed(self, replica: Replica) -> tuple[int, int, float, float]:
        """Replicas at the peak and with spare ones, cores, and US $ a month for GPUs and cores."""
        busy = math.ceil(self.peak / replica.rate)
        n = max(busy + SPARE, LEAST)
        cores = self.peak * self.cpu / self.given.core_share + n  # vLLM's own loop takes one
        price = n * replica.price + cores * self.given.cpu_price
        return busy, n, cores, price * HOURS


def measured(database_url: str | None, given: Assumptions) -> Capacity:
    """Count, measure, simulate."""
    _, processor = load_encoder()
    tokenizer = processor.tokenizer
    model = Model.counted(MODEL, tokenizer)
    ids = tokenizer((Path(__file__).parent / "README.md").read_text()).input_ids
    question, said = (tokenizer.decode(ids[: round(n)]) for n in (given.prompt, given.answer))
    reader = installed_reader()
    costs = {
        kind: medium_cost(kind, path, processor, reader) for kind, path in real_media().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        turn = asyncio.run(turn_cost(database_url, Path(folder), question, said))
    answer = answer_cost(round(given.answer), question)
    replicas = [replica_of(gpu, bits, model, given) for gpu, bits in CARDS]
    return Capacity(given, model, answer, costs, turn, replicas)

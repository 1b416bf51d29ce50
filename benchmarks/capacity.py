"""What MiCo-Chat-7B costs to serve, on paper; docs/capacity.md explains.

Nothing here runs on a GPU. It counts the model's parameters and FLOPs on torch's meta device,
measures on this machine what the service costs beside the GPU, and simulates the queue of a replica
on each card. ``--set peak=3`` changes an assumption.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError

from benchmarks.harness import Panel, Report
from benchmarks.replica import (
    DAY,
    Card,
    Conversations,
    Medium,
    Positive,
    Run,
    Share,
    Simulation,
    Traffic,
    checks,
    largest_rate,
    run_at,
)
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
from mico_training.estimate import GPUS, REACHED

# --- assumptions ----------------------------------------------------------------------------------

BANDWIDTH = {"l4": 0.3e12, "a100-80gb": 2.04e12, "h100-80gb": 3.35e12}
"""Bytes a second of the memory, as the maker states them."""
CPU_PRICE, STORAGE_PRICE = 0.05, 0.023
GPU_PRICES = "l4=0.80,a100-80gb=2.70,h100-80gb=6.90"
"""In US $, of a core and of each GPU for an hour, and of 1 GB for a month: round ones of clouds."""
HOURS, DAYS = 730, 365
"""Of a month, of a year."""


class Given(Conversations):
    """What is neither counted nor measured here; ``reports.yaml`` says where a value comes from."""

    peak: float = Field(2.0, ge=1, le=10)
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
        given = {}
        for pair in pairs:
            name, equals, given[name] = pair.partition("=")
            if not equals:
                raise ConfigError(f"--set {pair}: write it as name=value, for example peak=3")
            if name not in cls.model_fields:
                names = ", ".join(cls.model_fields)
                raise ConfigError(f"--set {name}: no such assumption; they are {names}")
        try:
            found = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise ConfigError(f"--set {name}={given[name]}: {first['msg']}") from error
        if missing := sorted(BANDWIDTH.keys() - prices_of(found.gpu_prices).keys()):
            raise ConfigError(f"gpu_prices={found.gpu_prices}: it lacks {', '.join(missing)}")
        return found


def prices_of(text: str) -> dict[str, float]:
    """The price of each GPU in ``l4=0.8,h100-80gb=6.9``."""
    found = {}
    for one in text.split(","):
        gpu, _, price = one.partition("=")
        if gpu not in BANDWIDTH:
            raise ConfigError(f"gpu_prices: {gpu!r} is none of the GPUs {', '.join(BANDWIDTH)}")
        try:
            found[gpu] = float(price)
        except ValueError:
            found[gpu] = 0.0
        if not 0 < found[gpu] < math.inf:
            raise ConfigError(f"gpu_prices: {one!r}: write it as {gpu}=0.8, in US $")
    return found


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


def replica_of(gpu: str, bits: int, serving: Serving, traffic: Traffic, given: Given) -> Any:
    """What simulations find of a card; rates are answers a second."""
    card, price = card_of(gpu, bits, serving, given), prices_of(given.gpu_prices)[gpu]
    rate, bound = largest_rate(card, traffic)
    # A card that keeps no limit is shown with one answer now and then.
    steady = traffic.but(rate=max(rate, 0.01))

    def again(traffic: Traffic) -> Run:
        """At the largest rate, with other draws."""
        return run_at(card, traffic, steady.rate, given.seed + 1, given.simulated)

    run, day = again(steady), steady.but(rate=steady.rate / given.peak, peak=given.peak)
    return SimpleNamespace(
        name=f"{gpu}, {bits} bit",
        price=price,
        card=card,
        traffic=steady,
        rate=rate,
        bound=bound,
        alone=largest_rate(card, traffic.but(sticky=False))[0],
        default=largest_rate(replace(card, budget=VLLM_TOKENS), traffic)[0],
        run=run,
        large=again(steady.but(cache=LARGE_CACHE)),
        day=Simulation(card, day, DAY, given.seed + 1).run(),
    )


def load_of(given: Given, costs: cost.Costs) -> Any:
    """What a day brings beside the replicas; ``database`` and ``objects``: US $ a month, after a
    year."""
    daily = given.users * given.answers
    peak = daily / DAY * given.peak
    media, turn = costs.media.values(), costs.turn
    new = mean(one.decode + one.prepare + one.read for one in media)
    cores = COPIES * peak * turn.seconds / given.core_share
    disk = COPIES * daily * DAYS * turn.bytes / 1e9 * given.disk_price
    uploads = daily / given.turns * given.shown * mean(one.bytes for one in media)
    return SimpleNamespace(
        daily=daily,
        peak=peak,
        cpu=costs.answer + new * given.shown / given.turns,
        cores=cores,
        database=cores * given.cpu_price * HOURS + disk,
        uploads=uploads,
        objects=uploads * DAYS / 1e9 * given.storage_price,
    )


def rows_of(one: Any, given: Given, load: Any) -> dict[str, list[str]]:
    """The rows of a card in the tables of the report."""
    card, run, day, tokens = one.card, one.run, one.day, one.rate * one.run.of("answer").mean()
    first, token = run.p99()
    row = [one.name, f"{card.room:,.0f}", f"{1 / card.step(1, 0):.0f}"]
    limited = [f"{first:.2f}", f"{1e3 * token:.1f}"]
    if not one.rate:
        return {"bearing": [*row, "none: beyond the limits", *[""] * 6, *limited]}
    talk = (run.of("took").mean() + given.think * (1 - 1 / given.turns)) * one.rate
    row += [f"{one.rate:.2f}", f"{one.rate / one.bound:.2f}", f"{one.default:.2f}"]
    row += [f"{tokens:,.0f}", f"{run.running:.0f}", f"{talk:,.0f}"]
    row.append(f"{one.rate / given.peak * 86_400 / given.answers:,.0f}")
    full = 1e6 / one.rate / 3600 * one.price
    money = [f"{one.price:g}", f"{full:,.0f}", f"{full * given.peak:,.0f}"]
    followups = f"{run.of('followup').mean():.0%}"
    shown = [r.share("again", shown=True) for r in (run, one.large)]
    latest, pause = day.p99()
    busy = math.ceil(load.peak / one.rate)
    n = max(busy + SPARE, LEAST)
    cores = load.peak * load.cpu / given.core_share + n  # vLLM's own loop takes one
    price = (n * one.price + cores * given.cpu_price) * HOURS
    whole = price + load.database + load.objects
    million = whole / (load.daily * HOURS / 24 / 1e6)
    return {
        "bearing": [*row, *limited],
        "money": [one.name, *money, f"{1e6 / tokens / 3600 * one.price:.2f}"],
        "again": [one.name, followups, run.share("kept"), *shown, f"{one.alone:.2f}"],
        "days": [
            *(one.name, f"{len(day.turns):,}", f"{day.busy:.0%}", f"{day.running:.0f}"),
            *(f"{latest:.2f}", f"{1e3 * pause:.1f}", day.share("kept")),
        ],
        "needed": [
            *(one.name, f"{busy}", f"{n}", f"{cores:,.0f}"),
            *(f"{amount:,.0f}" for amount in (price, whole, million)),
        ],
    }


def measure(
    database_url: Annotated[str | None, "an empty PostgreSQL database; otherwise SQLite"] = None,
    set_: Annotated[list[str] | None, "assumptions: name=value"] = None,
) -> Report:
    given = Given.read(set_ or [])
    _, processor = load_encoder()
    serving, media, system = counted(processor.tokenizer)
    costs = cost.measured(processor, database_url, given.prompt, given.answer)
    shared = given.model_dump(include=set(Conversations.model_fields)) | {"peak": 1.0}
    traffic = Traffic(**shared, rate=1.0, system=system, media=tuple(media.values()))
    load, replicas = load_of(given, costs), [replica_of(*c, serving, traffic, given) for c in CARDS]
    tables: dict[str, list[list[str]]] = defaultdict(list)
    curves: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for one in replicas:
        for name, row in rows_of(one, given, load).items():
            tables[name].append(row)
        flops = [*(m.flops for m in media.values()), 100 * one.card.per_token]
        tables["encoding"].append([one.name, *(f"{1e3 * f / one.card.flops:.1f}" for f in flops)])
        if one.rate:
            rates = (one.rate * np.linspace(0.1, 1.15, 8)).tolist()
            runs = [run_at(one.card, one.traffic, rate, given.seed, 6000).p99() for rate in rates]
            for drawn, seconds in zip(curves, zip(*runs, strict=True), strict=True):
                drawn[one.name] = rates, seconds
    panels = [
        Panel("answers/s of a replica", f"{what}, s, 99 of 100", drawn, log="xy", level=limit)
        for drawn, limit, what in zip(
            curves, (given.first, given.token), ("first token", "between tokens"), strict=True
        )
    ]
    queue = [
        [name, what, f"{simulated:.3f}", f"{known:.3f}", f"{simulated / known - 1:+.1%}"]
        for name, what, simulated, known in checks(seed=given.seed)
    ]
    values = {"given": given, "serving": serving, "media": media, "parts": PARTS, "system": system}
    values |= {"costs": costs, "pace": cost.PACE, "at_once": cost.AT_ONCE, "checks": queue}
    values |= {"on_card": [f"{kind}, ms" for kind in media], "load": load, "copies": COPIES}
    values |= {"cache": DEFAULT_CACHE_BYTES, "large": LARGE_CACHE}
    return Report({**values, **tables}, plots={"capacity": panels})

"""Users of ``mico-chat serve``: 1 to 64 at once, and some for an hour.

Each user asks, reads the answer, thinks, and asks again. Answers are kept in the service's database
as usual.
"""

import asyncio
import math
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Self

import numpy as np

from benchmarks.engines.overhead import Asked, OverHttp, question
from benchmarks.harness import Panel, Ratio, Report
from benchmarks.http_client import address_of
from benchmarks.media import noisy_picture
from benchmarks.processes import family, memory, service

AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
SAMPLE_S = 5.0
WARM = 0.1
"""The first part of the time, in which caches fill; it does not count for the line."""
CACHE_BYTES = 1 << 24
"""Of encoded media: some 100 pictures, which are shown in that part. The default is full after
1,600, and memory rises until then."""
MEMORY = "memory, MB"
"""Anonymous memory and swap: files that are mapped come and go with what else the machine does."""
MAY_RISE = {MEMORY: 0.05, "p50, s": 0.1, "p95, s": 0.1}
"""The part of its mean by which each may rise from the line's beginning to its end."""


@dataclass(kw_only=True)
class Seen:
    """What was seen of a service for some time; all times are seconds since the start."""

    seconds: float
    answers: list[tuple[float, float, float, int]] = field(default_factory=list)
    """When each answer ended, its first text, its length in seconds, and its tokens."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Bytes of the service's processes, over the time."""
    began: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        return time.perf_counter() - self.began

    async def watch(self) -> None:
        fields = ["RssAnon", "VmSwap"]
        while True:
            used = sum(memory(fields, one.pid) for one in family([os.getpid()]))
            self.memory.append((self.now(), used - memory(fields)))
            await asyncio.sleep(min(SAMPLE_S, self.seconds / 20))


@dataclass(kw_only=True)
class Users(Seen):
    """Users of a service."""

    client: OverHttp
    n: int
    think_s: float
    pictures: float
    n_tokens: int
    leaving: float = 0.0
    left: int = 0

    def run(self) -> Self:
        asyncio.run(self._run())
        return self

    async def _run(self) -> None:
        self.began = time.perf_counter()
        pool = [noisy_picture(seed) for seed in range(8)]
        watching = asyncio.create_task(self.watch())
        await asyncio.gather(*(self._user(number, pool) for number in range(self.n)))
        watching.cancel()

    async def _user(self, number: int, pool: Sequence[bytes]) -> None:
        rng = random.Random(number)
        usual = 1.0
        while self.now() < self.seconds:
            shown = None
            if rng.random() < self.pictures:  # bytes behind a JPEG's end make it a new one
                shown = rng.choice(pool) + rng.randbytes(8)
            asked = Asked(question(rng), shown, self.n_tokens)
            leaves = rng.random() < self.leaving
            began = self.now()
            with suppress(TimeoutError):
                async with asyncio.timeout(usual / 2 if leaves else None):
                    first, tokens = await self.client.ask(asked)
                    usual = self.now() - began
                    self.answers.append((self.now(), first, usual, tokens))
                    leaves = False
            self.left += leaves
            await asyncio.sleep(rng.uniform(0.5, 1.5) * self.think_s)


def client_of(stack: ExitStack, n: int, *flags: str, engine: str = "llamacpp") -> OverHttp:
    url = service(stack, "--max-requests", str(max(64, n)), *flags, engine=engine)
    return OverHttp(address_of(url), "", chat=True, stream=True, store=True)


# --- 1 to 64 --------------------------------------------------------------------------------------

FIRST, EACH, ALL = "first text, s", "tokens/s of a user", "tokens/s of all users"
PERCENTILES = ((FIRST, 50), (FIRST, 95), (FIRST, 99), (EACH, 50), (EACH, 5))


def measure(
    seconds: float = 60.0,
    think_s: float = 0.0,
    pictures: float = 0.1,
    n_tokens: int = 64,
    most: int = AT_ONCE[-1],
) -> Report:
    """1 to 64 users, each number for so many seconds."""
    counts = [n for n in AT_ONCE if n <= most]
    rows, curves = [], defaultdict[tuple[str, str], list[float]](list)
    with ExitStack() as stack:
        client = client_of(stack, most)
        users = partial(Users, client=client, pictures=pictures, n_tokens=n_tokens)
        users(n=1, seconds=min(5.0, seconds), think_s=0.0, pictures=0.5).run()  # warms up
        for n in counts:
            one = users(n=n, seconds=seconds, think_s=think_s).run()
            ends, firsts, lengths, tokens = zip(*one.answers, strict=True)
            each = [count / length for count, length in zip(tokens, lengths, strict=True)]
            cells = [f"{n}", f"{len(firsts)}"]
            for name, percent in PERCENTILES:
                value = float(np.percentile(firsts if name == FIRST else each, percent))
                curves[name, f"p{percent}"].append(value)
                cells.append(f"{value:.2f}" if name == FIRST else f"{value:.0f}")
            curves[ALL, ""].append(sum(tokens) / ends[-1])
            rows.append([*cells, f"{curves[ALL, ''][-1]:.0f}"])
    panels = [
        Panel("users", name, {p: (counts, v) for (n, p), v in curves.items() if n == name}, log="2")
        for name in (FIRST, EACH, ALL)
    ]
    rates = curves[ALL, ""]
    name = f"tokens/s of {counts[-1]} users together"
    ratio = Ratio.beside_of(name, rates[-1], "tokens/s", "one user", rates[0])
    return Report({"rows": rows}, [ratio], {"users": panels})


# --- an hour --------------------------------------------------------------------------------------


class Drift(NamedTuple):
    """How far a line through values rises over the time, as parts of their mean.

    ``low`` and ``high`` are two standard errors around the ``rise``.
    """

    rise: float
    low: float
    high: float

    def verdict(self, allowed: float) -> str:
        if self.high <= allowed:
            return "does not rise"
        return "rises" if self.low > allowed else "cannot be told"


def drift(times: Sequence[float], values: Sequence[float]) -> Drift:
    slope, fixed = statistics.linear_regression(times, values)
    off = sum((v - fixed - slope * t) ** 2 for t, v in zip(times, values, strict=True))
    spread = sum((t - statistics.fmean(times)) ** 2 for t in times)
    error = math.sqrt(off / max(1, len(times) - 2) / spread)
    whole = (max(times) - min(times)) / statistics.fmean(values)
    return Drift(*(one * whole for one in (slope, slope - 2 * error, slope + 2 * error)))


def by_minute(seen: Seen) -> dict[str, list[float]]:
    """Memory and latency of each minute (of each 20th of a shorter time) that has answers."""
    width = min(60.0, seen.seconds / 20)
    answers, memory = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for at, _, seconds, _ in seen.answers:
        answers[int(at / width)].append(seconds)
    for at, used in seen.memory:
        memory[int(at / width)].append(used / 1e6)
    parts = sorted(answers.keys() & memory.keys())
    found = {"minute": [(part + 0.5) * width / 60 for part in parts]}
    found[MEMORY] = [max(memory[part]) for part in parts]
    for percent in (50, 95):
        values = [float(np.percentile(answers[part], percent)) for part in parts]
        found[f"p{percent}, s"] = values
    return found


def lines_of(
    found: Mapping[str, list[float]], warm: float, load: str = "a load"
) -> tuple[list[list[str]], list[Ratio]]:
    """The lines through what each minute of ``load`` showed after ``warm`` minutes."""
    rows, ratios = [], []
    keeps = [place for place, minute in enumerate(found["minute"]) if minute >= warm]
    for name, allowed in MAY_RISE.items():
        times, values = ([found[key][place] for place in keeps] for key in ("minute", name))
        line = drift(times, values)
        spread = f"{line.rise:+.1%} ({line.low:+.1%} to {line.high:+.1%})"
        cells = [name, f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{max(values):.4g}", spread]
        rows.append([*cells, f"{allowed:.0%}", line.verdict(allowed)])
        measure = f"{name.split(',')[0]} over the time of {load}: rise at most"
        ratios.append(Ratio.bound(measure, 100 * line.high, "%", 100 * allowed))
    return rows, ratios


def hour(
    minutes: float = 60.0,
    n: int = 8,
    leaving: float = 0.1,
    think_s: float = 0.5,
    pictures: float = 0.1,
    n_tokens: int = 64,
    model: str = "mini",
    engine: str = "llamacpp",
) -> Report:
    """Some users for long, of whom some leave half-way; does memory or latency rise?

    A line through each minute's memory and latency gives the verdict.
    """
    with ExitStack() as stack:
        flags = ["--model", model, "--context-cache-bytes", str(CACHE_BYTES)]
        client = client_of(stack, n, *flags, engine=engine)
        one = Users(
            client=client,
            n=n,
            seconds=60 * minutes,
            think_s=think_s,
            pictures=pictures,
            n_tokens=n_tokens,
            leaving=leaving,
        ).run()
    found = by_minute(one)
    rows, ratios = lines_of(found, WARM * minutes)
    panels = [Panel("minute", name, {"": (found["minute"], found[name])}) for name in MAY_RISE]
    values = {"rows": rows, "warm": WARM * minutes, "cache": CACHE_BYTES >> 20, "left": one.left}
    return Report({**values, "answers": len(one.answers)}, ratios, {"hour": panels})

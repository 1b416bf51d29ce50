"""An hour of load on ``mico-chat serve``, from which users leave half-way: does anything rise?

``python -m benchmarks.hour --output benchmarks/results``. One question in ten is left half-way. A
line through each minute's memory and latency gives the verdict.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from benchmarks.summary import Ratio, keep
from benchmarks.systems import publish, table
from benchmarks.users import PACKAGES, Users, about, client_of
from mico_training.records import panels

WARM = 0.1
"""The first part of the time, in which caches fill; it does not count for the line."""
CACHE_BYTES = 1 << 24
"""Of encoded media: some 100 pictures, which are shown in that part. The default is full after
1,600, and memory rises until then."""
MAY_RISE = {"resident memory, MB": 0.05, "p50, s": 0.1, "p95, s": 0.1}
"""The part of its mean by which each may rise from the line's beginning to its end."""


@dataclass(frozen=True)
class Drift:
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
    return Drift(slope * whole, (slope - 2 * error) * whole, (slope + 2 * error) * whole)


def by_minute(users: Users) -> dict[str, list[float]]:
    """Memory and latency of each minute (of each 20th of a shorter time) that has answers."""
    width = min(60.0, users.seconds / 20)
    answers, memory = defaultdict[int, list[float]](list), defaultdict[int, list[float]](list)
    for at, _, seconds, _ in users.answers:
        answers[int(at / width)].append(seconds)
    for at, used in users.memory:
        memory[int(at / width)].append(used / 1e6)
    parts = sorted(answers.keys() & memory.keys())
    found = {"minute": [(part + 0.5) * width / 60 for part in parts]}
    found["resident memory, MB"] = [max(memory[part]) for part in parts]
    for percent in (50, 95):
        values = [float(np.percentile(answers[part], percent)) for part in parts]
        found[f"p{percent}, s"] = values
    return found


def report(found: Mapping[str, list[float]], warm: float) -> tuple[str, list[Ratio]]:
    """The lines through what each minute showed after ``warm`` minutes."""
    rows, ratios = [], []
    keeps = [place for place, minute in enumerate(found["minute"]) if minute >= warm]
    times = [found["minute"][place] for place in keeps]
    for name, allowed in MAY_RISE.items():
        values = [found[name][place] for place in keeps]
        line = drift(times, values)
        spread = f"{line.rise:+.1%} ({line.low:+.1%} to {line.high:+.1%})"
        cells = [name, f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{max(values):.4g}", spread]
        rows.append([*cells, f"{allowed:.0%}", line.verdict(allowed)])
        measure = f"{name.split(',')[0]} over the time of a load: rise at most"
        ratios.append(
            Ratio(
                measure=measure, value=100 * line.high, unit="%", goal=100 * allowed, at_most=True
            )
        )
    head = ["each minute's", "first", "last", "most", "rise of a line", "allowed", "verdict"]
    return (
        f"Without the first {warm:g} minutes, in which caches fill. The rise is that of the line "
        "from its beginning to its end, in parts of the mean, and two standard errors around it."
        f"\n\n{table(head, rows)}\n\n![Memory and latency, each minute](hour.png)\n"
    ), ratios


def main(
    output: Path | None = None,
    minutes: float = 60.0,
    n: int = 8,
    leaving: float = 0.1,
    think_s: float = 0.5,
    pictures: float = 0.1,
    n_tokens: int = 64,
) -> None:
    """Some users for long, of whom some leave half-way; does memory or latency rise?"""
    with ExitStack() as stack:
        client = client_of(stack, n, "--context-cache-bytes", str(CACHE_BYTES))
        one = Users(client, n, 60 * minutes, think_s, pictures, n_tokens, leaving)
        one.run()
    found = by_minute(one)
    text, ratios = report(found, WARM * minutes)
    if output is not None:
        with panels(output / "hour.png", len(MAY_RISE)) as drawn:
            for axes, name in zip(drawn, MAY_RISE, strict=True):
                axes.plot(found["minute"], found[name], ".-")
                axes.set(xlabel="minute", ylabel=name, ylim=(0, None))
    what = (
        f"{n} users for {minutes:g} minutes: {len(one.answers):,} answers of at most {n_tokens} "
        f"tokens, {one.left:,} left half-way; a new picture with {pictures:.0%} of the questions, "
        f"{think_s:g} s to think; a cache of {CACHE_BYTES >> 20} MiB for encoded media"
    )
    title = "# An hour of load" if minutes >= 60 else f"# {minutes:g} minutes of load"
    publish(f"{title}\n\n{about('hour', what)}{text}", "hour.md", output)
    keep("hour", ratios, output, "hour.md", PACKAGES)


if __name__ == "__main__":
    typer.run(main)

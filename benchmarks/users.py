"""1 to 64 users at once against ``mico-chat serve``.

``python -m benchmarks.users --output benchmarks/results``. Each user asks, reads the answer,
thinks, and asks again. Answers are kept in the service's database as usual.
"""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import typer

from benchmarks.http_client import address_of
from benchmarks.overhead import Asked, OverHttp, noisy_picture, question
from benchmarks.summary import Ratio, keep
from benchmarks.systems import machine, publish, service, table
from mico_training.records import panels

PACKAGES = ("torch", "llama-cpp-python")
AT_ONCE = (1, 2, 4, 8, 16, 32, 64)
SAMPLE_S = 5.0


@dataclass
class Users:
    """Users of a service, and what they saw; all times are seconds since the start."""

    client: OverHttp
    n: int
    seconds: float
    think_s: float
    pictures: float
    n_tokens: int
    leaving: float = 0.0
    answers: list[tuple[float, float, float, int]] = field(default_factory=list)
    """When each answer ended, its first text, its length in seconds, and its tokens."""
    left: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Resident bytes of the service's processes, over the time."""

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self.began = time.perf_counter()
        pool = [noisy_picture(seed) for seed in range(8)]
        watching = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._user(number, pool) for number in range(self.n)))
        watching.cancel()

    def _now(self) -> float:
        return time.perf_counter() - self.began

    async def _user(self, number: int, pool: Sequence[bytes]) -> None:
        rng = random.Random(number)
        usual = 1.0
        while self._now() < self.seconds:
            shown = None
            if rng.random() < self.pictures:  # bytes behind a JPEG's end make it a new one
                shown = rng.choice(pool) + rng.randbytes(8)
            asked = Asked(question(rng), shown, self.n_tokens)
            leaves = rng.random() < self.leaving
            began = self._now()
            with suppress(TimeoutError):
                async with asyncio.timeout(usual / 2 if leaves else None):
                    first, tokens = await self.client.ask(asked)
                    usual = self._now() - began
                    self.answers.append((self._now(), first, usual, tokens))
                    leaves = False
            self.left += leaves
            await asyncio.sleep(rng.uniform(0.5, 1.5) * self.think_s)

    async def _watch(self) -> None:
        while True:
            used = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    used += process.memory_info().rss
            self.memory.append((self._now(), used))
            await asyncio.sleep(min(SAMPLE_S, self.seconds / 20))


def client_of(stack: ExitStack, n: int, *flags: str) -> OverHttp:
    url = service(stack, "--max-requests", str(max(64, n)), *flags)
    return OverHttp(address_of(url), "", chat=True, stream=True, store=True)


def about(command: str, what: str) -> str:
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine(*PACKAGES)}. Made by `python -m benchmarks."
        f"{command}`. The mini in `mico-chat serve`; {what}.\n\n"
    )


def main(
    output: Path | None = None,
    seconds: float = 60.0,
    think_s: float = 0.0,
    pictures: float = 0.1,
    n_tokens: int = 64,
    most: int = AT_ONCE[-1],
) -> None:
    """1 to 64 users, each number for so many seconds."""
    counts = [n for n in AT_ONCE if n <= most]
    rows, curves = [], defaultdict[str, list[float]](list)
    with ExitStack() as stack:
        client = client_of(stack, most)
        Users(client, 1, min(5.0, seconds), 0.0, 0.5, n_tokens).run()  # warms up
        for n in counts:
            one = Users(client, n, seconds, think_s, pictures, n_tokens)
            one.run()
            _, firsts, lengths, tokens = zip(*one.answers, strict=True)
            each = [count / length for count, length in zip(tokens, lengths, strict=True)]
            cells = [f"{n}", f"{len(firsts)}"]
            for name, values, percents in (
                ("first text", firsts, (50, 95, 99)),
                ("tokens/s of a user", each, (50, 5)),
            ):
                for percent in percents:
                    value = float(np.percentile(values, percent))
                    curves[f"{name}, p{percent}"].append(value)
                    cells.append(f"{value:.2f}" if name == "first text" else f"{value:.0f}")
            curves["all"].append(sum(tokens) / one.answers[-1][0])
            rows.append([*cells, f"{curves['all'][-1]:.0f}"])
            print(" ".join(rows[-1]), flush=True)
    if output is not None:
        with panels(output / "users.png", 3) as drawn:
            names = ("first text", "tokens/s of a user", "all")
            labels = ("first text, s", "tokens/s of a user", "tokens/s of all users")
            for axes, name, label in zip(drawn, names, labels, strict=True):
                for curve, values in curves.items():
                    if curve.startswith(name):
                        axes.plot(counts, values, "o-", label=curve)
                axes.set_xscale("log", base=2)
                axes.set_xticks(counts, map(str, counts))
                axes.set(xlabel="users", ylabel=label, ylim=(0, None))
    what = (
        f"at most {n_tokens} tokens an answer, a new picture with {pictures:.0%} of the questions, "
        f"{think_s:g} s to think, {seconds:g} s for each number of users"
    )
    head = ["users", "answers", "first text p50, s", "p95", "p99", "tokens/s of a user p50", "p5"]
    publish(
        f"# Users at once\n\n{about('users', what)}{table([*head, 'of all'], rows)}\n\n"
        "![First text and tokens/s against users](users.png)\n",
        "users.md",
        output,
    )
    rates = curves["all"]
    name = f"tokens/s of {counts[-1]} users together"
    ratio = Ratio.beside_of(name, rates[-1], "tokens/s", "one user", rates[0])
    keep("users", [ratio], output, "users.md", PACKAGES)


if __name__ == "__main__":
    typer.run(main)

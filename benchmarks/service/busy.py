"""What other busy programs cost an answer: one thread, one a core, and as the engine chooses.

    python -m benchmarks busy --output benchmarks/results
    taskset -c 0 python -m benchmarks busy --output benchmarks/results

Three services run side by side and are asked in turns, one question at a time, with nothing beside
them, beside a busy program of low priority (``nice``), and beside one and two of usual priority.
"""

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.engines.overhead import Asked, OverHttp, question
from benchmarks.harness import Ratio, Report
from benchmarks.http_client import address_of
from benchmarks.media import noisy_picture
from benchmarks.processes import service
from mico_chat.engine.cpu import usable_cores

N_TOKENS = 64
PICTURE_TOKENS = 16
SETTLE_S = 1.0
"""Seconds of rest after other programs have started or ended."""

PATIENCE_S = 20.0
"""A service whose answer took longer is not asked again beside the same programs."""

CHOSEN = "chosen by the engine"

NEIGHBOURS = {
    "quiet": (0, 0),
    "1 busy, nice 19": (1, 19),
    "1 busy, equal": (1, 0),
    "2 busy, equal": (2, 0),
}
"""How many programs, and their priority."""

Found = dict[str, tuple[list[float], list[float]]]
"""For each service tokens/s of the answers, and seconds of those about pictures."""


def measure(repeats: int = 15) -> Report:
    cores = usable_cores()
    flags = {
        f"{n} thread{'s' if n > 1 else ''}": ["--engine-args", f'{{"threads":{n}}}']
        for n in sorted({1, cores}, reverse=True)
    }
    with ExitStack() as stack:
        services = {
            name: OverHttp(address_of(service(stack, *chosen)), "", chat=True, stream=False)
            for name, chosen in (flags | {CHOSEN: []}).items()
        }
        found = {
            name: _measure(services, count, nice, repeats)
            for name, (count, nice) in NEIGHBOURS.items()
        }
    # What the engine's choice reaches of its share of the cores; low priority leaves it all.
    quiet, *beside = (statistics.median(column[CHOSEN][0]) for column in found.values())
    ratios = []
    for (name, (count, nice)), rate in zip(list(NEIGHBOURS.items())[1:], beside, strict=True):
        share = 1.0 if nice else cores / (cores + count)
        where = f"tokens/s beside {name}, {cores} core{'s' if cores > 1 else ''}"
        stands = f"{share:.2f} of a quiet machine's"
        ratios.append(Ratio.beside_of(where, rate, "tokens/s", stands, quiet * share, 0.9))
    name = "busy" if cores > 1 else "busy-1-core"
    return Report(_values(found), ratios, part=name, file=name)


@contextmanager
def _busy(count: int, nice: int) -> Iterator[None]:
    """Programs that compute all the time, each in a session of its own as from other terminals."""
    command = ["nice", "-n", str(nice), sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
        time.sleep(SETTLE_S)


def _measure(services: dict[str, OverHttp], count: int, nice: int, repeats: int) -> Found:
    rng = random.Random(count)

    def ask(client: OverHttp, n_tokens: int, *, picture: bool = False) -> tuple[int, float]:
        """Tokens of the answer, and seconds until it was there; no two questions begin alike."""
        shown = noisy_picture(rng.getrandbits(31)) if picture else None
        start = time.perf_counter()
        _, tokens = asyncio.run(client.ask(Asked(question(rng), shown, n_tokens)))
        return tokens, time.perf_counter() - start

    found: Found = {name: ([], []) for name in services}
    for client in services.values():  # so that the engine knows its speed on a quiet machine
        for _ in range(3):
            ask(client, N_TOKENS)
            ask(client, PICTURE_TOKENS, picture=True)
    with _busy(count, nice):
        for _ in range(repeats):
            for name, client in rng.sample(list(services.items()), len(services)):
                rates, pictures = found[name]
                if rates and N_TOKENS / rates[-1] > PATIENCE_S:
                    continue
                tokens, seconds = ask(client, N_TOKENS)
                rates.append(tokens / seconds)
                pictures.append(ask(client, PICTURE_TOKENS, picture=True)[1])
    return found


def _values(found: dict[str, Found]) -> dict[str, object]:
    def rows(form: str, at: int, figure: Callable[[list[float]], float]) -> list[list[str]]:
        """A row for each service, with a figure of its answers beside each kind of neighbours."""
        return [
            [name, *(format(figure(column[name][at]), form) for column in found.values())]
            for name in found["quiet"]
        ]

    share = []
    for column in found.values():
        best = max(statistics.median(pair[0]) for name, pair in column.items() if name != CHOSEN)
        share.append(f"{statistics.median(column[CHOSEN][0]) / best:.2f}")
    autogroup = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return {
        "head": ["threads", *found],
        "rates": [*rows(".0f", 0, statistics.median), [f"{CHOSEN}, of the better row", *share]],
        "slowest": rows(".1f", 0, lambda rates: max(rates) / min(rates)),
        "pictures": rows(".2f", 1, statistics.median),
        "autogroup": autogroup.exists() and autogroup.read_text().strip() == "1",
        "patience_s": PATIENCE_S,
        "n_tokens": N_TOKENS,
        "picture_tokens": PICTURE_TOKENS,
    }

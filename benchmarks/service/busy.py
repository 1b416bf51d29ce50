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
from collections.abc import Iterator
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
    name = "busy" if cores > 1 else "busy-1-core"
    return Report(_values(found), _ratios(found, cores), part=name, file=name)


def _ratios(found: dict[str, Found], cores: int) -> list[Ratio]:
    """What the engine's choice reaches of its share of the cores; low priority leaves it all."""
    quiet, *beside = (statistics.median(column[CHOSEN][0]) for column in found.values())
    ratios = []
    for (name, (count, nice)), rate in zip(list(NEIGHBOURS.items())[1:], beside, strict=True):
        share = 1.0 if nice else cores / (cores + count)
        where = f"tokens/s beside {name}, {cores} core{'s' if cores > 1 else ''}"
        stands = f"{share:.2f} of a quiet machine's"
        ratios.append(Ratio.beside_of(where, rate, "tokens/s", stands, quiet * share, 0.9))
    return ratios


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
    found: Found = {name: ([], []) for name in services}
    for client in services.values():  # so that the engine knows its speed on a quiet machine
        for _ in range(3):
            _ask(client, rng, N_TOKENS)
            _ask(client, rng, PICTURE_TOKENS, picture=True)
    with _busy(count, nice):
        for _ in range(repeats):
            for name, client in rng.sample(list(services.items()), len(services)):
                rates, pictures = found[name]
                if rates and N_TOKENS / rates[-1] > PATIENCE_S:
                    continue
                tokens, seconds = _ask(client, rng, N_TOKENS)
                rates.append(tokens / seconds)
                pictures.append(_ask(client, rng, PICTURE_TOKENS, picture=True)[1])
    return found


def _ask(
    client: OverHttp, rng: random.Random, n_tokens: int, *, picture: bool = False
) -> tuple[int, float]:
    """Tokens of the answer, and seconds until it was there; no two questions begin alike."""
    shown = noisy_picture(rng.getrandbits(31)) if picture else None
    start = time.perf_counter()
    _, tokens = asyncio.run(client.ask(Asked(question(rng), shown, n_tokens)))
    return tokens, time.perf_counter() - start


def _values(found: dict[str, Found]) -> dict[str, object]:
    columns = list(found.values())
    rates = {name: [statistics.median(c[name][0]) for c in columns] for name in columns[0]}
    slowest = {name: [max(c[name][0]) / min(c[name][0]) for c in columns] for name in columns[0]}
    seconds = {name: [statistics.median(c[name][1]) for c in columns] for name in columns[0]}
    fixed = [values for name, values in rates.items() if name != CHOSEN]
    share = [rate / max(best) for rate, *best in zip(rates[CHOSEN], *fixed, strict=True)]

    def shown(values: dict[str, list[float]], form: str) -> list[list[str]]:
        return [[name, *(format(value, form) for value in row)] for name, row in values.items()]

    autogroup = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return {
        "head": ["threads", *found],
        "rates": [
            *shown(rates, ".0f"),
            *shown({f"{CHOSEN}, of the better row": share}, ".2f"),
        ],
        "slowest": shown(slowest, ".1f"),
        "pictures": shown(seconds, ".2f"),
        "autogroup": autogroup.exists() and autogroup.read_text().strip() == "1",
        "patience_s": PATIENCE_S,
        "n_tokens": N_TOKENS,
        "picture_tokens": PICTURE_TOKENS,
    }

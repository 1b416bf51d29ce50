"""What other busy programs cost an answer: one thread, one a core, and as the engine chooses.

    python -m benchmarks.busy --output benchmarks/results

Three services run side by side and are asked in turns, one question at a time, with nothing beside
them, beside a busy program of low priority (``nice``), and beside one and two of usual priority.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import llama_cpp
import torch

from benchmarks.overhead import noisy_picture
from mico_chat.engine.cores import processor, usable_cores
from mico_ui.local_server import local_server

N_TOKENS = 64
PICTURE_TOKENS = 16
SETTLE_S = 1.0
"""After the others have started or ended."""

PATIENCE_S = 20.0
"""A service whose answer took longer is not asked again beside the same programs."""

CHOSEN = "chosen by the engine"

NEIGHBOURS = {
    "quiet": (0, 0),
    "1 busy, nice 19": (1, 19),
    "1 busy, equal": (1, 0),
    "2 busy, equal": (2, 0),
}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with ExitStack() as stack:
        services = {
            f"{n} thread{'s' if n > 1 else ''}": _service(
                stack, ["--engine-args", f'{{"threads":{n}}}']
            )
            for n in sorted({1, usable_cores()}, reverse=True)
        }
        services[CHOSEN] = _service(stack, [])
        found = {
            name: _measure(services, count, nice, options.repeats)
            for name, (count, nice) in NEIGHBOURS.items()
        }
    text = _report(found, options.repeats)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "busy.md").write_text(text, encoding="utf-8")


def _service(stack: ExitStack, flags: Sequence[str]) -> httpx.Client:
    data = stack.enter_context(tempfile.TemporaryDirectory())
    engine = ["--engine", "llamacpp", "--data-dir", data, *flags]
    address = stack.enter_context(local_server(engine))
    return stack.enter_context(httpx.Client(base_url=address, timeout=600, trust_env=False))


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


Found = dict[str, tuple[list[float], list[float]]]
"""For each service tokens/s of the answers, and seconds of those about pictures."""


def _measure(services: dict[str, httpx.Client], count: int, nice: int, repeats: int) -> Found:
    rng = random.Random(count)
    rates: dict[str, list[float]] = defaultdict(list)
    pictures: dict[str, list[float]] = defaultdict(list)
    for service in services.values():  # as it is used to a quiet machine
        for _ in range(3):
            _ask(service, rng, N_TOKENS)
            _ask(service, rng, PICTURE_TOKENS, picture=True)
    with _busy(count, nice):
        for _ in range(repeats):
            for name, service in rng.sample(list(services.items()), len(services)):
                if rates[name] and N_TOKENS / rates[name][-1] > PATIENCE_S:
                    continue
                tokens, seconds = _ask(service, rng, N_TOKENS)
                rates[name].append(tokens / seconds)
                pictures[name].append(_ask(service, rng, PICTURE_TOKENS, picture=True)[1])
    return {name: (rates[name], pictures[name]) for name in services}


def _ask(
    service: httpx.Client, rng: random.Random, n_tokens: int, *, picture: bool = False
) -> tuple[int, float]:
    """Tokens of the answer, and seconds until it was there; no two questions begin alike."""
    message = f"{rng.getrandbits(32):x}: write the alphabet ten times."
    fields = {"message": message, "max_tokens": str(n_tokens), "store": "false"}
    files = {"image": ("a.jpg", noisy_picture(rng.getrandbits(31)))} if picture else None
    start = time.perf_counter()
    answer = service.post("/v1/chat", data=fields, files=files)
    seconds = time.perf_counter() - start
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"]), seconds


def _report(found: dict[str, Found], repeats: int) -> str:
    autogroup = Path("/proc/sys/kernel/sched_autogroup_enabled")
    grouped = autogroup.exists() and autogroup.read_text().strip() == "1"
    names = list(next(iter(found.values())))
    head = ["| threads | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    rates = {
        name: [statistics.median(column[name][0]) for column in found.values()] for name in names
    }
    slowest = {
        name: [max(column[name][0]) / min(column[name][0]) for column in found.values()]
        for name in names
    }
    seconds = {
        name: [statistics.median(column[name][1]) for column in found.values()] for name in names
    }
    better = [max(rates[name][n] for name in names if name != CHOSEN) for n in range(len(found))]
    share = [rate / best for rate, best in zip(rates[CHOSEN], better, strict=True)]

    def rows(values: dict[str, list[float]], form: str) -> list[str]:
        return [
            f"| {name} | " + " | ".join(format(v, form) for v in row) + " |"
            for name, row in values.items()
        ]

    nice = (
        "This Linux shares cores between sessions first (sched_autogroup): a low priority does "
        "not count in another session."
        if grouped
        else "Low priority counts between all programs here."
    )
    return "\n".join(
        [
            f"# Beside busy programs, {datetime.date.today()}",
            "",
            f"{processor()[0]}, {usable_cores()} cores; Python {platform.python_version()}, torch "
            f"{torch.__version__}, llama-cpp-python {llama_cpp.__version__}; the mini in "
            f"`mico-chat serve`, medians of {repeats} answers, all services in turn "
            f"(one answer alone where it took over {PATIENCE_S:.0f} s). {nice}",
            "",
            f"## Tokens/s of one answer of {N_TOKENS} tokens, prompt included",
            "",
            *head,
            *rows(rates, ".0f"),
            *rows({f"{CHOSEN}, of the better row": share}, ".2f"),
            "",
            "## The slowest answer, in times of the fastest",
            "",
            *head,
            *rows(slowest, ".1f"),
            "",
            f"## Seconds of an answer of {PICTURE_TOKENS} tokens about a new picture",
            "",
            *head,
            *rows(seconds, ".2f"),
            "",
        ]
    )


if __name__ == "__main__":
    main()

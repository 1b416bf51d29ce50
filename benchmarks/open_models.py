"""Pictures at once: another project's model in `mico-chat serve` and in `transformers serve`.

    python -m benchmarks.open_models --output benchmarks/results

The model is a replica: the structure of Qwen2.5-Omni's Thinker with random weights, made here. So
the figures are of speed alone. Both servers have the same folder, dtype and threads, stay loaded,
and are asked in turns; every question has a picture of its own, which no server has seen.
"""

import asyncio
import datetime
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import typer

from benchmarks.http_client import address_of
from benchmarks.overhead import Asked, OverHttp, noisy_picture
from benchmarks.summary import Ratio, keep
from benchmarks.systems import DEVICE, machine, publish, service, table
from mico_chat.engine.cpu import usable_cores
from tests import replicas
from tests.replicas.qwen import Size

N_TOKENS = 64
AT_ONCE = (8, 1)
START_S = 120.0
OURS, THEIRS = "mico-chat serve", "transformers serve"


@dataclass(frozen=True)
class Race:
    """Seconds until all answers were there, and tokens of all answers."""

    seconds: float
    tokens: int


def main(
    output: Path | None = None,
    repeats: int = 5,
    width: int = 768,
    layers: int = 12,
    picture: int = 64,
    dtype: str = "bfloat16",
) -> None:
    """Race; ``picture`` is the number of tokens of a picture."""
    size = Size(width, 4 * width, layers, width // 64, picture)
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) / "qwen2.5-omni"
        model = str(replicas.build("qwen2_5_omni", folder, size=size))
        flags = ("--model", model, "--dtype", dtype)
        urls = {
            OURS: service(stack, *flags, engine="transformers"),
            THEIRS: stack.enter_context(_theirs(model, dtype)),
        }
        names = {OURS: folder.name, THEIRS: model}
        servers = {
            name: OverHttp(address_of(url), names[name], chat=False, stream=False)
            for name, url in urls.items()
        }
        found = _measure(servers, repeats)
    about = (
        f"a replica of Qwen2.5-Omni's Thinker (width {width}, {layers} layers, at most {picture} "
        f"tokens of a picture, random weights in {dtype}: the figures are of speed alone)"
    )
    publish(_report(found, about, repeats), "open-models.md", output)
    pair = [_rate(found[AT_ONCE[0], name]) for name in (OURS, THEIRS)]
    name = f"{AT_ONCE[0]} pictures at once, another project's model"
    ratio = Ratio.beside_of(name, pair[0], "tokens/s", THEIRS, pair[1], 3.0)
    keep("open-models", [ratio], output, "open-models.md", ("torch", "transformers"))


@contextmanager
def _theirs(model: str, dtype: str) -> Iterator[str]:
    """The address of a ``transformers serve``, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", DEVICE, "--dtype", dtype]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while True:
            try:
                httpx.get(f"{url}/health", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("transformers serve does not answer") from error
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _measure(servers: dict[str, OverHttp], repeats: int) -> dict[tuple[int, str], list[Race]]:
    rng = random.Random(0)
    found: dict[tuple[int, str], list[Race]] = defaultdict(list)
    for repeat in range(repeats + 1):  # the first one warms up
        for n in AT_ONCE:
            for name, server in rng.sample(list(servers.items()), len(servers)):
                race = asyncio.run(_race(server, n, rng))
                print(
                    f"{n} at once, {name}: {race.seconds:.2f} s, {race.tokens} tokens", flush=True
                )
                if repeat:
                    found[n, name].append(race)
    return found


async def _race(server: OverHttp, n: int, rng: random.Random) -> Race:
    asked = [
        Asked("What is in this picture?", noisy_picture(rng.getrandbits(31)), N_TOKENS)
        for _ in range(n)
    ]
    start = time.perf_counter()
    answers = await asyncio.gather(*map(server.ask, asked))
    return Race(time.perf_counter() - start, sum(tokens for _, tokens in answers))


def _rate(races: list[Race]) -> float:
    return statistics.median(race.tokens / race.seconds for race in races)


def _report(found: dict[tuple[int, str], list[Race]], about: str, repeats: int) -> str:
    rows = []
    for n in AT_ONCE:
        rate = {name: _rate(found[n, name]) for name in (OURS, THEIRS)}
        for name in (OURS, THEIRS):
            seconds = [race.seconds for race in found[n, name]]
            spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
            cells = [str(n), name, spread, f"{rate[name]:.1f}", f"{rate[name] / rate[THEIRS]:.2f}"]
            rows.append(cells)
    head = ["pictures at once", "server", "seconds for all", "tokens/s", f"of {THEIRS}"]
    return (
        f"# Pictures at once, {datetime.date.today()}\n\n"
        f"{machine('torch', 'transformers')}; {usable_cores()} threads. The model is {about}. "
        f"{N_TOKENS} tokens for each picture of 640 x 480, medians of {repeats} rounds (and the "
        f"fastest and the slowest round), both servers in turn.\n\n{table(head, rows)}\n"
    )


if __name__ == "__main__":
    typer.run(main)

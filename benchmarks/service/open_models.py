"""Pictures at once: another project's model in `mico-chat serve` and in `transformers serve`.

The model is a replica: the structure of Qwen2.5-Omni's Thinker with random weights, made here. So
the figures are of speed alone. Both servers have the same folder, dtype and threads, stay loaded,
and are asked in turns; every question has a picture of its own, which no server has seen.
"""

import os
import random
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from benchmarks.engines.overhead import Asked, OverHttp, together
from benchmarks.engines.systems import DEVICE
from benchmarks.harness import Ratio, Report, turns
from benchmarks.http_client import address_of
from benchmarks.media import noisy_picture
from benchmarks.processes import program, service
from mico_chat.engine.cpu import usable_cores
from tests.support import replicas
from tests.support.replicas.qwen import Size

N_TOKENS = 64
AT_ONCE = (8, 1)
PORT = 8078
OURS, THEIRS = "mico-chat serve", "transformers serve"


def measure(
    repeats: int = 5,
    width: int = 768,
    layers: int = 12,
    picture: Annotated[int, "tokens of a picture"] = 64,
    dtype: str = "bfloat16",
) -> Report:
    size = Size(width, 4 * width, layers, width // 64, picture)
    os.environ["OMP_NUM_THREADS"] = str(usable_cores())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) / "qwen2.5-omni"
        model = str(replicas.build("qwen2_5_omni", folder, size=size))
        flags = ("--model", model, "--dtype", dtype)
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", model]
        theirs += ["--host", "127.0.0.1", "--port", str(PORT), "--device", DEVICE, "--dtype", dtype]
        started = program(*theirs, ready=r"running on (http\S+)")
        urls = {
            (OURS, folder.name): service(stack, *flags, engine="transformers"),
            (THEIRS, model): stack.enter_context(started)[1],
        }
        servers = {
            name: OverHttp(address_of(url), asked, chat=False, stream=False)
            for (name, asked), url in urls.items()
        }
        rng = random.Random(0)
        ways = {
            (n, name): partial(_race, server, n, rng)
            for n in AT_ONCE
            for name, server in servers.items()
        }
        found = turns(ways, repeats, rng=rng)
    rates = {
        key: statistics.median(tokens / seconds for seconds, tokens in races)
        for key, races in found.items()
    }
    rows = []
    for (n, name), races in found.items():
        took = [seconds for seconds, _ in races]
        spread = f"{statistics.median(took):.2f} ({min(took):.2f}-{max(took):.2f})"
        cells = f"{rates[n, name]:.1f}", f"{rates[n, name] / rates[n, THEIRS]:.2f}"
        rows.append([str(n), name, spread, *cells])
    n = AT_ONCE[0]
    name = f"{n} pictures at once, another project's model"
    ratio = Ratio.beside_of(name, rates[n, OURS], "tokens/s", THEIRS, rates[n, THEIRS], 3.0)
    return Report({"rows": rows, "threads": usable_cores(), "n_tokens": N_TOKENS}, [ratio])


def _race(server: OverHttp, n: int, rng: random.Random) -> tuple[float, int]:
    pictures = [noisy_picture(rng.getrandbits(31)) for _ in range(n)]
    asked = "What is in this picture?"
    return together(server, [Asked(asked, picture, N_TOKENS) for picture in pictures])

"""What do 30 million training samples cost before the first is read? Seconds and memory, measured.

It writes the indexes of shards that
hold nothing (sparse files), of 10,000 samples each. It opens them as a source in one process, which
joins the indexes, and then in four processes at once, each as one rank of a run. It writes how long
that took, and by how much each process grew: private memory, and its part of what is shared (PSS).

The order of the draws is measured beside a permutation in memory, as a list of numbers would be
drawn from. At the end it counts how many ranks read a shard.
"""

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Ratio, Report, core_seconds
from benchmarks.processes import memory
from mico_chat.media.addresses import fingerprint
from mico_training.data.mixture import Mixture
from mico_training.data.order import LANES
from mico_training.data.sources.index import FORMAT, Profile, write_index
from mico_training.data.sources.shards import FORM, ShardSource

PER_SHARD = 10_000
SAMPLE = 100_352
"""Bytes of a sample."""
PROCESSES = 4
DRAWS = 20_000
RANKED = 1_000_000
"""Draws by which the ranks of a shard are counted."""


def write_shards(folder: Path, samples: int) -> None:
    """Empty shards with full indexes. One sample in ten has no caption."""
    profiles = [Profile(frozenset({"video", "audio"})), Profile(frozenset({"image"})), Profile()]
    generator = np.random.default_rng(0)
    for number in range(-(-samples // PER_SHARD)):
        n = min(PER_SHARD, samples - number * PER_SHARD)
        shard = folder / f"train-{number:06d}.tar"
        with shard.open("wb") as file:
            file.truncate(n * SAMPLE)
        columns = {
            "start": np.arange(n, dtype="<u8") * SAMPLE,
            "size": np.full(n, SAMPLE, dtype="<u4"),
            "profile": generator.choice(3, n, p=[0.5, 0.4, 0.1]).astype("<u4"),
        }
        state = fingerprint(shard)
        about = {"format": FORMAT, "form": FORM, "state": state, "count": n}
        about |= {"profiles": [p.json() for p in profiles], "bad": 0, "errors": []}
        write_index(shard, state, about, columns)


def pss() -> int:
    """Bytes of this process; those that n processes share count as an n-th."""
    return memory(["Pss"], file="smaps_rollup")


def opened(pattern: str) -> tuple[Mixture, float]:
    start = time.perf_counter()
    source = ShardSource(pattern, "caption")
    return Mixture([source], [1.0], seed=0), time.perf_counter() - start


def rank(number: int, pattern: str, together: Any) -> dict[str, float]:
    """Open the source, draw as one rank, then touch the whole index; all ranks side by side."""
    found: dict[str, float] = {}
    before = pss()

    def grown(by: str) -> None:
        """Note the growth when all ranks are there, and before any goes on."""
        together.wait()
        found[by] = pss() - before
        together.wait()

    together.wait()
    mixture, found["seconds"] = opened(pattern)
    grown("opened")
    source: Any = mixture.sources[0]

    def locate(draw: int) -> None:
        source.index.place(source.kept[mixture.locate(draw)[2]])

    found["rate"] = rate(locate, range(number, number + DRAWS * PROCESSES, PROCESSES))
    grown("drawn")
    for column in (source.index.start, source.index.size, source.index.profile):
        column.max()
    grown("touched")
    return found


def in_processes(pattern: str) -> list[dict[str, float]]:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(PROCESSES, spawn) as pool:
        together = manager.Barrier(PROCESSES)
        ranks = [pool.submit(rank, n, pattern, together) for n in range(PROCESSES)]
        return [one.result() for one in ranks]


def rate(locate: Callable[[int], object], draws: Sequence[int]) -> float:
    """Draws in a second of one core."""
    return len(draws) / core_seconds(lambda: [locate(draw) for draw in draws])


def ranks_of_shards(mixture: Mixture, ranks: int) -> tuple[float, float]:
    """How many ranks read a shard in the first draws on average; the share of shards read."""
    readers: dict[tuple[int, int], set[int]] = defaultdict(set)
    ends = [order.ends for order in mixture.orders]
    for draw in range(0, RANKED, 7):  # every seventh: all lanes, all ranks
        source, _, index = mixture.locate(draw)
        shard = int(ends[source].searchsorted(index, side="right"))
        readers[source, shard].add(draw % ranks)
    mean = sum(map(len, readers.values())) / len(readers)
    return mean, len(readers) / sum(map(len, ends))


def megabytes(found: Sequence[dict[str, float]], key: str) -> str:
    return f"{max(one[key] for one in found) / 1e6:.0f} MB"


def measure(samples: int = 30_000_000) -> Report:
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["MICO_CACHE_DIR"] = f"{temporary}/cache"  # the processes inherit it
        pattern = f"{temporary}/train-*.tar"
        write_shards(Path(temporary), samples)
        _, joining = opened(pattern)
        found = in_processes(pattern)
        mixture, _ = opened(pattern)
        draws = range(samples // 2, samples // 2 + DRAWS)
        computed = rate(mixture.locate, draws)
        start = time.perf_counter()
        permutation = np.random.default_rng(0).permutation(len(mixture.sources[0]))
        permuting = time.perf_counter() - start
        listed = rate(lambda draw: int(permutation[draw % len(permutation)]), draws)
        alone = ranks_of_shards(mixture, 8)
        both = ranks_of_shards(Mixture([mixture.sources[0]] * 2, [3.0, 1.0], seed=0), 8)
    seconds = [one["seconds"] for one in found]
    rows = [
        ["the first process joins the indexes of the shards, once", f"{joining:.1f} s"],
        [f"{PROCESSES} processes open the source together", f"{max(seconds):.1f} s"],
        ["each has grown by", megabytes(found, "opened")],
        [f"after {DRAWS:,} draws each", megabytes(found, "drawn")],
        ["after the whole index has been read", megabytes(found, "touched")],
        ["samples located in a second of one core", f"{min(o['rate'] for o in found):,.0f}"],
    ]
    size, made = f"{permutation.nbytes / 1e6:.0f} MB", f"{permuting:.1f} s"
    orders = [
        ["a permutation in each process", size, made, f"{listed:,.0f}"],
        ["a computed order", "0 MB", "0 s", f"{computed:,.0f}"],
    ]
    readers = [
        [what, f"{mean:.2f} of 8", f"{part:.0%}"]
        for what, (mean, part) in (("one source", alone), ("two, 3 to 1", both))
    ]
    name, added = f"{samples:,} samples in 4 processes", max(one["opened"] for one in found) / 1e6
    values = {"rows": rows, "orders": orders, "readers": readers, "kept": len(mixture.sources[0])}
    return Report(
        {**values, "per_shard": PER_SHARD, "ranked": RANKED, "lanes": LANES},
        [
            Ratio.bound(f"{name}: open", max(seconds), "s", 5.0),
            Ratio.bound(f"{name}: memory of each", added, "MB", 300.0),
        ],
    )

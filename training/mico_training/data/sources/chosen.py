"""Some samples of a source, by bits: 0.13 bytes a sample instead of a list of numbers."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mico_training.data.order import Integers
from mico_training.data.sources.sample import Source, TrainingSample, bad_of

ROW = 512
"""So many bits lie between two counts."""
RUN = 1_000_000
"""So many numbers are hashed at once."""
ORDER = 2406_09412
"""This seeds the hashes, the same for every run."""


class Kept:
    """The numbers, in order, that are True in runs of booleans."""

    def __init__(self, runs: Iterable[npt.NDArray[np.bool_]]) -> None:
        rows: list[npt.NDArray[np.uint8]] = []
        rest = np.zeros(0, dtype=bool)
        self.all = True
        for run in runs:
            self.all = self.all and bool(run.all())
            bits = np.concatenate([rest, run])
            whole = len(bits) - len(bits) % ROW
            rows.append(np.packbits(bits[:whole]))
            rest = bits[whole:]
        rows.append(np.packbits(np.pad(rest, (0, -len(rest) % ROW))))
        self.bits = np.concatenate(rows).reshape(-1, ROW // 8)
        counts = np.bitwise_count(self.bits).sum(axis=1, dtype=np.int64)
        self.before = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self.before[-1])

    def __getitem__(self, place: int) -> int:
        if self.all:
            return place
        row = int(self.before.searchsorted(place, side="right")) - 1
        (inside,) = np.unpackbits(self.bits[row]).nonzero()
        return row * ROW + int(inside[place - int(self.before[row])])

    def mask(self, n: int) -> npt.NDArray[np.bool_]:
        """Whether each of the numbers below ``n`` is kept."""
        return np.unpackbits(self.bits)[:n].astype(bool)

    def below(self, number: int) -> int:
        """How many are kept below a number."""
        row, within = divmod(number, ROW)
        rest = int(np.unpackbits(self.bits[row])[:within].sum()) if within else 0
        return int(self.before[row]) + rest


def share(n: int, fraction: float) -> Iterator[npt.NDArray[np.bool_]]:
    """Whether each of ``n`` numbers is of a fraction: those with the lowest hashes.

    A smaller fraction lies within a larger one.
    """
    firsts = range(0, n, RUN)
    wanted = max(1, round(fraction * n))
    counts = np.zeros(2**16, dtype=np.int64)
    for first in firsts:
        counts += np.bincount(_hashes(first, n) >> np.uint64(48), minlength=2**16)
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, wanted))  # the last hash that is kept begins with it
    near = np.concatenate(
        [h[h >> np.uint64(48) == bucket] for h in (_hashes(f, n) for f in firsts)]
    )
    last = np.sort(near)[wanted - 1 - int(ends[bucket] - counts[bucket])]
    for first in firsts:
        yield _hashes(first, n) <= last


def _hashes(first: int, n: int) -> npt.NDArray[np.uint64]:
    """The hashes of a run of numbers, all different (splitmix64)."""
    x = np.arange(first, min(first + RUN, n), dtype=np.uint64)
    x = (x + np.uint64(ORDER)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@runtime_checkable
class InShards(Source, Protocol):
    """A source whose samples lie in shards; ``ends``: the number of samples to each shard's end."""

    ends: Integers


def ends_of(source: Source) -> Integers:
    return source.ends if isinstance(source, InShards) else np.array([len(source)])


class Chosen:
    def __init__(self, source: Source, kept: Kept) -> None:
        self.source = source
        self.kept = kept
        self.ends = np.array([kept.below(int(end)) for end in ends_of(source)])
        self.bad = bad_of(source)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.source[self.kept[index]]

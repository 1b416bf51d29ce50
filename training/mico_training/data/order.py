"""The order of a source's samples in an epoch: a function of the seed and the place alone.

No order is stored: :func:`shuffled` says which number stands at a place of a shuffled row. A source
of few shards is shuffled as a whole.

A source of ``2 * LANES`` shards or more is read a few shards at a time, and each shard by one rank.
Its shards are shuffled, and their samples, one shard after the other, are cut into ``LANES`` equal
parts, one for each lane. A lane goes through its part in windows of ``WINDOW`` samples, each
shuffled by itself, while all lanes go on side by side. So any two of ``LANES * WINDOW``, a million
samples, may meet in a batch, but a lane has only the shards of its window open.

A run's draw ``i`` is of lane ``i % LANES``, and :class:`Dealt` gives rank ``r`` of ``W`` the draws
``r, r + W, ...``: if ``W`` divides ``LANES``, each lane has one rank, and so has each shard but
those that are cut. With several sources, a lane's draws of a source vary by a few in a block, and
the ranks share a few shards more. The order does not depend on ``W``: a run goes on at the exact
sample with any number of ranks, and with a ``W`` that does not divide ``LANES`` only the number of
ranks that read a shard grows.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

Integers = npt.NDArray[np.int64]

LANES = 64
WINDOW = 16_384
ROUNDS = 10  # with 6, a row of 5 numbers is not shuffled evenly
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)
_ALL = 2**64 - 1


@lru_cache(maxsize=4096)
def _keys(*seed: int) -> tuple[int, ...]:
    return tuple(map(int, np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)))


def shuffled(place: int, n: int, *seed: int) -> int:
    """The number at a place of the numbers below ``n``, shuffled by the seed.

    A Feistel network permutes the numbers of as many bits as ``n`` has. A result of ``n`` or more
    is permuted again, until it is below ``n``.
    """
    if n < 2:
        return place
    bits = (n - 1).bit_length()
    a, b = bits - bits // 2, bits // 2  # the widths of high and low, which change places
    while True:
        high, low = place >> b, place & ((1 << b) - 1)
        for key in _keys(*seed):
            mixed = ((low ^ key) * _MIX[0]) & _ALL
            mixed = ((mixed ^ (mixed >> 29)) * _MIX[1]) & _ALL
            high, low = low, high ^ ((mixed >> 33) & ((1 << a) - 1))
            a, b = b, a
        place = high << b | low
        if place < n:
            return place


BY_RANK = np.array([int(f"{lane:0{LANES.bit_length() - 1}b}"[::-1], 2) for lane in range(LANES)])
"""It has a place for each lane; those with the same remainder by 2, 4, ... stand together."""


class Order:
    """The order of a source's samples.

    ``ends`` are the numbers of samples to the end of each shard. In each block of draws, ``quota``
    are of the source; they are numbered lane by lane, in the order of ``BY_RANK``.
    """

    def __init__(self, ends: Integers, quota: int, *seed: int) -> None:
        self.ends = ends
        self.n = int(ends[-1])
        self.quota = quota
        self.seed = seed
        self.in_lanes = len(ends) >= 2 * LANES and self.n >= quota
        self._shuffled: dict[int, tuple[Integers, Integers]] = {}

    def locate(self, block: int, number: int) -> tuple[int, int]:
        if not self.in_lanes:
            epoch, place = divmod(block * self.quota + number, self.n)
            return epoch, shuffled(place, self.n, *self.seed, epoch)
        lane = number * LANES // self.quota
        first, end = (-(-at * self.quota // LANES) for at in (lane, lane + 1))  # of its draws
        start, stop = (self.n * at // self.quota for at in (first, end))  # of its samples
        epoch, place = divmod(block * (end - first) + number - first, stop - start)
        window, within = divmod(place, WINDOW)
        size = min(WINDOW, stop - start - window * WINDOW)
        within = shuffled(within, size, *self.seed, epoch, lane, window)
        return epoch, self._sample(start + window * WINDOW + within, epoch)

    def _sample(self, place: int, epoch: int) -> int:
        if epoch not in self._shuffled:
            if len(self._shuffled) > 2:  # some lanes are an epoch ahead of others
                self._shuffled.clear()
            shards = np.random.default_rng((*self.seed, epoch)).permutation(len(self.ends))
            ends = np.cumsum(np.diff(self.ends, prepend=0)[shards])
            self._shuffled[epoch] = shards, ends
        shards, ends = self._shuffled[epoch]
        turn = int(np.searchsorted(ends, place, side="right"))
        return int(self.ends[shards[turn]]) - int(ends[turn]) + place


@dataclass(frozen=True)
class Dealt(Dataset[Any]):
    """A data set whose draws are dealt to the batches of a step one by one, as cards are.

    The loader gives ``batch_size`` places in a row to a rank, and the next ones to the next rank.
    ``batches`` counts those of a step: the ranks, times the batches that each accumulates.
    """

    draws: Any
    batch_size: int
    batches: int

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, place: int) -> Any:
        step, within = divmod(place, self.batch_size * self.batches)
        batch, number = divmod(within, self.batch_size)
        return self.draws[(step * self.batch_size + number) * self.batches + batch]

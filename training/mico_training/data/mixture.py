"""The sample of each draw: a pure function of the seed and the number of the draw.

A run is one long list of draws. Draw ``i`` has the same source, sample and random choices whether
or not the run was interrupted before, and for any number of workers and ranks: nothing depends on
earlier draws. To skip to draw ``i`` is to resume at the exact sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mico_chat.errors import ConfigError
from mico_training.data.sample import Source, TrainingSample

Integers = npt.NDArray[np.int64]

BLOCK = 4096
"""Draws over which the ratios hold exactly (each block is shuffled by itself)."""


class Mixture:
    """Sources mixed by ratio, each visited in seeded permutations, one after the other.

    No source may be empty. A ratio of 0 leaves a source out.
    """

    def __init__(self, sources: Sequence[Source], ratios: Sequence[float], seed: int) -> None:
        if len(sources) != len(ratios):
            raise ConfigError(f"{len(sources)} data sources, but {len(ratios)} ratios")
        if sum(ratios) <= 0:
            raise ConfigError("the ratios of all data sources are 0, so no sample can be drawn")
        self.sources = tuple(sources)
        self.seed = seed
        self.quotas = _quotas(ratios)
        self._orders: dict[tuple[int, int], Integers] = {}
        self._blocks: dict[int, Integers] = {}

    def locate(self, draw: int) -> tuple[int, int, int]:
        """A draw's source, the epoch of that source, and the index in it."""
        block, place = divmod(draw, BLOCK)
        source, rank = (int(number) for number in self._block(block)[place])
        epoch, within = divmod(block * self.quotas[source] + rank, len(self.sources[source]))
        return source, epoch, int(self._order(source, epoch)[within])

    def sample(self, draw: int) -> TrainingSample:
        """The sample of a draw."""
        source, _, index = self.locate(draw)
        return self.sources[source][index]

    def generator(self, draw: int, purpose: int = 0) -> np.random.Generator:
        """The random generator of a draw; another ``purpose`` is another generator."""
        return np.random.default_rng((self.seed, 1, purpose, draw))

    def any_sample(self, generator: np.random.Generator) -> TrainingSample:
        """A sample at random, in proportion to the ratios: a partner for a joint context."""
        weights = np.asarray(self.quotas, dtype=np.float64) / BLOCK
        source = self.sources[int(generator.choice(len(self.sources), p=weights))]
        return source[int(generator.integers(len(source)))]

    def _order(self, source: int, epoch: int) -> Integers:
        """The order of a source's samples in an epoch; the last few orders are kept."""
        if (source, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.sources):
                self._orders.clear()
            generator = np.random.default_rng((self.seed, 2, source, epoch))
            self._orders[source, epoch] = generator.permutation(len(self.sources[source]))
        return self._orders[source, epoch]

    def _block(self, block: int) -> Integers:
        """(BLOCK, 2): each place's source, and how often that source came before in the block."""
        if block not in self._blocks:
            if len(self._blocks) > 4:
                self._blocks.clear()
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            sources = np.random.default_rng((self.seed, 3, block)).permutation(sources)
            ranks = np.zeros(BLOCK, dtype=np.int64)
            for source in range(len(self.quotas)):
                chosen = sources == source
                ranks[chosen] = np.arange(int(chosen.sum()))
            self._blocks[block] = np.stack([sources, ranks], axis=1)
        return self._blocks[block]


def _quotas(ratios: Sequence[float]) -> tuple[int, ...]:
    """The draws of each source in a block: largest remainders, at least 1 if the ratio is not 0."""
    shares = np.asarray(ratios, dtype=np.float64) / sum(ratios) * BLOCK
    quotas = np.maximum(np.floor(shares).astype(np.int64), (shares > 0).astype(np.int64))
    by_remainder = np.argsort(-(shares - np.floor(shares)), kind="stable")
    missing = BLOCK - int(quotas.sum())
    for turn in range(max(missing, 0)):
        quotas[by_remainder[turn % len(quotas)]] += 1
    if missing < 0:
        quotas[int(np.argmax(quotas))] += missing
    return tuple(int(quota) for quota in quotas)

"""Which sample is drawn when: a pure function of the seed and the number of the draw.

A run is one long list of draws. Draw ``i`` comes from the same source, is the same sample and
makes the same random choices whether or not the run was interrupted before it, and however many
workers or ranks share the list: nothing depends on what was drawn before. So skipping to draw
``i`` *is* resuming at the exact sample.
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

    Args:
        sources: what is drawn from; none may be empty.
        ratios: relative shares; 0 leaves a source out.
        seed: decides everything.
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
        """Source, epoch of that source and index in it for a draw."""
        block, place = divmod(draw, BLOCK)
        source, rank = (int(number) for number in self._block(block)[place])
        epoch, within = divmod(block * self.quotas[source] + rank, len(self.sources[source]))
        return source, epoch, int(self._order(source, epoch)[within])

    def sample(self, draw: int) -> TrainingSample:
        """The sample of a draw."""
        source, _, index = self.locate(draw)
        return self.sources[source][index]

    def generator(self, draw: int, purpose: int = 0) -> np.random.Generator:
        """Randomness for the choices made about a draw; ``purpose`` keeps uses apart.

        A draw's number stands for its (epoch, index), so repeats of a sample differ.
        """
        return np.random.default_rng((self.seed, 1, purpose, draw))

    def any_sample(self, generator: np.random.Generator) -> TrainingSample:
        """A sample at random, in proportion to the ratios: a partner for a joint context."""
        weights = np.asarray(self.quotas, dtype=np.float64) / BLOCK
        source = self.sources[int(generator.choice(len(self.sources), p=weights))]
        return source[int(generator.integers(len(source)))]

    def _order(self, source: int, epoch: int) -> Integers:
        """The permutation in which an epoch of a source is visited; the last few are kept."""
        if (source, epoch) not in self._orders:
            if len(self._orders) > 2 * len(self.sources):
                self._orders.clear()
            generator = np.random.default_rng((self.seed, 2, source, epoch))
            self._orders[source, epoch] = generator.permutation(len(self.sources[source]))
        return self._orders[source, epoch]

    def _block(self, block: int) -> Integers:
        """(BLOCK, 2): the source of each place, and how often that source came before it."""
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
    """Draws a block for each source: largest remainders, at least one where the ratio is not 0."""
    shares = np.asarray(ratios, dtype=np.float64) / sum(ratios) * BLOCK
    quotas = np.maximum(np.floor(shares).astype(np.int64), (shares > 0).astype(np.int64))
    by_remainder = np.argsort(-(shares - np.floor(shares)), kind="stable")
    missing = BLOCK - int(quotas.sum())
    for turn in range(max(missing, 0)):
        quotas[by_remainder[turn % len(quotas)]] += 1
    if missing < 0:
        quotas[int(np.argmax(quotas))] += missing
    return tuple(int(quota) for quota in quotas)

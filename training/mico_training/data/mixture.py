"""From a recipe's ``data`` section to the sample of each draw.

A run is one long list of draws. Draw ``i`` has the same source, sample and random choices whether
or not the run was interrupted before, and for any number of workers and ranks: nothing depends on
earlier draws. To skip to draw ``i`` is to resume at the exact sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mico_chat.errors import ConfigError, DataError
from mico_chat.media import Kind
from mico_training.data.readers import ManifestSource, ShardSource, read_llava
from mico_training.data.sample import Need, Source, TrainingSample
from mico_training.recipe import DataRecipe

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

    def locate(self, draw: int) -> tuple[int, int, int]:
        """A draw's source, the epoch of that source, and the index in it."""
        block, place = divmod(draw, BLOCK)
        source, rank = (int(number) for number in _block(self.seed, self.quotas, block)[place])
        epoch, within = divmod(block * self.quotas[source] + rank, len(self.sources[source]))
        return source, epoch, int(self._order(source, epoch)[within])

    def sample(self, draw: int) -> TrainingSample:
        source, _, index = self.locate(draw)
        return self.sources[source][index]

    def generator(self, draw: int, purpose: int = 0) -> np.random.Generator:
        """The random generator of a draw; another ``purpose`` is another generator."""
        return np.random.default_rng((self.seed, 1, purpose, draw))

    def seed_of(self, draw: int) -> int:
        """The seed of the frames and slices of a draw's media."""
        return int(self.generator(draw, purpose=7).integers(2**32))

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


@lru_cache(maxsize=8)
def _block(seed: int, quotas: tuple[int, ...], block: int) -> Integers:
    """(BLOCK, 2): each place's source, and how often that source came before in the block."""
    sources = np.repeat(np.arange(len(quotas)), quotas)
    sources = np.random.default_rng((seed, 3, block)).permutation(sources)
    ranks = np.zeros(BLOCK, dtype=np.int64)
    for source in range(len(quotas)):
        chosen = sources == source
        ranks[chosen] = np.arange(int(chosen.sum()))
    return np.stack([sources, ranks], axis=1)


@dataclass(frozen=True)
class DrawnDataset:
    """The examples of a run by draw; example ``i`` depends on the seed and ``i`` alone."""

    mixture: Mixture
    draws: int

    def __len__(self) -> int:
        return self.draws


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


def open_source(recipe: DataRecipe, need: Need) -> Source:
    """The samples of a source that have the captions, questions or conversations of a stage.

    Raises:
        DataError: a record is wrong, or no sample is left.
        ConfigError: ``skills`` are named, but the source's format has none.
    """
    source: Source
    if recipe.kind == "shards":
        source = ShardSource(recipe.path, need, recipe.skills)
    elif recipe.skills:
        raise ConfigError(
            f"{recipe.path}: only a source of kind: shards has skills; this one is of kind: "
            f"{recipe.kind}"
        )
    elif recipe.kind == "jsonl":
        source = ManifestSource(Path(recipe.path), need, recipe.root)
    else:
        source = read_llava(Path(recipe.path), need, recipe.root)
    if not len(source):
        skills = f" of the skills {', '.join(recipe.skills)}" if recipe.skills else ""
        raise DataError(recipe.path, None, f"no sample has a {need}{skills}")
    if recipe.fraction < 1.0:
        order = np.random.default_rng(ORDER).permutation(len(source))
        kept = order[: max(1, round(recipe.fraction * len(source)))]
        source = Chosen(source, np.sort(kept).tolist())
    if recipe.modalities:
        wanted = frozenset(recipe.modalities)
        texts = "captions" if need == "caption" else "turns"
        found = [n for n in range(len(source)) if getattr(_of_kinds(source[n], wanted), texts)]
        source = Chosen(source, found, wanted)
        if not found:
            kinds = ", ".join(recipe.modalities)
            raise DataError(recipe.path, None, f"no sample has a {need} about a medium of: {kinds}")
    return source


def open_mixture(recipes: Sequence[DataRecipe], need: Need, seed: int) -> Mixture:
    sources = [open_source(recipe, need) for recipe in recipes]
    return Mixture(sources, [recipe.ratio for recipe in recipes], seed)


ORDER = 2406_09412
"""The seed of the order in which parts are taken, the same for every run."""


@dataclass(frozen=True)
class Chosen:
    """Some samples of a source by index, with all their media or only those of some ``kinds``."""

    source: Source
    indices: Sequence[int]
    kinds: frozenset[Kind] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> TrainingSample:
        sample = self.source[self.indices[index]]
        return sample if self.kinds is None else _of_kinds(sample, self.kinds)


def _of_kinds(sample: TrainingSample, kinds: frozenset[Kind]) -> TrainingSample:
    """A sample's media of some kinds, and the texts about these media alone."""
    media = {name: medium for name, medium in sample.media.items() if medium.kind in kinds}
    captions = {name: texts for name, texts in sample.captions.items() if texts and name in media}
    turns = tuple(turn for turn in sample.turns if set(turn.media) <= set(media))
    return replace(sample, media=media, captions=captions, turns=turns)

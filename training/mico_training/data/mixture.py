"""From a recipe's ``data`` section to the sample of each draw.

A run is one long list of draws. Draw ``i`` has the same source, sample and random choices whether
or not the run was interrupted before, and for any number of workers and ranks: nothing depends on
earlier draws. To skip to draw ``i`` is to resume at the exact sample. :mod:`.order` says which
samples come together, and at which rank.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mico_chat.errors import ConfigError, DataError
from mico_chat.media.addresses import fingerprint, matching, read_part
from mico_training.data.order import BY_RANK, LANES, Integers, Order
from mico_training.data.sources.chosen import Chosen, Kept, ends_of, share
from mico_training.data.sources.contents import opened_source
from mico_training.data.sources.index import SUFFIX
from mico_training.data.sources.sample import Need, Source, TrainingSample, bad_of
from mico_training.data.talk.kinds import Shares, views
from mico_training.recipe import (
    DataRecipe,
    QuestionKind,
    Recipe,
    Stage1Run,
    Stage2Run,
    Stage3Run,
)

BLOCK = 4096
"""The ratios hold exactly over so many draws (each block is shuffled by itself)."""

SMALL = 256_000_000

NEAR = 1024
"""So many draws of its lane a draw is at most away from its partner, or from a bad one."""


class Mixture:
    """Sources mixed by ratio, each visited in seeded orders, one after the other.

    No source may be empty. A ratio of 0 leaves a source out. With ``shares`` of kinds of question
    (:mod:`.talk.kinds`), a draw has a kind, and its sample can be asked that.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ratios: Sequence[float],
        seed: int,
        shares: Shares | None = None,
    ) -> None:
        if len(sources) != len(ratios):
            raise ConfigError(f"{len(sources)} data sources, but {len(ratios)} ratios")
        if sum(ratios) <= 0:
            raise ConfigError("the ratios of all data sources are 0, so no sample can be drawn")
        self.sources = tuple(sources)
        self.seed = seed
        self.views = views(sources, ratios, shares or {})
        self.quotas = _quotas([view.ratio for view in self.views])
        self.orders = [
            Order(ends_of(view.samples), quota, seed, 2, number)
            for number, (view, quota) in enumerate(zip(self.views, self.quotas, strict=True))
        ]
        self._lanes = tuple(order.in_lanes for order in self.orders)

    def _place(self, draw: int) -> tuple[int, int]:
        """The number of a draw's view, and the draw's number among those of the view."""
        places: Integers = _block(self.seed, self.quotas, self._lanes, draw // BLOCK)
        return tuple(places[draw % BLOCK].tolist())

    def kind(self, draw: int) -> QuestionKind | None:
        """The kind of question that a draw is for, if it is for one."""
        return self.views[self._place(draw)[0]].kind

    def locate(self, draw: int) -> tuple[int, int, int]:
        number, within = self._place(draw)
        epoch, index = self.orders[number].locate(draw // BLOCK, within)
        kind, source, _, samples = self.views[number]
        if kind is not None and isinstance(samples, Chosen):
            index = samples.kept[index]
        return source, epoch, index

    def sample(self, draw: int) -> TrainingSample:
        source, _, index = self.locate(draw)
        return replace(self.sources[source][index], place=(source, index))

    def generator(self, draw: int, purpose: int = 0) -> np.random.Generator:
        """The random generator of a draw; another ``purpose`` is another generator."""
        return np.random.default_rng((self.seed, 1, purpose, draw))

    def seed_of(self, draw: int) -> int:
        return int(self.generator(draw, purpose=7).integers(2**32))

    def near(self, draw: int, generator: np.random.Generator) -> TrainingSample:
        """The sample of a random draw of the same lane: a partner for a joint context."""
        return self.sample(near(draw, generator))


def near(draw: int, generator: np.random.Generator) -> int:
    """A random draw of the same lane, whose shard is likely open."""
    return abs(draw + LANES * int(generator.integers(-NEAR, NEAR + 1)))


@lru_cache(maxsize=64)
def _block(seed: int, quotas: tuple[int, ...], lanes: tuple[bool, ...], block: int) -> Integers:
    """(BLOCK, 2): each place's source, and its number among the source's places.

    The places of a source in ``lanes`` are numbered lane by lane.
    """
    sources = np.repeat(np.arange(len(quotas)), quotas)
    sources = np.random.default_rng((seed, 3, block)).permutation(sources)
    in_turn = np.arange(BLOCK)
    by_lane = np.argsort(BY_RANK[in_turn % LANES], kind="stable")
    numbers = np.zeros(BLOCK, dtype=np.int64)
    for source, (quota, in_lanes) in enumerate(zip(quotas, lanes, strict=True)):
        order = by_lane if in_lanes else in_turn
        numbers[order[sources[order] == source]] = np.arange(quota)
    return np.stack([sources, numbers], axis=1)


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
        DataError: a file cannot be read, or no sample is left; or a sample is bad, if ``bad: stop``
            is asked for.
        ConfigError: ``skills`` are named, but the source's format has none.
    """
    source: Source
    _, source = opened_source(recipe, need)
    bad = bad_of(source)
    if bad.n and recipe.bad == "stop":
        raise bad.errors[0]
    if not len(source):
        about = f" about a medium of: {', '.join(recipe.modalities)}" if recipe.modalities else ""
        about += f" of the skills {', '.join(recipe.skills)}" if recipe.skills else ""
        about += f"; {bad.n} samples are bad, the first: {bad.errors[0]}" if bad.n else ""
        raise DataError(recipe.path, None, f"no sample has a {need}{about}")
    if recipe.fraction < 1.0:
        source = Chosen(source, Kept(share(len(source), recipe.fraction)))
    return source


def need_of(recipe: Recipe) -> Need:
    """The texts that a sample must have for a recipe's stage."""
    if isinstance(recipe, Stage1Run):
        return "question" if recipe.stage1.questions else "caption"
    if isinstance(recipe, Stage3Run) and recipe.stage3.dpo is not None:
        return "preference"
    return "caption" if isinstance(recipe, Stage2Run) else "conversation"


def states(recipes: Sequence[DataRecipe]) -> list[str]:
    """For each source a digest of its files: another one when they have changed.

    It is of their names and, up to ``SMALL`` bytes in all, of their content. Of larger sources and
    at addresses it is of each file's size, and its time of modification or version.
    """
    found = []
    for recipe in recipes:
        files = matching(recipe.path)
        for folder in [path for path in files if isinstance(path, Path) and path.is_dir()]:
            inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files = {**files, **{path: fingerprint(path) for path in inside}, folder: "0"}
        size = sum(int(state.partition("-")[0]) for state in files.values() if "None" not in state)
        digest = hashlib.sha256()
        for file, state in files.items():
            if not str(file).endswith(SUFFIX):
                small = size <= SMALL and isinstance(file, Path) and file.is_file()
                digest.update(str(file).rpartition("/")[2].encode())
                digest.update(read_part(file) if small else state.encode())
        found.append(digest.hexdigest()[:16])
    return found


def open_mixture(
    recipes: Sequence[DataRecipe],
    need: Need,
    seed: int,
    shares: Shares | None = None,
) -> Mixture:
    sources = [open_source(recipe, need) for recipe in recipes]
    return Mixture(sources, [recipe.ratio for recipe in recipes], seed, shares)

"""From a recipe's ``data`` section to the mixture a stage draws from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mico_chat.errors import ConfigError, DataError
from mico_chat.media.kinds import Kind
from mico_training.data.manifest import LlavaSource, ManifestSource
from mico_training.data.mixture import Mixture
from mico_training.data.sample import Need, Source, TrainingMedium, TrainingSample, require
from mico_training.data.shards import ShardSource
from mico_training.recipe import DataRecipe


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
        source = LlavaSource(Path(recipe.path), need, recipe.root)
    require(source, recipe.path, need, recipe.skills)
    if recipe.fraction < 1.0:
        source = part_of(source, recipe.fraction)
    if recipe.modalities:
        source = of_kinds(source, recipe.modalities, need)
        if not len(source):
            kinds = ", ".join(recipe.modalities)
            raise DataError(recipe.path, None, f"no sample has a {need} about a medium of: {kinds}")
    return source


def open_mixture(recipes: Sequence[DataRecipe], need: Need, seed: int) -> Mixture:
    """All sources of a recipe, mixed by ratio."""
    sources = [open_source(recipe, need) for recipe in recipes]
    return Mixture(sources, [recipe.ratio for recipe in recipes], seed)


def all_media(mixture: Mixture) -> Iterator[TrainingMedium]:
    """Every medium of every sample of a mixture, source after source."""
    for source in mixture.sources:
        for index in range(len(source)):
            yield from source[index].media.values()


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


def part_of(source: Source, fraction: float) -> Chosen:
    """A share of a source, at least one sample; a smaller share lies within a larger one."""
    order = np.random.default_rng(ORDER).permutation(len(source))
    kept = order[: max(1, round(fraction * len(source)))]
    return Chosen(source, [int(index) for index in np.sort(kept)])


def of_kinds(source: Source, kinds: Collection[Kind], need: Need) -> Chosen:
    """A source's media of some kinds, with the texts about them alone.

    Samples without a caption or question (``need``) are left out.
    """
    wanted = frozenset(kinds)

    def offers(sample: TrainingSample) -> bool:
        return bool(sample.captions if need == "caption" else sample.turns)

    found = [index for index in range(len(source)) if offers(_of_kinds(source[index], wanted))]
    return Chosen(source, found, wanted)


def _of_kinds(sample: TrainingSample, kinds: frozenset[Kind]) -> TrainingSample:
    media = {name: medium for name, medium in sample.media.items() if medium.kind in kinds}
    captions = {name: texts for name, texts in sample.captions.items() if texts and name in media}
    turns = tuple(turn for turn in sample.turns if set(turn.media) <= set(media))
    return replace(sample, media=media, captions=captions, turns=turns)

"""From a recipe's ``data`` section to the mixture a stage draws from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mico_chat.errors import ConfigError, DataError
from mico_training.data.chosen import of_kinds, part_of
from mico_training.data.manifest import LlavaSource, ManifestSource
from mico_training.data.mixture import Mixture
from mico_training.data.sample import Need, Source, TrainingMedium, require
from mico_training.data.shards import ShardSource
from mico_training.recipe import DataRecipe


def open_source(recipe: DataRecipe, need: Need) -> Source:
    """The samples of one source that have what a stage needs.

    Raises:
        DataError: a bad record, or no sample with a caption or conversation at all.
        ConfigError: ``skills`` for a source that has none.
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

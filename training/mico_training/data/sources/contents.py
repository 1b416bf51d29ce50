"""A source in any format, opened; and what is in it: kinds, texts, and the bad samples."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mico_chat.errors import ConfigError, DataError
from mico_chat.media.addresses import located
from mico_chat.media.kinds import MODALITIES
from mico_training.data.sources.index import Profile
from mico_training.data.sources.manifests import as_lines, folder_of, form_of
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.sample import Need, TrainingSample
from mico_training.data.sources.shards import ShardSource
from mico_training.recipe import DataRecipe

TEXTS = ("captions", "questions", "conversations")
SHOWN = 10
"""The causes of so many bad samples are shown."""


def opened_source(recipe: DataRecipe, need: Need) -> tuple[str, ShardSource | ManifestSource]:
    """The format of a source, and those of its samples that offer something: maybe none."""
    kinds = frozenset(recipe.modalities or MODALITIES)
    form = recipe.kind or form_of(recipe.path)
    if form == "shards":
        pattern = f"{recipe.path}/*.tar" if Path(recipe.path).is_dir() else recipe.path
        return form, ShardSource(pattern, need, recipe.skills, kinds)
    if recipe.skills:
        raise ConfigError(
            f"{recipe.path}: only a source of kind: shards has skills; this one is of kind: {form}"
        )
    place = located(recipe.path.rstrip("/") or "/")
    root = place if form == "folder" else folder_of(place)
    root = root if recipe.root is None else located(recipe.root)
    try:
        lines, shown = as_lines(place, form)
    except OSError as error:
        raise DataError(place, None, f"{error.strerror or error} ({error.filename})") from error
    return form, ManifestSource(lines, need, root, kinds, shown)


@dataclass(frozen=True)
class Contents:
    """What a source has. ``numbers``: those of its samples, also of bad lines, in its index."""

    path: str
    form: str
    source: ShardSource | ManifestSource
    numbers: npt.NDArray[np.int64]
    profiles: Counter[Profile]

    def serving(self, need: Need) -> int:
        """How many samples have the texts of a stage."""
        return sum(n for profile, n in self.profiles.items() if profile.offers(need))

    def sample(self, number: int) -> TrainingSample:
        """One of the ``numbers``; of a bad one, the id says what is wrong with it."""
        try:
            return self.source.read(number)
        except DataError as error:
            return TrainingSample(str(error), {})

    def lines(self) -> list[str]:
        """The counts by kind and text, and the first bad samples, for people."""
        bad = self.source.bad
        found = [f"{self.path}: {self.form}, {self.profiles.total():,} samples, {bad.n:,} bad"]
        texts: dict[str, Counter[str]] = {name: Counter() for name in TEXTS}
        for profile, n in self.profiles.items():
            asked = [kinds for _, kinds in profile.asked]
            shown = frozenset().union(*asked) if asked else None
            about = (profile.captioned or None, shown, profile.conversation)
            for counter, kinds in zip(texts.values(), about, strict=True):
                counter.update(dict.fromkeys(["samples", *(kinds or ())], n * (kinds is not None)))
        for name, counter in texts.items():
            said = (f"{kind} {n:,}" for kind, n in counter.most_common() if n)
            found.append(f"  {name}: {', '.join(said) or 'none'}")
        plain = self.profiles[Profile()]
        return [*found, f"  no text: {plain:,}", *(f"  bad: {e}" for e in bad.errors[:SHOWN])]


def contents(path: str) -> Contents:
    """What is at a path, by its index; a DataError if nothing can be read."""
    form, source = opened_source(DataRecipe(path=path), "caption")
    index = source.index
    numbers = np.flatnonzero(index.size > 2)  # a blank line has at most two bytes
    counts = np.bincount(index.profile[numbers], minlength=len(index.profiles)).tolist()
    profiles = Counter(dict(zip(index.profiles, counts, strict=True)))
    profiles[Profile()] -= 0 if form == "shards" else source.bad.n  # bad lines offer nothing
    return Contents(path, form, source, numbers, profiles)

"""The kinds of question, and the samples of which each can be asked.

``kinds.yaml`` has the skills of each kind. What an index knows of a sample is enough to choose it,
so that no medium and no text is read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import Kind
from mico_training.data.sources.chosen import Chosen, Kept
from mico_training.data.sources.index import Kinds, Profile
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.sample import Source, TrainingSample
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import Turn
from mico_training.data.table import Table
from mico_training.recipe import QuestionKind

Shares = Mapping[QuestionKind, float]
SMALL_TALK = "small_talk"
"""A finished conversation without a medium is of this kind."""


class Fitting(Table):
    """A kind's questions: of its ``skills``, about no other ``media``, if any are named; ``alone``:
    about one kind of medium."""

    skills: frozenset[str] = frozenset()
    media: Kinds = frozenset()
    alone: bool = False

    def has(self, skill: str, media: Kinds) -> bool:
        known = (not self.skills or skill in self.skills) and (
            not self.media or media <= self.media
        )
        return known and bool(media) and (len(media) == 1 or not self.alone)

    def turns(self, sample: TrainingSample) -> list[Turn]:
        kinds = [frozenset(sample.media[key].kind for key in turn.media) for turn in sample.turns]
        return [t for t, media in zip(sample.turns, kinds, strict=True) if self.has(t.skill, media)]


class Spoken(Table):
    """``kinds.yaml``."""

    kinds: dict[QuestionKind, Fitting]
    naming: frozenset[str]
    nouns: dict[Kind, tuple[str, ...]]
    hints: dict[Kind, tuple[str, ...]]
    looks_like: dict[Kind, Kinds]
    ordinals: tuple[str, ...]
    new: dict[str, tuple[str, ...]]
    old: dict[str, tuple[str, ...]]
    absent: dict[str, tuple[str, ...]]
    compare: dict[str, tuple[str, ...]]


table = Spoken.reader(Path(__file__).with_name("kinds.yaml"))


class View(NamedTuple):
    """Those samples of source number ``source`` that can be asked a kind, and their ratio."""

    kind: QuestionKind | None
    source: int
    ratio: float
    samples: Source


def views(sources: Sequence[Source], ratios: Sequence[float], shares: Shares) -> list[View]:
    """A view of each source for each kind, by the sources' ratios, and for what is left of 1.

    A ConfigError names a kind that no sample can be asked.
    """
    if not shares:
        return [View(None, n, ratios[n], source) for n, source in enumerate(sources)]
    left = 1 - sum(shares.values())
    found = [
        View(None, n, left * ratios[n] / sum(ratios), source)
        for n, source in enumerate(sources)
        if left > 1e-6
    ]
    for kind in (kind for kind, share in shares.items() if share > 0):
        able = {n: _able(source, kind) for n, source in enumerate(sources) if ratios[n] > 0}
        whole = sum(ratios[n] for n, which in able.items() if which.any())
        if not whole:
            raise ConfigError(
                f"stage3.asked.{kind}: a share of {shares[kind]:g}, but no sample of the data can "
                f"be asked this: {_needs(kind)}. Add such data, or leave the key out"
            )
        found += [
            View(kind, n, shares[kind] * ratios[n] / whole, Chosen(sources[n], Kept([which])))
            for n, which in able.items()
            if which.any()
        ]
    return found


def _needs(kind: QuestionKind) -> str:
    fitting = table().kinds[kind]
    skills, media = (", ".join(sorted(some)) for some in (fitting.skills, fitting.media))
    needs = f"it needs questions of the skills {skills or '(all)'} about {media or 'a medium'}"
    return "it needs conversations without media" if kind == SMALL_TALK else needs


def _able(source: Source, kind: QuestionKind) -> npt.NDArray[np.bool_]:
    """Whether each sample of a source can be asked a kind of question."""
    if isinstance(source, Chosen):
        return _able(source.source, kind)[source.kept.mask(len(source.source))]
    assert isinstance(source, ShardSource | ManifestSource)
    skills, kinds, fitting = source.skills, source.kinds, table().kinds[kind]

    def fits(profile: Profile) -> bool:
        asked = ((s, m) for s, m in profile.asked if m <= kinds and (not skills or s in skills))
        talks = kind == SMALL_TALK and profile.conversation == frozenset()
        return talks or (kind != SMALL_TALK and any(fitting.has(*one) for one in asked))

    able = np.concatenate([*source.index.offering(fits)])
    return able[source.kept.mask(len(able))]

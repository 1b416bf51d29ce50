"""Stage 1's examples: a multimodal context and the words it is aligned with (paper 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mico_chat.errors import DataError
from mico_chat.media import KINDS, MediaFile
from mico_training.data.mixture import DrawnDataset
from mico_training.data.regions import Region
from mico_training.data.sample import TrainingSample

CORPUS_PAIRS = {
    frozenset(pair): number for number, pair in enumerate(combinations(KINDS, 2), start=1)
}
"""The row of E_Sam for two corpora, named by their modalities; row 0 is for a single corpus. The
numbers are fixed, so that a checkpoint means the same under every recipe."""

PARTNER_TRIES = 8


@dataclass(frozen=True)
class ContextExample:
    """The media of a row, the main thing in each ("" = unknown), and their caption.

    ``corpus_pair`` is the row of E_Sam. With a ``question``, the caption is the answer.
    """

    media: tuple[MediaFile, ...]
    concepts: tuple[str, ...]
    caption: str
    corpus_pair: int = 0
    regions: tuple[tuple[Region, ...], ...] = ()
    question: str = ""


@dataclass(frozen=True)
class ContextDataset(DrawnDataset):
    """Contexts by draw: a random subset of a sample's media, or media of two corpora.

    ``drop`` is the probability to leave out each medium but one; ``cross_corpus`` the probability
    to join a medium with another kind of medium of another sample.
    """

    drop: float
    cross_corpus: float

    def __getitem__(self, draw: int) -> ContextExample:
        generator = self.mixture.generator(draw)
        sample = self.mixture.sample(draw)
        if generator.random() < self.cross_corpus:
            joint = self._cross(sample, generator)
            if joint is not None:
                return joint
        captioned = [key for key in sample.media if sample.captions.get(key)]
        anchor = captioned[int(generator.integers(len(captioned)))]
        kept = [key for key in sample.media if key == anchor or generator.random() >= self.drop]
        return ContextExample(
            media=tuple(sample.media[key] for key in kept),
            concepts=tuple(sample.concepts.get(key, "") for key in kept),
            caption=joint_caption([captions_of(sample, key, generator) for key in kept]),  # eq. (2)
            regions=tuple(sample.regions.get(key, ()) for key in kept),
        )

    def _cross(
        self, sample: TrainingSample, generator: np.random.Generator
    ) -> ContextExample | None:
        """Two samples of different corpora in one context (eq. 3), or None without a partner."""
        keys = [key for key in sample.media if sample.captions.get(key)]
        key = keys[int(generator.integers(len(keys)))]
        medium = sample.media[key]
        for _ in range(PARTNER_TRIES):
            other = self.mixture.any_sample(generator)
            others = [
                name
                for name, partner in other.media.items()
                if partner.kind != medium.kind and other.captions.get(name)
            ]
            if other.id != sample.id and others:
                pair = ((sample, key), (other, others[int(generator.integers(len(others)))]))
                media = tuple(one.media[name] for one, name in pair)
                return ContextExample(
                    media=media,
                    concepts=tuple(one.concepts.get(name, "") for one, name in pair),
                    caption=joint_caption([captions_of(*place, generator) for place in pair]),
                    corpus_pair=CORPUS_PAIRS[frozenset(medium.kind for medium in media)],
                    regions=tuple(one.regions.get(name, ()) for one, name in pair),
                )
        return None


class QuestionDataset(DrawnDataset):
    """Questions about media with one of their answers, by draw (appendix B.2)."""

    def __getitem__(self, draw: int) -> ContextExample:
        sample = self.mixture.sample(draw)
        turns = [turn for turn in sample.turns if turn.media]
        if not turns:
            raise DataError(sample.id, None, "none of its questions is about a medium")
        turn = turns[int(self.mixture.generator(draw).integers(len(turns)))]
        return ContextExample(
            media=tuple(sample.media[key] for key in turn.media),
            concepts=tuple(sample.concepts.get(key, "") for key in turn.media),
            caption=turn.answer,
            regions=((),) * len(turn.media),
            question=turn.question,
        )


def captions_of(sample: TrainingSample, key: str, generator: np.random.Generator) -> str:
    """One of a medium's captions at random, or "" if it has none."""
    captions = sample.captions.get(key, ())
    return captions[int(generator.integers(len(captions)))] if captions else ""


def joint_caption(captions: Sequence[str]) -> str:
    """The captions in the order of their media, each sentence once."""
    return " ".join(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))

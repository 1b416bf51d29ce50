"""A part of a source: so much of its samples, or its media of some kinds alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mico_chat.media.kinds import Kind
from mico_training.data.sample import Need, Source, TrainingSample

ORDER = 2406_09412
"""Seed of the one order in which parts are cut off, the same for every run."""


@dataclass(frozen=True)
class Chosen:
    """Some samples of a source by their index, with media of all kinds or of ``kinds`` alone."""

    source: Source
    indices: Sequence[int]
    kinds: frozenset[Kind] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> TrainingSample:
        sample = self.source[self.indices[index]]
        return sample if self.kinds is None else _of_kinds(sample, self.kinds)


def part_of(source: Source, fraction: float) -> Chosen:
    """At least one sample, and of two parts the smaller within the larger."""
    order = np.random.default_rng(ORDER).permutation(len(source))
    kept = order[: max(1, round(fraction * len(source)))]
    return Chosen(source, [int(index) for index in np.sort(kept)])


def of_kinds(source: Source, kinds: Collection[Kind], need: Need) -> Chosen:
    """Media of some kinds, and what is said or asked of them alone; samples without are left out.

    Args:
        need: what a sample must still have: a caption, or a question.
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

"""The classes of everyday sounds, and their decoded clips in one file on disk.

The bank is built once from the packages (half a minute) and then mapped into memory. Drawing is
even over makers: another recording of a dog teaches more than another note of one piano.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mico_chat.settings import cache_dir
from mico_training.world import synth
from mico_training.world.language import Rng, pick
from mico_training.world.sample import Split
from mico_training.world.sources import Table, in_one_step, split_of
from mico_training.world.synth import MAX_SECONDS, SAMPLE_RATE, Signal

logger = logging.getLogger(__name__)

_VERSION = 4
_QUIETEST = 1e-3  # peak below which a clip counts as silent


class SoundName(Table):
    name: str
    kind: Literal["animal", "instrument", "vehicle", "person", "nature", "object"]
    one: str
    phrase: str
    sentence: str
    also: tuple[str, ...] = ()
    steady: bool = False

    @property
    def accept(self) -> tuple[str, ...]:
        return (self.name, *self.also)


class Sounds(Table):
    classes: tuple[SoundName, ...]
    not_pictured: frozenset[str]
    pictured_as: dict[str, str]
    sound_only: frozenset[str]


sounds = Sounds.reader("sounds.yaml")


@cache
def sound_names() -> dict[str, SoundName]:
    return {sound.name: sound for sound in sorted(sounds().classes, key=lambda sound: sound.name)}


def confusable(one: str, other: str) -> bool:
    """Whether a clip of ``one`` could rightly be called ``other`` as well (or is the same)."""
    names = sound_names()
    return bool(set(names[one].accept) & set(names[other].accept))


@dataclass(frozen=True)
class Entry:
    """Where a clip lies in the bank: ``length`` samples from ``start``."""

    identity: str
    name: str
    source: str
    start: int
    length: int


class SoundBank:
    """Clips by split, class and identity; ``samples`` is int16 (n,) at 16 kHz. A class whose
    identities would all be held out is for training only."""

    def __init__(self, samples: NDArray[np.int16], entries: Iterable[Entry]) -> None:
        self._samples = samples
        self.entries = tuple(entries)
        if unknown := {entry.name for entry in self.entries} - sound_names().keys():
            raise ValueError(f"sound bank: unknown classes {sorted(unknown)}; see sounds.yaml")
        trained = {e.name for e in self.entries if split_of(e.identity) == "train"}
        self._clips: dict[Split, dict[str, dict[str, list[Entry]]]]
        self._clips = {"train": defaultdict(dict), "validation": defaultdict(dict)}
        for entry in self.entries:
            split: Split = split_of(entry.identity) if entry.name in trained else "train"
            self._clips[split][entry.name].setdefault(entry.identity, []).append(entry)

    def names(self, split: Split) -> list[str]:
        return sorted(self._clips[split])

    def identities(self, split: Split, name: str) -> list[str]:
        return list(self._clips[split].get(name, {}))

    def draw_name(self, rng: Rng, split: Split, names: Sequence[str] | None = None) -> str:
        """A class; one with four times the recordings is drawn twice as often."""
        pool = self.names(split) if names is None else list(names)
        if not pool:
            raise ValueError(f"sound bank: the split {split!r} has no class to draw from")
        weights = np.sqrt([min(16, len(self._clips[split][name])) for name in pool])
        return pool[int(rng.choice(len(pool), p=weights / weights.sum()))]

    def draw(self, rng: Rng, split: Split, name: str) -> tuple[Entry, Signal]:
        entry = pick(rng, pick(rng, list(self._clips[split][name].values())))
        return entry, self.signal(entry)

    def signal(self, entry: Entry) -> Signal:
        pcm = self._samples[entry.start : entry.start + entry.length]
        return pcm.astype(np.float32) / np.float32(32768)

    def save(self, stem: Path) -> None:
        """Write ``stem``.npy, then the index ``stem``.json."""
        with in_one_step(stem.with_suffix(".npy")) as scratch:
            np.save(scratch, self._samples)
        with in_one_step(stem.with_suffix(".json")) as scratch:
            scratch.write_text(json.dumps([asdict(entry) for entry in self.entries]))

    @classmethod
    def load(cls, stem: Path) -> SoundBank:
        entries = [Entry(**row) for row in json.loads(stem.with_suffix(".json").read_text())]
        return cls(np.load(stem.with_suffix(".npy"), mmap_mode="r"), entries)

    @classmethod
    def of(cls, clips: Iterable[tuple[str, str, str, Signal]]) -> SoundBank:
        """A bank in memory of (identity, class, source, samples); silent clips are left out."""
        parts, entries, start = [], [], 0
        for identity, name, source, raw in clips:
            signal = trim(raw)
            if signal is None:
                logger.info("%s: a silent clip of %r was left out", identity, name)
                continue
            pcm = (synth.peak(signal, 0.98) * 32767).astype(np.int16)
            parts.append(pcm)
            entries.append(Entry(identity, name, source, start, len(pcm)))
            start += len(pcm)
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int16), entries)


def trim(signal: Signal) -> Signal | None:
    """``signal`` without offset and without silence at its ends; None where nothing is left.
    Silence is 46 dB below the peak. At most MAX_SECONDS remain."""
    if not len(signal) or not np.isfinite(signal).all():
        return None
    centred = signal - signal.mean(dtype=np.float64).astype(np.float32)
    top = float(np.abs(centred).max())
    if top < _QUIETEST:
        return None
    loud = np.flatnonzero(np.abs(centred) > top * 0.005)
    start, end = max(0, int(loud[0]) - 80), min(len(centred), int(loud[-1]) + 320)
    kept: Signal = centred[start : min(end, start + round(MAX_SECONDS * SAMPLE_RATE))]
    return kept


@cache
def sound_bank() -> SoundBank:
    """The bank of all source packages, built and saved on first use."""
    stem = cache_dir() / "sounds" / f"bank-{_VERSION}"
    if not stem.with_suffix(".json").exists():
        from mico_training.world import soundsources  # needs the packages' readers

        logger.info("building the sound bank %s", stem)
        clips = ((c.identity, c.name, c.source, c.load()) for c in soundsources.clips())
        SoundBank.of(clips).save(stem)
    return SoundBank.load(stem)

"""The classes of everyday sounds, and their decoded clips in one file on disk.

The bank is built once from the packages (half a minute) and then mapped into memory. Each identity
of a class is drawn equally often: a second dog teaches more than a second note of one piano.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mico_chat.settings import cache_dir
from mico_training.data.language.english import Rng, pick
from mico_training.data.sources.written import Split
from mico_training.data.table import Table
from mico_world.sounds import recordings, synth
from mico_world.sounds.synth import MAX_SECONDS, SAMPLE_RATE, Signal
from mico_world.sources import in_one_step, split_of

logger = logging.getLogger(__name__)

_VERSION = 8
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


sounds = Sounds.reader(Path(__file__).with_name("sounds.yaml"))


@cache
def sound_names() -> dict[str, SoundName]:
    return {sound.name: sound for sound in sorted(sounds().classes, key=lambda sound: sound.name)}


def confusable(one: str, other: str) -> bool:
    """Whether some right name of a clip of ``one`` is a right name of ``other`` too."""
    names = sound_names()
    return bool(set(names[one].accept) & set(names[other].accept))


class BankEntry(NamedTuple):
    """Where a clip lies in the bank: ``length`` samples from ``start``."""

    identity: str
    name: str
    start: int
    length: int


class SoundBank:
    """Clips by split, class and identity; ``samples`` is int16 (n,) at 16 kHz. If all identities of
    a class would be held out, they are used for training instead."""

    def __init__(self, samples: NDArray[np.int16], entries: Iterable[BankEntry]) -> None:
        self._samples = samples
        self.entries = tuple(entries)
        if unknown := {entry.name for entry in self.entries} - sound_names().keys():
            raise ValueError(f"sound bank: unknown classes {sorted(unknown)}; see sounds.yaml")
        trained = {e.name for e in self.entries if split_of(e.identity) == "train"}
        self._clips: dict[Split, dict[str, dict[str, list[BankEntry]]]]
        self._clips = {"train": defaultdict(dict), "validation": defaultdict(dict)}
        for entry in self.entries:
            split: Split = split_of(entry.identity) if entry.name in trained else "train"
            self._clips[split][entry.name].setdefault(entry.identity, []).append(entry)

    def names(self, split: Split) -> list[str]:
        return sorted(self._clips[split])

    def draw_name(self, rng: Rng, split: Split, names: Sequence[str] | None = None) -> str:
        """A random class; a class with 16 times the identities is drawn twice as often."""
        pool = self.names(split) if names is None else list(names)
        if not pool:
            raise ValueError(f"sound bank: the split {split!r} has no class to draw from")
        weights = np.array([min(16, len(self._clips[split][name])) for name in pool]) ** 0.25
        return pool[int(rng.choice(len(pool), p=weights / weights.sum()))]

    def draw(self, rng: Rng, split: Split, name: str) -> tuple[BankEntry, Signal]:
        entry = pick(rng, pick(rng, list(self._clips[split][name].values())))
        return entry, self.signal(entry)

    def signal(self, entry: BankEntry) -> Signal:
        pcm = self._samples[entry.start : entry.start + entry.length]
        return pcm.astype(np.float32) / np.float32(32768)

    def save(self, stem: Path) -> None:
        with in_one_step(stem.with_suffix(".npy")) as scratch:
            np.save(scratch, self._samples)
        with in_one_step(stem.with_suffix(".json")) as scratch:
            scratch.write_text(json.dumps(self.entries))

    @classmethod
    def load(cls, stem: Path) -> SoundBank:
        entries = [BankEntry(*row) for row in json.loads(stem.with_suffix(".json").read_text())]
        return cls(np.load(stem.with_suffix(".npy"), mmap_mode="r"), entries)

    @classmethod
    def of(cls, clips: Iterable[tuple[str, str, Signal]]) -> SoundBank:
        """A bank in memory of (identity, class, samples); silent clips are left out."""
        parts, entries, start = [], [], 0
        for identity, name, raw in clips:
            signal = trim(raw)
            if signal is None:
                logger.info("%s: a silent clip of %r was left out", identity, name)
                continue
            pcm = (synth.peak(signal, 0.98) * 32767).astype(np.int16)
            parts.append(pcm)
            entries.append(BankEntry(identity, name, start, len(pcm)))
            start += len(pcm)
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int16), entries)


def trim(signal: Signal) -> Signal | None:
    """At most MAX_SECONDS of ``signal``, without offset and without silence (46 dB below the peak)
    at its ends; None if all of it is silent."""
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
    """The bank of all source packages. The first call builds and saves it."""
    stem = cache_dir() / "sounds" / f"bank-{_VERSION}"
    if not stem.with_suffix(".json").exists():
        logger.info("building the sound bank %s", stem)
        clips = ((c.identity, c.name, c.load()) for c in recordings.clips())
        SoundBank.of(clips).save(stem)
    return SoundBank.load(stem)

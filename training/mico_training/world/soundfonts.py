"""Instruments played from General MIDI sound fonts and GUS patches.

A font's program is one maker's recording of one instrument, so it is one identity however it is
played. Fonts that share recordings share a ``family``, lest the held-out clips leak: the MuseScore
font descends from FluidR3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tinysoundfont

from mico_training.world import synth
from mico_training.world.synth import SAMPLE_RATE, Signal

# General MIDI program -> class; programs that no plain word names are left out.
PROGRAMS: dict[str, tuple[int, ...]] = {
    "piano": (0, 1, 2, 3),
    "electric piano": (4, 5),
    "harpsichord": (6,),
    "glockenspiel": (8, 9),
    "music box": (10,),
    "vibraphone": (11,),
    "marimba": (12,),
    "xylophone": (13,),
    "bell": (14, 112),
    "organ": (16, 17, 18, 19, 20),
    "accordion": (21, 23),
    "harmonica": (22,),
    "guitar": (24, 25),
    "electric guitar": (26, 27, 28, 29, 30),
    "double bass": (32, 43),
    "bass guitar": (33, 34, 35, 36, 37),
    "violin": (40, 110),
    "viola": (41,),
    "cello": (42,),
    "orchestra": (44, 48, 49),
    "harp": (46,),
    "timpani": (47,),
    "choir": (52, 53),
    "trumpet": (56, 59),
    "trombone": (57,),
    "tuba": (58,),
    "french horn": (60,),
    "brass band": (61,),
    "saxophone": (64, 65, 66, 67),
    "oboe": (68, 69),
    "bassoon": (70,),
    "clarinet": (71,),
    "flute": (72, 73, 75, 77),
    "recorder": (74,),
    "whistle": (78,),
    "synthesizer": (38, 39, 62, 80, 81, 84, 87, 88, 90, 95),
    "sitar": (104,),
    "banjo": (105,),
    "bagpipes": (109,),
    "steel drum": (114,),
    "wood block": (115,),
    "drum": (116, 117, 118),
    "sea waves": (122,),
    "bird": (123,),
    "telephone": (124,),
    "helicopter": (125,),
    "applause": (126,),
    "gunshot": (127,),
}
DRUMS: dict[str, tuple[int, ...]] = {
    "drum": (35, 36, 41, 43, 45, 47, 48, 50, 65, 66),
    "snare drum": (38, 40),
    "clapping": (39,),
    "cymbal": (42, 44, 46, 49, 51, 52, 53, 55, 57, 59),
    "tambourine": (54,),
    "cowbell": (56, 67, 68),
    "bongos": (60, 61, 62, 63, 64),
    "maracas": (69, 70, 82),
    "wood block": (75, 76, 77, 85),
    "triangle": (80, 81),
    "wind chimes": (84,),
    "clock": (33,),
    "whistle": (71, 72),
}
# Sound effects of FluidR3 GS: (bank, program) -> class
EFFECTS: dict[tuple[int, int], str] = {
    (1, 122): "rain",
    (2, 122): "thunder",
    (3, 122): "wind",
    (4, 122): "water",
    (5, 122): "bubbles",
    (1, 123): "dog",
    (2, 123): "horse",
    (3, 123): "bird",
    (1, 124): "telephone",
    (2, 124): "door",
    (3, 124): "door",
    (5, 124): "wind chimes",
    (1, 125): "car",
    (3, 125): "car",
    (4, 125): "crash",
    (5, 125): "siren",
    (6, 125): "train",
    (7, 125): "airplane",
    (1, 126): "laughter",
    (2, 126): "scream",
    (4, 126): "heartbeat",
    (5, 126): "footsteps",
    (1, 127): "gunshot",
    (2, 127): "laser",
    (3, 127): "explosion",
}
_LOW = frozenset({32, 33, 34, 35, 36, 37, 38, 39, 42, 43, 47, 57, 58, 67, 70})
_HIGH = frozenset({8, 9, 10, 13, 40, 68, 71, 72, 73, 74, 75, 77, 78, 104, 110, 112})
_EFFECT_PROGRAMS = range(115, 128)
_SCALE = (0, 2, 4, 5, 7, 9, 11, 12)


@dataclass(frozen=True)
class Note:
    """A key struck at ``start`` and held for ``length`` seconds; ``key`` is a MIDI number."""

    start: float
    length: float
    key: int
    velocity: int


def tune(program: int, take: int) -> list[Note]:
    """What ``program`` plays in its ``take``: a melody, long notes, or chords; 3 to 4 seconds."""
    rng = np.random.default_rng([program, take])
    root = 40 if program in _LOW else 68 if program in _HIGH else 57
    root += int(rng.integers(-4, 8))
    if program in _EFFECT_PROGRAMS:
        step = (3.6, 1.2, 0.7)[take % 3] if program < 122 or program == 127 else 3.6
        keys = [60 + int(rng.integers(-5, 6))] * round(3.6 / step)
        return [Note(i * step, step * 0.95, k, 110) for i, k in enumerate(keys)]
    step = float((0.3, 1.1, 0.45)[take % 3] * rng.uniform(0.8, 1.2))
    notes, degree = [], int(rng.integers(8))
    for i in range(max(2, round(3.4 / step))):
        degree = int(np.clip(degree + rng.integers(-2, 3), 0, 7))
        key, velocity = root + _SCALE[degree], int(rng.integers(70, 120))
        notes.append(Note(i * step, step * float(rng.uniform(0.7, 1.0)), key, velocity))
        if take % 3 == 2 and program < 32:
            notes += [Note(i * step, step * 0.9, key + up, velocity - 10) for up in (4, 7)]
    return notes


def rhythm(key: int, take: int) -> list[Note]:
    """One drum in a simple rhythm."""
    rng = np.random.default_rng([key, take, 1])
    step = float(rng.uniform(0.15, 0.6))
    hits = [i for i in range(int(3.0 / step)) if i == 0 or rng.random() < 0.75]
    return [Note(i * step, step, key, int(rng.integers(80, 125))) for i in hits]


def beat(take: int) -> list[Note]:
    """A drum kit playing: bass drum, snare and hi-hat, with some fills."""
    rng = np.random.default_rng([take, 2])
    step = float(rng.uniform(0.12, 0.2))
    notes = []
    for i in range(20):
        if i % 8 == 0 or rng.random() < 0.12:
            notes.append(Note(i * step, step, 36, 115))
        if i % 8 == 4:
            notes.append(Note(i * step, step, 38, 110))
        if i % 2 == 0:
            notes.append(Note(i * step, step, 42, 80))
        if i >= 16 and rng.random() < 0.5:
            notes.append(Note(i * step, step, int(rng.choice([45, 47, 48])), 100))
    return notes


class Font:
    """A loaded sound font that plays notes."""

    def __init__(self, file: Path) -> None:
        self._synth = tinysoundfont.Synth(gain=-6.0, samplerate=SAMPLE_RATE)
        self._font = self._synth.sfload(str(file))

    def play(self, notes: Sequence[Note], program: int, bank: int = 0, tail: float = 0.5) -> Signal:
        """``notes`` on ``program``; ``bank`` 128 is the drum kits."""
        self._synth.notes_off()
        self._synth.sounds_off()
        self._synth.program_select(0, self._font, bank, program, bank == 128)
        changes = [(n.start, n.key, n.velocity) for n in notes]
        changes += [(n.start + n.length, n.key, 0) for n in notes]
        at, parts = 0.0, []
        end = max(n.start + n.length for n in notes) + tail
        for time, key, velocity in [*sorted(changes), (end, 0, -1)]:
            frames = round(time * SAMPLE_RATE) - round(at * SAMPLE_RATE)
            if frames > 0:
                parts.append(np.frombuffer(bytes(self._synth.generate(frames)), np.float32))
                at = time
            if velocity > 0:
                self._synth.noteon(0, key, velocity)
            elif velocity == 0:
                self._synth.noteoff(0, key)
        mono: Signal = np.concatenate(parts).reshape(-1, 2).mean(axis=1, dtype=np.float32)
        return mono


@dataclass(frozen=True)
class Patch:
    """One recorded key of a GUS patch."""

    signal: Signal
    sample_rate: int
    root: float  # Hz
    loop: tuple[int, int] | None  # frames

    def natural(self) -> Signal:
        """As recorded, at 16 kHz, without loop."""
        positions = np.arange(0, len(self.signal) - 1, self.sample_rate / SAMPLE_RATE)
        out: Signal = np.interp(positions, np.arange(len(self.signal)), self.signal).astype("f4")
        return out

    def play(self, note: Note) -> Signal:
        """``note`` by resampling; the loop holds it."""
        frequency = 440.0 * 2 ** ((note.key - 69) / 12)
        ratio = frequency / self.root * self.sample_rate / SAMPLE_RATE
        positions = np.arange(int(note.length * SAMPLE_RATE)) * ratio
        if self.loop is not None:
            start, end = self.loop
            past = positions >= end
            positions[past] = start + (positions[past] - start) % (end - start)
        frames = np.arange(len(self.signal))
        out = np.interp(positions, frames, self.signal, right=0.0).astype(np.float32)
        return synth.fade(out, 160) * np.float32(note.velocity / 127)


def read_patch(data: bytes) -> list[Patch]:
    """The recorded keys of a GUS .pat file (GF1PATCH110), lowest first.

    Raises ValueError for another format.
    """
    if not data.startswith((b"GF1PATCH110\0", b"GF1PATCH100\0")):
        raise ValueError(f"not a GUS patch: starts with {data[:12]!r}")
    patches, at = [], 129 + 63 + 47
    for _ in range(data[198]):
        size, begin, end, rate = struct.unpack_from("<IIIH", data, at + 8)
        root = struct.unpack_from("<I", data, at + 30)[0] / 1000.0
        modes = data[at + 55]
        raw = data[at + 96 : at + 96 + size]
        wide, unsigned = modes & 1, modes & 2
        kind = ("<u2" if unsigned else "<i2") if wide else ("u1" if unsigned else "i1")
        scale = 32768.0 if wide else 128.0
        pcm = np.frombuffer(raw[: size - size % (1 + wide)], kind).astype(np.float32)
        signal = (pcm - scale if unsigned else pcm) / np.float32(scale)
        loop = (begin // (1 + wide), end // (1 + wide))
        held = bool(modes & 4) and loop[1] - loop[0] > 16
        patches.append(Patch(signal, rate, root or 440.0, loop if held else None))
        at += 96 + size
    return sorted(patches, key=lambda patch: patch.root)


def play_patches(patches: Sequence[Patch], notes: Sequence[Note]) -> Signal:
    """``notes`` on the patch, each with the recorded key that is nearest."""
    parts = []
    for note in notes:
        frequency = 440.0 * 2 ** ((note.key - 69) / 12)
        nearest = min(patches, key=lambda patch: abs(np.log2(patch.root / frequency)))
        parts.append((note.start, nearest.play(note)))
    return synth.place(parts, max(n.start + n.length for n in notes) + 0.2)


def takes(family: str, font: Font) -> Iterator[tuple[str, str, Callable[[], Signal]]]:
    """(identity, class, player) of all that a General MIDI font offers."""

    def player(notes: list[Note], program: int, bank: int = 0) -> Callable[[], Signal]:
        return lambda: font.play(notes, program, bank)

    for name, programs in PROGRAMS.items():
        for program in programs:
            for take in range(3):
                notes = tune(program, take)
                yield f"{family}:program:{program}", name, player(notes, program)
    for name, keys in DRUMS.items():
        for key in keys:
            yield f"{family}:drum:{key}", name, player(rhythm(key, 0), 0, 128)
    for take, kit in enumerate((0, 8, 16, 24, 25, 32, 40, 48)):
        yield f"{family}:kit:{kit}", "drum", player(beat(take), kit, 128)

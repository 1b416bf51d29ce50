"""Every recording of the source packages as a named clip.

What is in which file is said by ``soundtable.py``; here the containers are opened. An identity
is the original recording: what was cut from one recording, or spoken by one speaker, stays in
one split.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import numpy as np

from mico_training.world import soundfonts, speech, synth
from mico_training.world.soundbank import MAX_SECONDS
from mico_training.world.soundtable import FILES, OPENSFX, SAMPLERS, STEPS, SURROUNDINGS
from mico_training.world.sources import source
from mico_training.world.synth import SAMPLE_RATE, Signal


@dataclass(frozen=True)
class Clip:
    """A recording: ``load()`` gives float32 mono at 16 kHz, as it is in the source."""

    identity: str
    name: str
    source: str
    load: Callable[[], Signal]


# What tells apart files that are cut from one recording ("wolf_00", "wolf_01").
_TAKES = {
    package: re.compile(f"(?:{pattern})$")
    for package, pattern in {
        "wesnoth-1.18-data": r"[-_]\d+",
        "widelands-data": r"[-_]\d+",
        "sound-icons": r"-\d+",
        "megaglest-data": r"(_[a-z]+)?\d+|_\w+",
        "scorched3d-data": r"(?<!dog)\d+|ing",
        "luanti-game-minetest": r"\.\d+|_open|_close",
        "minetest-mod-homedecor": r"_open|_close",
        "lugaru-data": r"(Growl)?\d*",
        "brainparty-data": r"\d+",
        "sonic-pi-samples": r"\d+",
        "tuxfootball": r"short|twice|long|end",
        "pekka-kana-2-data": r"hive",
    }.items()
}
_SUFFIXES = frozenset({".wav", ".ogg", ".oga", ".flac", ".mp3"})


def decode_file(path: Path) -> Signal:
    """The first seconds of a sound file."""
    return synth.decode(path.read_bytes(), MAX_SECONDS)


def _sound_files(package: str) -> list[Path]:
    """Each recording once: a link is another name of a file that is there as well."""
    paths = sorted(source(package).rglob("*"))
    return [p for p in paths if p.suffix in _SUFFIXES and not p.is_symlink()]


def _folder(path: Path) -> str:
    """The folder that says what a file belongs to: "owl/sounds/call.ogg" -> "owl"."""
    return next(part for part in reversed(path.parts[:-1]) if part != "sounds")


def _files() -> Iterator[Clip]:
    for package, classes in FILES.items():
        for path in _sound_files(package):
            place = f"{_folder(path)}/{path.stem}"
            stem = _TAKES[package].sub("", path.stem, 1) if package in _TAKES else path.stem
            for name, patterns in classes.items():
                if any(fnmatchcase(place, p if "/" in p else f"*/{p}") for p in patterns.split()):
                    identity = f"{package}:{_folder(path)}/{stem}"
                    if name == "speech":
                        identity = f"{package}:speaker"
                    yield Clip(identity, name, package, partial(decode_file, path))


def _opensfx() -> Iterator[Clip]:
    package = "openttd-opensfx"
    data = next(source(package).rglob("opensfx.cat")).read_bytes()
    for number, name in OPENSFX.items():
        # The index holds (offset, size); a name with its length stands before each WAV file.
        offset, size = struct.unpack_from("<II", data, 8 * number)
        offset = (offset & 0x7FFFFFFF) + 1 + data[offset & 0x7FFFFFFF]
        wav = data[offset : offset + size]
        yield Clip(f"{package}:{number}", name, package, partial(synth.decode, wav, MAX_SECONDS))


def _fonts() -> Iterator[Clip]:
    fonts = {
        "fluid-soundfont-gm": ("fluid", "*GM.sf2"),
        "musescore-general-soundfont-small": ("fluid", "*.sf3"),
        "timgm6mb-soundfont": ("tim", "*.sf2"),
    }
    for package, (family, pattern) in fonts.items():
        font = soundfonts.Font(next(source(package).rglob(pattern)))
        for identity, name, load in soundfonts.takes(family, font):
            yield Clip(identity, name, package, load)
    package = "fluid-soundfont-gs"
    font = soundfonts.Font(next(source(package).rglob("*GS.sf2")))
    for (bank, program), name in soundfonts.EFFECTS.items():
        for key in (60, 57, 63):
            notes = [soundfonts.Note(0.0, 4.0, key, 115)]
            load = partial(font.play, notes, program, bank)
            yield Clip(f"gs:{bank}:{program}", name, package, load)


def _freepats() -> Iterator[Clip]:
    package = "freepats"
    programs = {p: name for name, numbers in soundfonts.PROGRAMS.items() for p in numbers}
    keys = {k: name for name, numbers in soundfonts.DRUMS.items() for k in numbers}
    for path in sorted(source(package).rglob("*.pat")):
        number, drum = int(path.stem[:3]), path.parent.name == "Drum_000"
        name = (keys if drum else programs).get(number)
        if name is None:
            continue
        for take in range(1 if drum else 3):
            notes = soundfonts.rhythm(60, number) if drum else soundfonts.tune(number, take)
            load = partial(_play_patch, path, notes, drum)
            yield Clip(f"{package}:{path.parent.name}/{number}", name, package, load)


def _play_patch(path: Path, notes: list[soundfonts.Note], drum: bool) -> Signal:
    patches = soundfonts.read_patch(path.read_bytes())
    if drum:
        hits = [(n.start, patches[0].natural() * np.float32(n.velocity / 127)) for n in notes]
        return synth.place(hits, 3.5)
    return soundfonts.play_patches(patches, notes)


def _strums() -> Iterator[Clip]:
    package = "hydrogen-drumkits-effects"
    paths = sorted(source(package).rglob("*.flac"))
    for path in paths[:: max(1, len(paths) // 24)]:
        chord = path.stem.split("_")[0]
        yield Clip(f"{package}:{chord}", "guitar", package, partial(decode_file, path))


def _typing() -> Iterator[Clip]:
    package = "bucklespring-data"
    paths = sorted(p for p in source(package).rglob("*-1.wav"))
    for group in range(5):
        load = partial(_strikes, paths[group::5], group, (0.08, 0.3))
        yield Clip(f"{package}:{group}", "typing", package, load)


def _footsteps() -> Iterator[Clip]:
    for package, grounds in STEPS.items():
        for ground in grounds.split():
            paths = [p for p in _sound_files(package) if p.stem.startswith(ground)]
            for take in range(3):
                load = partial(_strikes, paths, take, (0.42, 0.6))
                yield Clip(f"{package}:{ground}", "footsteps", package, load)


def _strikes(paths: list[Path], seed: int, gap: tuple[float, float]) -> Signal:
    """The recordings one after another in random order, ``gap`` seconds apart."""
    rng = np.random.default_rng(seed)
    parts, at = [], 0.1
    while at < 5.5:
        parts.append((at, decode_file(paths[int(rng.integers(len(paths)))])))
        at += float(rng.uniform(*gap))
    return synth.place(parts, MAX_SECONDS)


def _surroundings() -> Iterator[Clip]:
    package = "blanket"
    data = next(source(package).rglob("*.gresource")).read_bytes()
    # A file's name stands right before its Ogg stream.
    found = list(re.finditer(rb"([a-z-]+)\.ogg.{1,24}?(?=OggS\x00\x02)", data, re.DOTALL))
    ends = [match.start() for match in found[1:]] + [len(data)]
    for match, end in zip(found, ends, strict=True):
        file = match[1].decode()
        if file in SURROUNDINGS:
            stream = data[match.end() : end]
            for part in range(4):
                load = partial(_part, stream, part)
                yield Clip(f"{package}:{file}", SURROUNDINGS[file], package, load)


def _part(data: bytes, number: int) -> Signal:
    """The ``number``-th six seconds of a long recording."""
    length = round(MAX_SECONDS * SAMPLE_RATE)
    whole = synth.decode(data, (number + 1) * MAX_SECONDS)
    return whole[number * length :]


def _samplers() -> Iterator[Clip]:
    for package, (name, program) in SAMPLERS.items():
        for take in range(6):
            load = partial(_play_sampler, package, soundfonts.tune(program, take))
            yield Clip(f"{package}:{name}", name, package, load)


@cache
def _sampler(package: str) -> tuple[soundfonts.Patch, ...]:
    """The recorded notes of an instrument whose files are named by note: "Cs3.mp3"."""
    patches = []
    for path in _sound_files(package):
        if note := re.fullmatch(r"([A-G])(s?)(\d)", path.stem):
            semitone = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[note[1]]
            key = 12 * (int(note[3]) + 1) + semitone + len(note[2])
            root = 440.0 * 2 ** ((key - 69) / 12)
            patches.append(soundfonts.Patch(decode_file(path), SAMPLE_RATE, root, None))
    return tuple(patches)


def _play_sampler(package: str, notes: list[soundfonts.Note]) -> Signal:
    """``notes`` in the octave that was recorded."""
    patches = _sampler(package)
    keys = [69 + 12 * np.log2(patch.root / 440.0) for patch in patches]
    middle = float(np.mean([note.key for note in notes]))
    shift = 12 * round((float(np.clip(middle, min(keys) + 4, max(keys) - 4)) - middle) / 12)
    return soundfonts.play_patches(patches, [replace(n, key=n.key + shift) for n in notes])


def _made() -> Iterator[Clip]:
    makers: dict[str, Callable[[np.random.Generator], Signal]] = {
        "siren": _siren,
        "beep": _beep,
        "static": _static,
        "alarm clock": _alarm,
        "heartbeat": _heartbeat,
        "clock": _clock,
    }
    for name, maker in makers.items():
        for i in range(8):
            yield Clip(f"made:{name}:{i}", name, "made", partial(_seeded, maker, [i, len(name)]))


def _seeded(maker: Callable[[np.random.Generator], Signal], seed: list[int]) -> Signal:
    return maker(np.random.default_rng(seed))


def _siren(rng: np.random.Generator) -> Signal:
    low = float(rng.uniform(400, 800))
    stepped = rng.random() < 0.4
    rate = float(rng.uniform(0.5, 1.0) if stepped else rng.choice([0.2, 0.4, 2.5, 4.0]))
    return synth.siren(low, low * float(rng.uniform(1.3, 2.2)), rate, 6.0, stepped)


def _beep(rng: np.random.Generator) -> Signal:
    return synth.beep(float(rng.uniform(500, 2600)), float(rng.uniform(0.08, 0.4)))


def _static(rng: np.random.Generator) -> Signal:
    noise = rng.standard_normal(6 * SAMPLE_RATE)
    return synth.coloured(noise, float(rng.uniform(-1.0, 3.0)))


def _alarm(rng: np.random.Generator) -> Signal:
    length = float(rng.uniform(0.05, 0.15))
    pip = synth.beep(float(rng.uniform(1000, 3400)), length, (1.0, 0.0, 0.5))
    pips, step = int(rng.choice([1, 2, 3, 4])), length * float(rng.uniform(1.6, 2.2))
    burst = synth.place([(step * i, pip) for i in range(pips)], max(0.5, step * pips + 0.3))
    return np.tile(burst, int(rng.integers(4, 7)))


def _heartbeat(rng: np.random.Generator) -> Signal:
    pitch, beat = float(rng.uniform(45, 75)), float(rng.uniform(0.6, 1.1))
    first, second = synth.thump(pitch), synth.thump(pitch * 1.25) * np.float32(0.7)
    parts = [(i * beat + d, s) for i in range(8) for d, s in ((0.0, first), (0.28 * beat, second))]
    return synth.place(parts, 5.0)


def _clock(rng: np.random.Generator) -> Signal:
    pitch, period = float(rng.uniform(1500, 4500)), float(rng.choice([0.25, 0.5, 1.0]))
    ticks = (synth.tick(rng, pitch), synth.tick(rng, pitch * float(rng.uniform(0.7, 1.0))))
    return synth.place([(i * period, ticks[i % 2]) for i in range(int(6 / period))], 6.0)


def clips() -> Iterator[Clip]:
    """Every recording of every source. Needs the packages (``sources.source`` fetches them)."""
    yield from _files()
    yield from _opensfx()
    yield from _fonts()
    yield from _freepats()
    yield from _strums()
    yield from _typing()
    yield from _footsteps()
    yield from _surroundings()
    yield from _samplers()
    for speaker, package, load in speech.voices():
        yield Clip(speaker, "speech", package, load)
    yield from _made()

"""Every recording of the source packages as a named clip.

Clips that were cut from the same recording, or spoken by the same person, share an identity and so
are in the same split. A spoken clip only teaches that somebody speaks, whatever the words are.
"""

import ctypes
import re
import shutil
import struct
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mico_training.data.table import Table
from mico_world.sounds import synth
from mico_world.sounds.synth import MAX_SECONDS, SAMPLE_RATE, Note, Signal, frequency, instruments
from mico_world.sources import source

_SUFFIXES = frozenset({".wav", ".ogg", ".oga", ".flac", ".mp3"})
_CLIPS_PER_SPEAKER = 14
_SPEECH_SECONDS = 5.0
_VARIANTS = ("", "+f2", "+m3", "+f4")  # of a synthesised voice
_RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL of espeak-ng
_UTF8 = 1


class Recording(NamedTuple):
    """A recording: ``load()`` gives it as float32 mono at 16 kHz, otherwise unchanged."""

    identity: str
    name: str
    load: Callable[[], Signal]


class Strikes(Table):
    """Sounds of many strikes, ``gap`` seconds apart: package -> patterns, one for each series."""

    gap: tuple[float, float]
    series: dict[str, tuple[str, ...]]


class Recordings(Table):
    files: dict[str, dict[str, tuple[str, ...]]]
    archives: dict[str, str]
    takes: dict[str, str]
    surroundings: dict[str, str]
    strikes: dict[str, Strikes]
    samplers: dict[str, tuple[str, int]]
    opensfx: dict[int, str]
    spoken: dict[str, str]


recordings = Recordings.reader(Path(__file__).with_name("recordings.yaml"))


def clips() -> Iterator[Recording]:
    yield from chain(_files(), _opensfx(), _fonts(), _freepats(), _strums())
    yield from chain(_series(), _surroundings(), _samplers(), _speech())
    for name in ("siren", "beep", "alarm clock", "heartbeat", "clock"):
        for i in range(8):
            yield Recording(f"made:{name}:{i}", name, partial(_make, name, i))


def decode_file(path: Path, seconds: float = MAX_SECONDS) -> Signal:
    return synth.decode(path.read_bytes(), seconds)


def _sound_files(package: str) -> list[Path]:
    """The sound files of a package, or of the archive in it that has them. Links are left out: they
    repeat other files of it. A folder "sound" may have sounds without an ending."""
    paths = sorted(_folder(package).rglob("*"))
    named = [
        p for p in paths if p.suffix in _SUFFIXES or (not p.suffix and p.parent.name == "sound")
    ]
    return [p for p in named if p.is_file() and not p.is_symlink()]


def _folder(package: str) -> Path:
    folder, archive = source(package), recordings().archives.get(package)
    if archive is None:
        return folder
    unpacked = folder / "unpacked"
    if not unpacked.is_dir():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.unpack_archive(folder / archive, Path(scratch) / "all", "zip")
            (Path(scratch) / "all").rename(unpacked)
    return unpacked


def _maker(path: Path) -> str:
    """The folder that names the maker of the sound: "owl" of "owl/sounds/call.ogg"."""
    return next(part for part in reversed(path.parts[:-1]) if part != "sounds")


def _matches(path: Path, pattern: str) -> bool:
    """Whether the stem matches the pattern, or the folders too where the pattern has any."""
    if "/" not in pattern:
        return fnmatchcase(path.stem, pattern)
    whole = path.with_suffix("").as_posix()
    return fnmatchcase(f"{_maker(path)}/{path.stem}", pattern) or fnmatchcase(whole, f"*/{pattern}")


def _files() -> Iterator[Recording]:
    for package, classes in recordings().files.items():
        takes = recordings().takes.get(package)
        for path in _sound_files(package):
            stem = re.sub(f"(?:{takes})$", "", path.stem, count=1) if takes else path.stem
            for name, patterns in classes.items():
                if any(_matches(path, pattern) for pattern in patterns):
                    identity = "speaker" if name == "speech" else f"{_maker(path)}/{stem}"
                    yield Recording(f"{package}:{identity}", name, partial(decode_file, path))


def _opensfx() -> Iterator[Recording]:
    package = "openttd-opensfx"
    data = next(source(package).rglob("opensfx.cat")).read_bytes()
    for number, name in recordings().opensfx.items():
        # The index holds (offset, size); a name with its length stands before each WAV file.
        offset, size = struct.unpack_from("<II", data, 8 * number)
        offset = (offset & 0x7FFFFFFF) + 1 + data[offset & 0x7FFFFFFF]
        wav = data[offset : offset + size]
        yield Recording(f"{package}:{number}", name, partial(synth.decode, wav, MAX_SECONDS))


def _fonts() -> Iterator[Recording]:
    for package, family, pattern in (
        ("fluid-soundfont-gm", "fluid", "*GM.sf2"),
        ("musescore-general-soundfont-small", "fluid", "*.sf3"),
        ("timgm6mb-soundfont", "tim", "*.sf2"),
        ("csound-soundfont", "csound", "*.sf2"),
    ):
        font = synth.Font(next(source(package).rglob(pattern)))
        yield from _takes(family, font)
    font = synth.Font(next(source("fluid-soundfont-gs").rglob("*GS.sf2")))
    for bank, program, name in instruments().effects:
        for key in (60, 57, 63):
            load = partial(font.play, [Note(0.0, 4.0, key, 115)], program, bank)
            yield Recording(f"gs:{bank}:{program}", name, load)


def _takes(family: str, font: synth.Font) -> Iterator[Recording]:
    """All that a General MIDI font offers. Fonts that share recordings share the ``family``: the
    MuseScore font descends from FluidR3."""
    for name, programs in instruments().programs.items():
        for program in programs:
            for take in range(3):
                load = partial(font.play, synth.tune(program, take), program)
                yield Recording(f"{family}:program:{program}", name, load)
    for name, keys in instruments().drums.items():
        for key in keys:
            load = partial(font.play, synth.rhythm(key, 0), 0, 128)
            yield Recording(f"{family}:drum:{key}", name, load)
    for take, kit in enumerate((0, 8, 16, 24, 25, 32, 40, 48)):
        load = partial(font.play, synth.beat(take), kit, 128)
        yield Recording(f"{family}:kit:{kit}", "drum", load)


def _freepats() -> Iterator[Recording]:
    package = "freepats"
    programs = {p: name for name, numbers in instruments().programs.items() for p in numbers}
    keys = {k: name for name, numbers in instruments().drums.items() for k in numbers}
    for path in sorted(source(package).rglob("*.pat")):
        number, drum = int(path.stem[:3]), path.parent.name == "Drum_000"
        name = (keys if drum else programs).get(number)
        for take in range(0 if name is None else 1 if drum else 3):
            notes = synth.rhythm(60, number) if drum else synth.tune(number, take)
            load = partial(_play_patch, path, notes, drum)
            yield Recording(f"{package}:{path.parent.name}/{number}", str(name), load)


def _play_patch(path: Path, notes: list[Note], drum: bool) -> Signal:
    patches = synth.read_patch(path.read_bytes())
    if drum:  # at the pitch of the recording and to its end
        patches = [replace(patches[0], root=frequency(60), loop=None)]
        notes = [replace(note, key=60, length=MAX_SECONDS) for note in notes]
    return synth.play_patches(patches, notes)[: round(MAX_SECONDS * SAMPLE_RATE)]


def _strums() -> Iterator[Recording]:
    package = "hydrogen-drumkits-effects"
    paths = sorted(source(package).rglob("*.flac"))
    for path in paths[:: max(1, len(paths) // 24)]:
        chord = path.stem.split("_")[0]
        yield Recording(f"{package}:{chord}", "guitar", partial(decode_file, path))


def _series() -> Iterator[Recording]:
    """Footsteps and typing, put together from the recordings of single steps and keys."""
    for name, strikes in recordings().strikes.items():
        for package, patterns in strikes.series.items():
            for pattern in patterns:
                paths = [p for p in _sound_files(package) if _matches(p, pattern)]
                for take in range(3):
                    load = partial(_strikes, paths, take, strikes.gap)
                    yield Recording(f"{package}:{pattern}", name, load)


def _strikes(paths: list[Path], seed: int, gap: tuple[float, float]) -> Signal:
    rng = np.random.default_rng(seed)
    parts, at = [], 0.1
    while at < 5.5:
        parts.append((at, decode_file(paths[int(rng.integers(len(paths)))])))
        at += float(rng.uniform(*gap))
    return synth.place(parts, MAX_SECONDS)


def _surroundings() -> Iterator[Recording]:
    def load_part(stream: bytes, part: int) -> Signal:  # each part has MAX_SECONDS
        whole = synth.decode(stream, (part + 1) * MAX_SECONDS)
        return whole[part * round(MAX_SECONDS * SAMPLE_RATE) :]

    package = "blanket"
    data = next(source(package).rglob("*.gresource")).read_bytes()
    # A file's name stands right before its Ogg stream.
    found = list(re.finditer(rb"([a-z-]+)\.ogg.{1,24}?(?=OggS\x00\x02)", data, re.DOTALL))
    ends = [match.start() for match in found[1:]] + [len(data)]
    for match, end in zip(found, ends, strict=True):
        file = match[1].decode()
        name = recordings().surroundings.get(file)
        for part in range(4 if name else 0):
            load = partial(load_part, data[match.end() : end], part)
            yield Recording(f"{package}:{file}", str(name), load)


def _samplers() -> Iterator[Recording]:
    for package, (name, program) in recordings().samplers.items():
        for take in range(6):
            load = partial(_play_sampler, package, synth.tune(program, take))
            yield Recording(f"{package}:{name}", name, load)


def _play_sampler(package: str, notes: list[Note]) -> Signal:
    """``notes``, moved by octaves into the recorded range. A file has the name of its note: "Cs3"
    is C sharp of octave 3."""
    patches = {}
    for path in _sound_files(package):
        if note := re.fullmatch(r"([A-G])(s?)(\d)", path.stem):
            semitone = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[note[1]]
            key = 12 * (int(note[3]) + 1) + semitone + len(note[2])
            patches[key] = synth.Patch(decode_file(path), SAMPLE_RATE, frequency(key), None)
    middle = float(np.mean([note.key for note in notes]))
    wanted = float(np.clip(middle, min(patches) + 4, max(patches) - 4))
    shift = 12 * round((wanted - middle) / 12)
    moved = [replace(note, key=note.key + shift) for note in notes]
    return synth.play_patches(tuple(patches.values()), moved)


def _speech() -> Iterator[Recording]:
    packages = (("tuxpaint-stamps-default", "*_desc*.ogg"), ("ktuberling-data", "*.ogg"))
    for package, pattern in packages:
        speakers: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(source(package).rglob(pattern)):
            _, found, language = path.stem.partition("_desc")
            speakers[(language or "_en") if found else path.parent.name].append(path)
        for name, paths in sorted(speakers.items()):
            step = max(1, len(paths) // _CLIPS_PER_SPEAKER)
            for path in paths[::step][:_CLIPS_PER_SPEAKER]:
                load = partial(decode_file, path, _SPEECH_SECONDS)
                yield Recording(f"{package}:{name}", "speech", load)
    package = "espeakng-loader"
    for language, text in recordings().spoken.items():
        for voice in (language + variant for variant in _VARIANTS):
            yield Recording(f"{package}:{voice}", "speech", partial(_speak, voice, text))


@cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    folder = source("espeakng-loader") / "espeakng_loader"
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    rate = int(library.espeak_Initialize(_RETRIEVAL, 0, str(folder).encode(), 0))
    if rate <= 0:
        raise OSError(f"espeak-ng found no voices in {folder}")
    return library, rate


def _speak(voice: str, sentence: str) -> Signal:
    library, rate = _espeak()
    parts: list[Signal] = []

    def collect(wave: "ctypes._Pointer[ctypes.c_short]", n: int, _events: object) -> int:
        if wave and n > 0:
            parts.append(np.ctypeslib.as_array(wave, (n,)).astype(np.float32) / np.float32(32768))
        return 0

    short = ctypes.POINTER(ctypes.c_short)
    callback = ctypes.CFUNCTYPE(ctypes.c_int, short, ctypes.c_int, ctypes.c_void_p)(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise OSError(f"espeak-ng has no voice {voice!r}")
    text = sentence.encode()
    library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    if not parts:
        raise OSError(f"espeak-ng said nothing with the voice {voice!r}")
    signal = np.concatenate(parts)
    n = min(int(len(signal) * SAMPLE_RATE / rate), round(_SPEECH_SECONDS * SAMPLE_RATE))
    return synth.at(signal, np.arange(n) * rate / SAMPLE_RATE)


def _make(name: str, number: int) -> Signal:
    rng = np.random.default_rng([number, len(name)])

    def drawn(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    if name == "siren":
        low, stepped = drawn(400, 800), rng.random() < 0.4
        rate = drawn(0.5, 1.0) if stepped else float(rng.choice([0.2, 0.4, 2.5, 4.0]))
        return synth.siren(low, low * drawn(1.3, 2.2), rate, 6.0, stepped)
    if name == "beep":
        return synth.beep(drawn(500, 2600), drawn(0.08, 0.4))
    if name == "alarm clock":
        length = drawn(0.05, 0.15)
        pip = synth.beep(drawn(1000, 3400), length, (1.0, 0.0, 0.5))
        pips, step = int(rng.choice([1, 2, 3, 4])), length * drawn(1.6, 2.2)
        burst = synth.place([(step * i, pip) for i in range(pips)], max(0.5, step * pips + 0.3))
        return np.tile(burst, int(rng.integers(4, 7)))
    if name == "heartbeat":
        pitch, beat = drawn(45, 75), drawn(0.6, 1.1)
        first, second = synth.thump(pitch), synth.thump(pitch * 1.25) * np.float32(0.7)
        beats = [
            (i * beat + d, s) for i in range(8) for d, s in ((0.0, first), (0.28 * beat, second))
        ]
        return synth.place(beats, 5.0)
    pitch, period = drawn(1500, 4500), float(rng.choice([0.25, 0.5, 1.0]))
    ticks = (synth.tick(rng, pitch), synth.tick(rng, pitch * drawn(0.7, 1.0)))
    return synth.place([(i * period, ticks[i % 2]) for i in range(int(6 / period))], 6.0)

"""Computed sounds, notes played by sound fonts and patches, and what a microphone adds.

All signals are float32 mono at ``SAMPLE_RATE``, about -1 to 1.
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tinysoundfont
from numpy.typing import NDArray

from mico_training.data.table import Table

Signal = NDArray[np.float32]
SAMPLE_RATE = 16000
MAX_SECONDS = 6.0  # of a stored clip
_EDGE = SAMPLE_RATE // 200  # 5 ms fades hide the clicks of cuts


def _time(seconds: float) -> NDArray[np.float64]:
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def fade(signal: Signal, samples: int = _EDGE) -> Signal:
    out = signal.copy()
    n = min(samples, len(out) // 2)
    if n:
        ramp = np.linspace(0.0, 1.0, n, dtype=np.float32)
        out[:n] *= ramp
        out[-n:] *= ramp[::-1]
    return out


def peak(signal: Signal, level: float = 0.9) -> Signal:
    top = float(np.abs(signal).max(initial=0.0))
    return signal * np.float32(level / top) if top > 0 else signal


def beep(frequency: float, seconds: float, harmonics: Sequence[float] = (1.0,)) -> Signal:
    return sweep(frequency, frequency, seconds, harmonics)


def sweep(start: float, stop: float, seconds: float, harmonics: Sequence[float] = (1.0,)) -> Signal:
    """A tone that glides from ``start`` to ``stop`` Hz, evenly in octaves."""
    return _glide(start * (stop / start) ** (_time(seconds) / seconds), harmonics)


def _glide(frequency: NDArray[np.float64], harmonics: Sequence[float]) -> Signal:
    """A tone of the ``frequency`` in Hz at each sample."""
    phase = 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE
    tone = sum(a * np.sin((i + 1) * phase) for i, a in enumerate(harmonics))
    return fade(peak(np.asarray(tone, dtype=np.float32)))


def knock(rng: np.random.Generator, pitch: float = 180.0) -> Signal:
    """One knock on wood: a few damped modes and a click."""
    t = _time(0.18)
    ratios = (1.0, 1.58, 2.41, 3.3)
    body = sum(
        rng.uniform(0.3, 1.0) * np.exp(-t * 30 * r) * np.sin(2 * np.pi * pitch * r * t)
        for r in ratios
    )
    click = rng.standard_normal(len(t)) * np.exp(-t * 400) * 0.5
    return fade(peak(np.asarray(body + click, dtype=np.float32)), 16)


def tick(rng: np.random.Generator, pitch: float = 2500.0) -> Signal:
    t = _time(0.05)
    sound = np.exp(-t * 140) * np.sin(2 * np.pi * pitch * t)
    sound += 0.6 * np.exp(-t * 500) * rng.standard_normal(len(t))
    return fade(peak(np.asarray(sound, dtype=np.float32)), 8)


def thump(pitch: float) -> Signal:
    t = _time(0.14)
    sound = np.exp(-t * 28) * np.sin(2 * np.pi * pitch * t * (1 - 0.8 * t))
    return fade(peak(sound.astype(np.float32)), 80)


def siren(low: float, high: float, rate: float, seconds: float, stepped: bool) -> Signal:
    wave = np.sin(2 * np.pi * rate * _time(seconds))
    wave = np.sign(wave) if stepped else wave
    return _glide(low + (high - low) * (0.5 + 0.5 * wave), (1.0, 0.4, 0.25))


def place(parts: Sequence[tuple[float, Signal]], seconds: float) -> Signal:
    """The sum of ``parts``, each of which begins at its number of seconds. Samples before 0 and
    after ``seconds`` are left out."""
    out = np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)
    for start, part in parts:
        begin = round(start * SAMPLE_RATE)
        view = out[max(0, begin) : max(0, begin + len(part))]
        skipped = max(0, -begin)
        view += part[skipped : skipped + len(view)]
    return out


def events(rng: np.random.Generator, sound: Signal, n: int) -> Signal:
    """``sound`` exactly ``n`` times, with silence between (0.2 s or more) and at both ends."""
    starts, end = [], float(rng.uniform(0.1, 0.5))
    gap = float(rng.uniform(0.2, 0.6))
    for _ in range(n):
        starts.append(end)
        end += len(sound) / SAMPLE_RATE + gap * float(rng.uniform(0.8, 1.25)) + 0.05
    gains = rng.uniform(0.75, 1.0, n)
    parts = [(s, sound * np.float32(g)) for s, g in zip(starts, gains, strict=True)]
    return place(parts, end + 0.3)


def extend(rng: np.random.Generator, signal: Signal, seconds: float, steady: bool) -> Signal:
    """``signal`` cut or lengthened to ``seconds``. A short steady signal is looped with fades.
    Any other is repeated after random rests, or with a chance of 1/4 followed by silence."""
    wanted = round(seconds * SAMPLE_RATE)
    if len(signal) >= wanted:
        offset = int(rng.integers(len(signal) - wanted + 1)) if steady else 0
        if not steady and rng.random() < 0.5:
            offset = int(rng.integers((len(signal) - wanted) // 2 + 1))
        return fade(signal[offset : offset + wanted])
    if steady:
        overlap = min(len(signal) // 4, SAMPLE_RATE // 10)
        piece, step = fade(signal, overlap), max(1, len(signal) - overlap)
        begins = range(-int(rng.integers(step)), wanted, step)
        return place([(begin / SAMPLE_RATE, piece) for begin in begins], seconds)
    piece, lone = fade(signal, 32), rng.random() < 0.25
    begin = int(rng.integers(min(wanted - len(signal) + 1, SAMPLE_RATE)))
    gap = int(rng.uniform(0.05, 0.8) * SAMPLE_RATE)
    parts: list[tuple[float, Signal]] = []
    while begin < wanted and not (lone and parts):
        parts.append((begin / SAMPLE_RATE, piece * np.float32(rng.uniform(0.7, 1.0))))
        begin += len(piece) + gap + int(rng.integers(SAMPLE_RATE // 10))
    return place(parts, seconds)


def at(signal: Signal, positions: NDArray[np.floating]) -> Signal:
    """``signal`` at ``positions``, which are counted in samples; silent after its end."""
    out = np.interp(positions, np.arange(len(signal)), signal, right=0.0)
    return np.asarray(out, dtype=np.float32)


def speed(signal: Signal, semitones: float) -> Signal:
    ratio = 2.0 ** (semitones / 12.0)
    last = len(signal) - 1
    return at(signal, np.minimum(np.arange(max(1, int(len(signal) / ratio))) * ratio, last))


def record(rng: np.random.Generator, signal: Signal) -> Signal:
    """``signal`` as a random microphone in a random room records it: a tilt of the spectrum, a band
    limit (as of a telephone), a short echo, noise 10 to 35 dB below the signal, and a gain."""
    n = len(signal)
    size = 1 << max(1, (n - 1).bit_length())
    size = size * 3 // 4 if size * 3 // 4 >= n else size
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE).astype(np.float32)
    octaves = np.log2(np.maximum(frequency, 60.0) / 1000.0)
    response = 10.0 ** (rng.uniform(-2.0, 2.0) * octaves / 20.0)
    if rng.random() < 0.4:
        response *= 1.0 / np.sqrt(1.0 + (frequency / rng.uniform(2500, 7000)) ** 8)
    if rng.random() < 0.3:
        low = np.maximum(frequency, 1.0)
        response *= 1.0 / np.sqrt(1.0 + (rng.uniform(60, 300) / low) ** 4)
    spectrum = np.fft.rfft(signal, size) * response
    if rng.random() < 0.5:
        room_n = int(rng.uniform(0.03, 0.35) * SAMPLE_RATE)
        decay = np.exp(-6.9 * np.arange(room_n, dtype=np.float32) / room_n)
        room = rng.standard_normal(room_n, dtype=np.float32) * decay
        room *= rng.uniform(0.2, 0.8) / np.sqrt((room**2).sum() + 1e-9)
        room[0] += 1.0
        spectrum *= np.fft.rfft(room, size)
    out = np.fft.irfft(spectrum, size)[:n].astype(np.float32)
    if rng.random() < 0.7:
        noise = rng.standard_normal(n, dtype=np.float32)
        width = int(rng.integers(1, 12))
        if width > 1:  # a moving average darkens the noise
            total = np.cumsum(noise, dtype=np.float32)
            total[width:] -= total[:-width].copy()
            noise = total
        ratio = 10.0 ** (-rng.uniform(10.0, 35.0) / 20.0)
        scale = ratio * np.sqrt((out**2).mean() / ((noise**2).mean() + 1e-12))
        out += noise * np.float32(scale)
    return peak(out, float(10.0 ** (rng.uniform(-18.0, -0.5) / 20.0)))


def flac(signal: Signal) -> bytes:
    pcm = (np.clip(signal, -1.0, 1.0) * 32767.0).astype(np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(pcm[None, :], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def decode(data: bytes, max_seconds: float) -> Signal:
    """An encoded sound file as a signal of at most ``max_seconds``."""
    if data[:4] == b"RIFF" and b"OggS" in data[:256]:  # an Ogg stream in a WAV envelope
        data = data[data.index(b"OggS") :]
    wanted, parts, have = round(max_seconds * SAMPLE_RATE), [], 0
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(io.BytesIO(data), "r", metadata_errors="replace") as container:
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                parts.append(part.to_ndarray()[0])
                have += len(parts[-1])
            if have >= wanted:
                break
        else:
            parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)[:wanted]


_EFFECT_PROGRAMS = range(115, 128)
_SCALE = (0, 2, 4, 5, 7, 9, 11, 12)


class Instruments(Table):
    programs: dict[str, tuple[int, ...]]
    drums: dict[str, tuple[int, ...]]
    effects: tuple[tuple[int, int, str], ...]
    low_programs: frozenset[int]
    high_programs: frozenset[int]


instruments = Instruments.reader(Path(__file__).with_name("instruments.yaml"))


@dataclass(frozen=True)
class Note:
    start: float
    length: float
    key: int
    velocity: int


def frequency(key: int) -> float:
    return 440.0 * float(2 ** ((key - 69) / 12))


def tune(program: int, take: int) -> list[Note]:
    """3 to 4 seconds of notes for ``program``; ``take`` chooses a melody, long notes or chords."""
    rng = np.random.default_rng([program, take])
    low, high = program in instruments().low_programs, program in instruments().high_programs
    root = (40 if low else 68 if high else 57) + int(rng.integers(-4, 8))
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
    def __init__(self, file: Path) -> None:
        self._synth = tinysoundfont.Synth(gain=-6.0, samplerate=SAMPLE_RATE)
        self._font = self._synth.sfload(str(file))

    def play(self, notes: Sequence[Note], program: int, bank: int = 0, tail: float = 0.5) -> Signal:
        """Play ``notes`` on the instrument ``program``; the ``bank`` 128 holds the drum kits."""
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
    signal: Signal
    sample_rate: int
    root: float  # Hz
    loop: tuple[int, int] | None  # frames

    def play(self, note: Note) -> Signal:
        ratio = frequency(note.key) / self.root * self.sample_rate / SAMPLE_RATE
        positions = np.arange(int(note.length * SAMPLE_RATE)) * ratio
        if self.loop is not None:
            start, end = self.loop
            past = positions >= end
            positions[past] = start + (positions[past] - start) % (end - start)
        return fade(at(self.signal, positions), 160) * np.float32(note.velocity / 127)


def read_patch(data: bytes) -> list[Patch]:
    """The recorded keys of a GUS .pat file (GF1PATCH110), lowest first."""
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
    parts = []
    for note in notes:
        wanted = frequency(note.key)
        nearest = min(patches, key=lambda patch: abs(np.log2(patch.root / wanted)))
        parts.append((note.start, nearest.play(note)))
    return place(parts, max(n.start + n.length for n in notes) + 0.2)

"""Sound by arithmetic: tones and events with exact truth, and the changes a recording goes through.

All signals are float32 mono at ``SAMPLE_RATE``, about -1 to 1. Filters, noise and a room are
applied together in one pass through the frequency domain, so that a clip costs milliseconds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float32]
SAMPLE_RATE = 16000
_EDGE = SAMPLE_RATE // 200  # 5 ms fades hide the clicks of cuts


def _time(seconds: float) -> NDArray[np.float64]:
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def fade(signal: Signal, samples: int = _EDGE) -> Signal:
    """``signal`` with both ends faded over ``samples``."""
    out = signal.copy()
    n = min(samples, len(out) // 2)
    if n:
        ramp = np.linspace(0.0, 1.0, n, dtype=np.float32)
        out[:n] *= ramp
        out[-n:] *= ramp[::-1]
    return out


def peak(signal: Signal, level: float = 0.9) -> Signal:
    """``signal`` scaled to a peak of ``level``; silence stays silence."""
    top = float(np.abs(signal).max(initial=0.0))
    return signal * np.float32(level / top) if top > 0 else signal


def coloured(noise: NDArray[np.float64], slope: float) -> Signal:
    """White ``noise`` with a spectrum falling by ``slope`` dB an octave; peak 1."""
    spectrum = np.fft.rfft(noise)
    frequency = np.maximum(np.fft.rfftfreq(len(noise), 1 / SAMPLE_RATE), 20.0)
    spectrum *= (frequency / 1000.0) ** (-slope / 6.02)
    return peak(np.fft.irfft(spectrum, len(noise)).astype(np.float32), 1.0)


def beep(frequency: float, seconds: float, harmonics: Sequence[float] = (1.0,)) -> Signal:
    """A steady tone with the given strengths of its harmonics."""
    t = _time(seconds)
    tone = sum(a * np.sin(2 * np.pi * frequency * (i + 1) * t) for i, a in enumerate(harmonics))
    return fade(peak(np.asarray(tone, dtype=np.float32)))


def sweep(start: float, stop: float, seconds: float, harmonics: Sequence[float] = (1.0,)) -> Signal:
    """A tone that glides from ``start`` to ``stop`` Hz, evenly in octaves."""
    t = _time(seconds)
    frequency = start * (stop / start) ** (t / seconds)
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
    """One tick of a clock: a very short, bright resonance."""
    t = _time(0.05)
    sound = np.exp(-t * 140) * np.sin(2 * np.pi * pitch * t)
    sound += 0.6 * np.exp(-t * 500) * rng.standard_normal(len(t))
    return fade(peak(np.asarray(sound, dtype=np.float32)), 8)


def thump(pitch: float, seconds: float = 0.14) -> Signal:
    """One low thump, as of a heart."""
    t = _time(seconds)
    sound = np.exp(-t * 28) * np.sin(2 * np.pi * pitch * t * (1 - 0.8 * t))
    return fade(peak(sound.astype(np.float32)), 80)


def siren(low: float, high: float, rate: float, seconds: float, stepped: bool) -> Signal:
    """A siren between two pitches, ``rate`` times a second; ``stepped`` has two tones."""
    t = _time(seconds)
    wave = np.sin(2 * np.pi * rate * t)
    wave = np.sign(wave) if stepped else wave
    phase = 2 * np.pi * np.cumsum(low + (high - low) * (0.5 + 0.5 * wave)) / SAMPLE_RATE
    tone = np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.25 * np.sin(3 * phase)
    return fade(peak(tone.astype(np.float32)))


def place(parts: Sequence[tuple[float, Signal]], seconds: float) -> Signal:
    """``parts`` added up, each from its start in seconds; what lies outside is cut."""
    out = np.zeros(round(seconds * SAMPLE_RATE), dtype=np.float32)
    for start, part in parts:
        begin = round(start * SAMPLE_RATE)
        end = min(len(out), begin + len(part))
        if end > begin:
            out[begin:end] += part[: end - begin]
    return out


def events(rng: np.random.Generator, sound: Signal, n: int, tail: float = 0.3) -> Signal:
    """``sound`` exactly ``n`` times, at least 0.2 s of rest between, with rests at both ends."""
    length = len(sound) / SAMPLE_RATE
    starts, at = [], float(rng.uniform(0.1, 0.5))
    gap = float(rng.uniform(0.2, 0.6))
    for _ in range(n):
        starts.append(at)
        at += length + gap * float(rng.uniform(0.8, 1.25)) + 0.05
    gains = rng.uniform(0.75, 1.0, n)
    parts = [(s, sound * np.float32(g)) for s, g in zip(starts, gains, strict=True)]
    return place(parts, at + tail)


def extend(rng: np.random.Generator, signal: Signal, seconds: float, steady: bool) -> Signal:
    """``signal`` cut or lengthened to ``seconds``.

    A long one is cropped at random. A short steady one is looped with cross-fades; any other is
    repeated after random rests, or now and then left alone in silence.
    """
    wanted = round(seconds * SAMPLE_RATE)
    if len(signal) >= wanted:
        offset = int(rng.integers(len(signal) - wanted + 1)) if steady else 0
        if not steady and rng.random() < 0.5:
            offset = int(rng.integers((len(signal) - wanted) // 2 + 1))
        return fade(signal[offset : offset + wanted])
    out = np.zeros(wanted, dtype=np.float32)
    if steady:
        overlap = min(len(signal) // 4, SAMPLE_RATE // 10)
        piece, step = fade(signal, overlap), max(1, len(signal) - overlap)
        for begin in range(-int(rng.integers(step)), wanted, step):
            start, end = max(0, begin), min(wanted, begin + len(piece))
            out[start:end] += piece[start - begin : end - begin]
        return out
    piece = fade(signal, 32)
    lone = rng.random() < 0.25
    begin = int(rng.integers(min(wanted - len(signal) + 1, SAMPLE_RATE)))
    gap = int(rng.uniform(0.05, 0.8) * SAMPLE_RATE)
    while begin < wanted:
        end = min(wanted, begin + len(piece))
        out[begin:end] += piece[: end - begin] * np.float32(rng.uniform(0.7, 1.0))
        begin += len(piece) + gap + int(rng.integers(SAMPLE_RATE // 10))
        if lone:
            break
    return out


def speed(signal: Signal, semitones: float) -> Signal:
    """``signal`` played faster (up) or slower (down) by ``semitones``."""
    ratio = 2.0 ** (semitones / 12.0)
    n = max(1, int(len(signal) / ratio))
    positions = np.arange(n) * ratio
    out: Signal = np.interp(positions, np.arange(len(signal)), signal).astype(np.float32)
    return out


def record(rng: np.random.Generator, signal: Signal, *, quiet_ok: bool = True) -> Signal:
    """``signal`` as some microphone in some room would give it.

    A tilt of the spectrum, a band limit (telephone, old codec), a short room, background noise
    10 to 35 dB below, a gain. The length stays.
    """
    n = len(signal)
    size = 1 << max(1, (n - 1).bit_length())
    if size * 3 // 4 >= n:
        size = size * 3 // 4
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
    return peak(out, float(10.0 ** (rng.uniform(-18.0 if quiet_ok else -6.0, -0.5) / 20.0)))


def flac(signal: Signal) -> bytes:
    """``signal`` as a FLAC file: mono, 16 bits, ``SAMPLE_RATE``."""
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
    """An encoded sound file as a signal; what follows after ``max_seconds`` is cut.

    Raises av.error.FFmpegError for what cannot be decoded.
    """
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

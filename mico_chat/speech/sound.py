"""Samples to the bytes of a sound file, piece by piece, as they are made."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from fractions import Fraction
from typing import Literal

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from numpy.typing import NDArray

SoundFormat = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

TYPES: dict[SoundFormat, str] = {
    **{"mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac", "flac": "audio/flac"},
    **{"wav": "audio/wav", "pcm": "audio/pcm"},
}
"""The media type of each format. ``pcm`` is 16 bits, little-endian, without a header."""

_MUXERS: dict[SoundFormat, tuple[str, str]] = {
    **{"mp3": ("mp3", "libmp3lame"), "opus": ("ogg", "libopus"), "aac": ("adts", "aac")},
    **{"flac": ("flac", "flac"), "wav": ("wav", "pcm_s16le")},
}

_BIT_RATES = {"libmp3lame": 64_000, "libopus": 32_000, "aac": 64_000}


class _Pipe:
    """A file that is written and never read: FFmpeg cannot go back in it to correct a header."""

    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> int:
        self.written += data
        return len(data)

    def taken(self) -> bytes:
        data = bytes(self.written)
        self.written.clear()
        return data


def pcm16(samples: NDArray[np.float32]) -> bytes:
    """Samples (n,) in [-1, 1] as 16 bits, little-endian."""
    return (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def encoded(
    chunks: Iterable[NDArray[np.float32]], sample_rate: int, form: SoundFormat
) -> Generator[bytes, None, None]:
    """The bytes of a mono file of ``chunks`` (n,): some for each chunk, as far as they are known.

    The length in a header is that of a file whose end nobody knows yet.
    """
    if form == "pcm":
        yield from map(pcm16, chunks)
        return
    pipe = _Pipe()
    muxer, codec = _MUXERS[form]
    with av.open(pipe, "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=sample_rate, layout="mono")
        assert isinstance(stream, AudioStream)
        if codec in _BIT_RATES:
            stream.bit_rate = _BIT_RATES[codec]
        done = 0
        for samples in chunks:
            data = np.frombuffer(pcm16(samples), "<i2")[None]
            frame = AudioFrame.from_ndarray(data, format="s16", layout="mono")
            frame.sample_rate, frame.pts = sample_rate, done
            frame.time_base = Fraction(1, sample_rate)
            done += len(samples)
            container.mux(stream.encode(frame))
            if piece := pipe.taken():
                yield piece
        container.mux(stream.encode(None))
    if rest := pipe.taken():
        yield rest


# --- Telephones (ITU-T G.711) ---


def _expanded(mu: bool) -> NDArray[np.float32]:
    """The sample that each of the 256 codes stands for, in [-1, 1]."""
    code = np.arange(256) ^ (0xFF if mu else 0x55)
    exponent, mantissa = (code >> 4) & 7, code & 15
    if mu:
        value = (((mantissa << 3) + 0x84) << exponent) - 0x84
    else:
        value = ((mantissa << 4) + 8 + (exponent > 0) * 0x100) << np.maximum(exponent - 1, 0)
    positive = (code & 0x80) == (0 if mu else 0x80)
    return (np.where(positive, value, -value) / 32768).astype(np.float32)


_CODES = {"audio/pcmu": _expanded(True), "audio/pcma": _expanded(False)}
RATES = {"audio/pcm": 24_000, "audio/pcmu": 8_000, "audio/pcma": 8_000}
"""Samples a second of each form of raw sound, in Hz."""


def to_raw(samples: NDArray[np.float32], form: str) -> bytes:
    """Samples (n,) in [-1, 1] at the form's rate, without a header."""
    if form == "audio/pcm":
        return pcm16(samples)
    values = _CODES[form]
    order = np.argsort(values, kind="stable")
    edges = (values[order][1:] + values[order][:-1]) / 2
    return order[np.searchsorted(edges, samples)].astype(np.uint8).tobytes()


def from_raw(data: bytes, form: str) -> NDArray[np.float32]:
    """Samples (n,) of raw sound; PCM must have whole samples."""
    if form == "audio/pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(1 / 32768)
    return _CODES[form][np.frombuffer(data, np.uint8)]

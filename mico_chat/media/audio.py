"""Sounds: any container, codec, rate and channel layout to 16 kHz mono float32."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, BinaryIO

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Stream
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.medium import SAMPLE_RATE, Audio

log = logging.getLogger(__name__)

MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 100, 1_000_000
"""The rate is in Hz. A header with another rate is damaged or hostile. The highest rate in use is
768,000. Below 100, a few bytes would become seconds of sound."""

_MAX_CHUNKS = 10_000  # of a WAV before its samples; usual files have four or five


def decode_audio(file: MediaFile, limits: MediaLimits) -> Audio:
    """Decode the first ``limits.max_seconds`` of a sound file, or of a clip's sound track."""
    fmt = file.format
    if fmt == "WAV":
        _check_claim(file)
    with (
        decoder_errors(file, limits, f"damaged {fmt} (no sound can be decoded)"),
        opened(file, fmt) as container,
    ):
        if not container.streams.audio:
            raise MediaError(file.name, f"no sound track in this {fmt} file")
        return read_sound(file, fmt, container, limits)


def read_sound(file: MediaFile, fmt: str, container: InputContainer, limits: MediaLimits) -> Audio:
    stream = container.streams.audio[0]
    track = Track(file, stream)
    wanted = int(limits.max_seconds * SAMPLE_RATE)
    blocks: list[NDArray[np.float32]] = []
    n = 0
    for block in track.blocks(frames_of(container, stream, track.damage)):
        blocks.append(block)
        n += len(block)
        if n > wanted:
            break
    if n == 0:
        raise file.damaged(
            f"no sound can be decoded from this {fmt} file (no samples, damaged or cut off)"
        )
    samples = joined(blocks)[:wanted]

    seconds = len(samples) / SAMPLE_RATE
    cut = []
    promised = float((stream.duration or 0) * (stream.time_base or 0))
    if n > wanted:
        whole = f" of {promised:.1f} s" if promised > seconds else ""
        cut.append(f"only the first {seconds:.1f} s{whole} of sound are used")
    elif fmt != "MP3" and promised > seconds * 1.1 + 1:
        # Not of MP3: without an index, its length is guessed from the bit rate.
        ends = f"the file says {promised:.1f} s but holds {seconds:.1f} s"
        cut.append(f"the sound ends early: {ends}")
    if track.damage:
        cut.append(f"{len(track.damage)} damaged pieces of sound are left out")
    found = {"sample_rate": track.rate, "channels": track.channels, "cut": cut}
    return Audio(samples, report=file.report(fmt, kind="audio", seconds=seconds, **found))


def joined(blocks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Blocks of samples as one, (n,), in [-1, 1] whatever was decoded."""
    samples = np.concatenate(blocks)
    samples = np.nan_to_num(samples, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.clip(samples, -1.0, 1.0, out=samples)


def _check_claim(file: MediaFile) -> None:
    """Refuse a WAV whose header does not end, or claims over twice the sound in the file.

    Accepted is a file with FFmpeg's signature: FFmpeg claims 4 GB when it writes to a pipe.
    """
    with file.open() as stream:
        unknown = stream.read(12)[4:8] == b"\xff" * 4
        signed, long_size = False, None
        for _ in range(_MAX_CHUNKS):
            if len(chunk := stream.read(8)) < 8:
                return
            name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
            start = stream.tell()
            if name == b"ds64":  # of an RF64 file
                long_size = int.from_bytes(stream.read(16)[8:], "little")
            elif name == b"LIST":
                signed = b"Lavf" in stream.read(min(size, 1024))
            elif name == b"data":
                claims, holds = long_size or size, file.size - start
                if 0 < 2 * holds < claims and not (unknown and signed):
                    found = f"claims {claims:,} bytes of sound but the file holds {holds:,}"
                    raise file.damaged(f"its header {found}; it is cut off or damaged")
                return
            stream.seek(start + size + size % 2)
        where = f"behind the first {_MAX_CHUNKS:,} parts of its header"
        raise file.damaged(f"damaged WAV (no sound {where})")


@dataclass
class Track:
    """A stream of sound, of whatever rate and channels; ``rate`` and ``channels`` are the first."""

    file: MediaFile
    stream: AudioStream
    rate: int = 0
    channels: int = 0
    damage: list[Exception] = field(default_factory=list)

    def blocks(self, frames: Iterable[AudioFrame]) -> Iterator[NDArray[np.float32]]:
        """The frames' samples in blocks, float32 (n,) at 16 kHz mono."""
        if self.stream.codec_context is None:  # decoding would crash PyAV 15
            raise MediaError(self.file.name, "its codec is unknown", "unsupported")
        resampler: AudioResampler | None = None
        current: tuple[object, ...] = ()
        for frame in frames:
            shape = (frame.format.name, frame.layout.name, frame.sample_rate)
            if resampler is None or shape != current:  # some streams change their format
                if resampler is not None:
                    yield from map(_mono, resampler.resample(None))
                self._check(frame)
                resampler, current = AudioResampler("flt", frame.layout, SAMPLE_RATE), shape
            frame.pts = None  # so that wrong timestamps add or drop no samples
            yield from map(_mono, resampler.resample(frame))
        if resampler is not None:
            yield from map(_mono, resampler.resample(None))

    def _check(self, frame: AudioFrame) -> None:
        rate, channels = frame.sample_rate, frame.layout.nb_channels
        if not MIN_RATE <= rate <= MAX_RATE:
            raise self.file.damaged(
                f"its header claims {rate} samples a second; it must be {MIN_RATE} to {MAX_RATE}"
            )
        if not 0 < channels <= MAX_CHANNELS:
            raise self.file.damaged(
                f"its header claims {channels} channels; the most is {MAX_CHANNELS}"
            )
        if not self.rate:
            self.rate, self.channels = rate, channels


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """The mean of the channels, (n,). FFmpeg would add float channels, beyond the range [-1, 1]."""
    interleaved = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    mono: NDArray[np.float32] = interleaved.mean(axis=1, dtype=np.float32)
    return mono


# FFmpeg's demuxers whose name is not the format's. The demuxer is always given: if FFmpeg guessed
# it from the bytes, a playlist (HLS, concat) could open other files and addresses.
_DEMUXERS = {"MP4": "mov", "MOV": "mov", "M4A": "mov", "WebM": "matroska"}


def _interruptible(stream: BinaryIO) -> Any:
    """A stream whose methods are Python code, in which the time limit's signal can interrupt."""
    return SimpleNamespace(
        read=lambda n: stream.read(n),
        seek=lambda offset, whence=0: stream.seek(offset, whence),
        tell=lambda: stream.tell(),
    )


def index_of(stream: Stream) -> Sequence[Any]:
    """The container's index of a stream: PyAV's ``IndexEntry`` objects; empty before PyAV 17."""
    return list(getattr(stream, "index_entries", ()))


def frames_of(container: InputContainer, stream: Stream, damage: list[Exception]) -> Iterator[Any]:
    """A stream's frames. Errors of skipped packets, and of an early end, go to ``damage``."""
    for packet in packets_of(container, [stream], damage):
        yield from decoded(packet, damage)


def packets_of(
    container: InputContainer, streams: Sequence[Stream], damage: list[Exception]
) -> Iterator[Any]:
    """The packets of some streams, in the file's order. An early end goes to ``damage``."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, None)
        except (av.InvalidDataError, av.EOFError, OSError) as error:
            log.debug("reading stopped: %r", error)
            damage.append(error)
            return
        if packet is None:
            return
        # Theora's empty packet stands for the frame before it. FFmpeg takes none; the one without
        # a time is PyAV's own, for the frames that a decoder still holds.
        if packet.size or packet.dts is None:
            yield packet


def decoded(packet: Any, damage: list[Exception]) -> Sequence[Any]:
    """A packet's frames; none, and the error in ``damage``, if it cannot be decoded."""
    try:
        return packet.decode()  # type: ignore[no-any-return]
    except (av.InvalidDataError, av.EOFError) as error:
        log.debug("packet left out: %r", error)
        damage.append(error)
        return ()


@contextmanager
def opened(file: MediaFile, fmt: str) -> Iterator[InputContainer]:
    with file.open() as stream:
        try:
            source, demuxer = _interruptible(stream), _DEMUXERS.get(fmt, fmt.lower())
            container = av.open(source, "r", format=demuxer, metadata_errors="ignore")
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError, OSError) as error:
            raise file.damaged(
                f"damaged {fmt} (its header or index cannot be read; the file may be cut off)"
            ) from error
        with container:
            for listed in (len(index_of(stream)) for stream in container.streams):
                if listed > file.size:
                    found = f"{listed:,} pieces of data in a file of {file.size:,} bytes"
                    raise file.damaged(f"damaged {fmt} (its index lists {found})")
            yield container

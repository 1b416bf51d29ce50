"""The frames and the sound of a clip: parts of a file, found by seeking."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, TypeVar

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media import SAMPLE_RATE, Audio, MediaFile, MediaLimits, Video
from mico_chat.media.audio import Track, joined
from mico_chat.media.audio import frames_of as frames_of_stream
from mico_chat.media.video import FrameReader, Timeline, tick_of, upright_pixels, upright_size
from mico_corpus.cutting.container import name_of, opened, pictures_of, sound_stream, zero_of
from mico_corpus.rows import Row

KEPT_BYTES = 256 * 1024 * 1024
"""Decoded frames take at most this many bytes of memory, and sounds as many."""
WARM_UP = 0.5
"""So many seconds before a range are decoded and left out: codecs need what came before."""

T = TypeVar("T", Video, Audio | None)


def frames_of(row: Row, n: int, side: int) -> Video:
    """``n`` frames of a clip, those shown at the middles of equal parts, upright.

    No side is longer than ``side``. Of a part that cannot be decoded, the frame is one near it.

    Raises:
        MediaError: no frame can be decoded.
    """
    key = (row["address"], row["member"], row["start"], row["end"], n, side)
    return _videos.get(key, lambda: _frames(row, n, side))


def _frames(row: Row, n: int, side: int) -> Video:
    limits = MediaLimits(max_side=side)
    start, length = row["start"], row["end"] - row["start"]
    with opened(row) as container:
        stream = pictures_of(row, container)
        limits.check_pixels(name_of(row), stream.width, stream.height)
        base, zero = stream.time_base or Fraction(1, av.time_base), zero_of(container)
        targets = [
            round((start + length * (2 * i + 1) / (2 * n) + zero) / float(base)) for i in range(n)
        ]
        reader = FrameReader(container, stream, _timeline(stream, base, targets[0], targets[-1]))
        pixels: list[NDArray[np.uint8]] = []
        times: list[float] = []
        try:
            for target in targets:
                frame = reader.at(target)
                if frame is None:
                    continue
                limits.check_pixels(name_of(row), frame.width, frame.height)
                if not pixels:
                    size = limits.fitted(*upright_size(frame))
                pixels.append(upright_pixels(frame, size))
                times.append(float(tick_of(frame) * base) - zero - start)
        except av.FFmpegError as error:
            raise MediaError(name_of(row), _undecodable(row), "damaged") from error
    if not pixels:
        raise MediaError(name_of(row), _undecodable(row), "damaged")
    return Video(np.stack(pixels), np.array(times))


def _undecodable(row: Row) -> str:
    return f"no frame can be decoded between {row['start']:.2f} and {row['end']:.2f} s"


def _timeline(stream: VideoStream, base: Fraction, first: int, last: int) -> Timeline:
    """What a reader of frames between two ticks needs: the keyframes, where an index names them."""
    start = stream.start_time or 0
    keyframes: list[int] = []
    index = getattr(stream, "index_entries", ())  # PyAV 17 and later
    if index:
        shift = start - index[0].timestamp  # decoding times, as in mico_chat.media.video
        low, high = (index.search_timestamp(tick - shift) for tick in (first, last))
        part = index[max(0, low) : max(0, high) + 1]
        keyframes = [entry.timestamp + shift for entry in part if entry.is_keyframe]
    return Timeline(base, last, [start], keyframes)


def sound_of(row: Row) -> Audio | None:
    """The sound of a clip, 16 kHz mono; None if there is none, or it cannot be decoded.

    It starts with the clip: silence stands for what the sound track lacks there.

    Raises:
        MediaError: the file cannot be opened.
    """
    key = (row["address"], row["member"], row["start"], row["end"])
    return _sounds.get(key, lambda: _sound(row))


def _sound(row: Row) -> Audio | None:
    start, end = row["start"], row["end"]
    with opened(row) as container:
        stream = sound_stream(container)
        if stream is None:
            return None
        part = _Part(start, end, zero_of(container))
        track = Track(MediaFile("audio", b"", name_of(row)), stream)
        base = stream.time_base or Fraction(1, av.time_base)
        if start > WARM_UP:
            with suppress(av.FFmpegError):  # what cannot seek is decoded from its start
                goal = round((start - WARM_UP + part.zero) / float(base))
                container.seek(goal, stream=stream)
        blocks = []
        with suppress(av.FFmpegError, MediaError):
            for block in track.blocks(part.of(frames_of_stream(container, stream, track.damage))):
                blocks.append(block)
    if not blocks:
        return None
    samples = joined(blocks)
    late = round((part.first - start) * SAMPLE_RATE)
    samples = np.pad(samples, (late, 0)) if late > 0 else samples[-late:]
    samples = samples[: round((end - start) * SAMPLE_RATE)]
    return Audio(samples) if len(samples) else None


@dataclass
class _Part:
    """The frames of a sound between two times; ``first`` is where they begin."""

    start: float
    end: float
    zero: float
    first: float = 0.0

    def of(self, frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
        after, found = 0.0, False
        for frame in frames:
            time = after if frame.time is None else frame.time - self.zero
            after = time + frame.samples / max(1, frame.sample_rate)
            if time >= self.end:
                return
            if after <= self.start:
                continue
            if not found:
                self.first, found = time, True
            yield frame


class _Recent(Generic[T]):
    """The last clips that were decoded, so that the annotators of a process share them."""

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._held:
            self._held[key] = made = make()
            self._bytes += _bytes(made)
            while self._bytes > KEPT_BYTES and len(self._held) > 1:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])
        self._held.move_to_end(key)
        return self._held[key]


def _bytes(medium: Video | Audio | None) -> int:
    match medium:
        case Video():
            return medium.frames.nbytes
        case Audio():
            return medium.samples.nbytes
    return 0


_videos: _Recent[Video] = _Recent()
_sounds: _Recent[Audio | None] = _Recent()

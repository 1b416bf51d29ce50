"""When a clip's frames are shown and which can be jumped to, without decoding any."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from mico_chat.media.container import index_of


@dataclass(frozen=True)
class Timeline:
    """Times of a video stream, in ticks of ``time_base`` seconds.

    ``start`` is when the first frame is shown, ``end`` when the last one stops being shown;
    ``keyframes`` are sorted.
    """

    time_base: Fraction
    start: int
    end: int
    n_frames: int
    keyframes: list[int]

    @property
    def seconds(self) -> float:
        return float((self.end - self.start) * self.time_base)

    def centres(self, n: int) -> list[int]:
        """Ticks at the centres of ``n`` equal intervals of the clip."""
        length = self.end - self.start
        return [self.start + (2 * i + 1) * length // (2 * n) for i in range(n)]

    def keyframe_before(self, tick: int) -> int:
        """The last keyframe at or before ``tick``; the start when there is none."""
        i = bisect.bisect_right(self.keyframes, tick)
        return self.keyframes[i - 1] if i else self.start


def timeline_of(container: InputContainer, stream: VideoStream, n_bytes: int) -> Timeline | None:
    """The timeline of a stream; None when it has no frames.

    Durations and frame counts that headers claim are not believed: the times come from the
    container's index of frames (MP4, MOV, AVI), as far as the ``n_bytes`` of the file reach, or,
    where that is missing (WebM, fragmented MP4), from reading the packets. Reading leaves the
    container at its end: seek before decoding.
    """
    ticks, keyframes = _indexed(stream, n_bytes)
    if len(ticks) < 2 or len(ticks) < stream.frames or not stream.frames:
        scanned, scanned_keyframes = _scanned(container, stream)
        if scanned or not ticks:
            ticks, keyframes = scanned, scanned_keyframes
    if not ticks:
        return None
    ticks.sort()
    keyframes.sort()
    return Timeline(
        time_base=stream.time_base or Fraction(1, av.time_base),
        start=ticks[0],
        end=ticks[-1] + _frame_ticks(stream, ticks),
        n_frames=len(ticks),
        keyframes=keyframes,
    )


def _frame_ticks(stream: VideoStream, ticks: list[int]) -> int:
    """How long the last frame is shown: as long as the mean of the others."""
    if len(ticks) > 1:
        return max(1, (ticks[-1] - ticks[0]) // (len(ticks) - 1))
    rate, base = stream.average_rate, stream.time_base
    return max(1, round(1 / (rate * base))) if rate and base else 1


def _indexed(stream: VideoStream, n_bytes: int) -> tuple[list[int], list[int]]:
    ticks, keyframes = [], []
    for entry in index_of(stream):
        if entry.is_discard or entry.pos + entry.size > n_bytes:
            continue
        ticks.append(entry.timestamp)
        if entry.is_keyframe:
            keyframes.append(entry.timestamp)
    # An index is in decoding time, which runs ahead of display time where frames are reordered.
    shift = stream.start_time - min(ticks) if ticks and stream.start_time is not None else 0
    return [tick + shift for tick in ticks], [tick + shift for tick in keyframes]


def _scanned(container: InputContainer, stream: VideoStream) -> tuple[list[int], list[int]]:
    ticks, keyframes = [], []
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.InvalidDataError:
            break  # the rest is damaged; what came before has its times
        if packet is None:
            break
        tick = packet.pts if packet.pts is not None else packet.dts
        if packet.size == 0 or tick is None or packet.is_discard:
            continue
        ticks.append(tick)
        if packet.is_keyframe:
            keyframes.append(tick)
    return ticks, keyframes

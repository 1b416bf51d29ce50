"""Clips: frames at even distances over the whole clip, found by seeking, and the sound track."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media.audio import frames_of, index_of, opened, read_sound
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.image import scaled_words
from mico_chat.media.medium import Audio, Video
from mico_chat.media.sampling import of_segments


def decode_video(file: MediaFile, limits: MediaLimits) -> Video:
    """Take the frames that the file's ``view``, ``sampling`` and ``seed`` and the limits say.

    Without them, the frames are those shown at the centres of equal intervals of the clip. A
    frame's time is when it appeared, in seconds from the clip's start. Only the frames taken, and
    one more, are in memory.
    """
    fmt = file.format
    cut: list[str] = []
    with (
        decoder_errors(file, limits, f"damaged {fmt} (its frames cannot be decoded)"),
        opened(file, fmt) as container,
    ):
        stream = _video_stream(file, fmt, container)
        limits.check_pixels(file.name, stream.width, stream.height)
        timeline = timeline_of(container, stream, file.size)
        if timeline is None:
            raise file.damaged(f"the video stream of this {fmt} file has no frames")
        reader = FrameReader(container, stream, timeline)
        n = limits.frames_of(file.name, file.view, timeline.seconds(timeline.end))
        targets = _targets(file, timeline, min(n, timeline.n_frames))
        taken, upright = _take(file, reader, targets, limits)
        has_sound = bool(container.streams.audio)
        if not taken:
            raise file.damaged(f"damaged {fmt} (its frames cannot be decoded)")
        frames = np.stack(list(taken.values()))  # (T, H, W, 3)
        times = np.array([timeline.seconds(tick) for tick in taken], np.float64)
    if reader.damage:
        cut.append(f"{len(reader.damage)} damaged pieces of video are left out")
    if len(taken) < timeline.n_frames:
        how = "evenly spaced" if file.seed is None else "drawn at random"
        cut.append(f"{len(taken)} of {timeline.n_frames} frames are used, {how}")

    cut += scaled_words(upright, (frames.shape[2], frames.shape[1]))
    audio = _sound_track(file, fmt, limits, cut) if has_sound else None
    report = file.report(
        fmt,
        width=upright[0],
        height=upright[1],
        seconds=timeline.seconds(timeline.end),
        frames_used=len(taken),
        frames_total=timeline.n_frames,
        frame_times=[round(float(t), 3) for t in times],
        sample_rate=audio.report.sample_rate if audio else None,
        channels=audio.report.channels if audio else None,
        audio_used=audio is not None if has_sound else None,
        cut=cut,
    )
    return Video(frames, times, audio, report=report)


def _targets(file: MediaFile, timeline: Timeline, n: int) -> list[int]:
    """The ticks at which the ``n`` frames to take are shown."""
    if file.seed is None and file.sampling != "segments":
        seconds = timeline.seconds(timeline.end)
        if file.view.sampler is None or file.view.frames(seconds) is not None:
            return timeline.centres(n)
        own = file.view.sampler(timeline.n_frames, seconds)
        kept = np.linspace(
            0, len(own) - 1, min(n, len(own))
        ).round()  # those that there is room for
        return [timeline.ticks[own[int(at)]] for at in kept]
    drawn = None if file.seed is None else np.random.default_rng(file.seed)
    return [timeline.ticks[i] for i in of_segments(timeline.n_frames, n, drawn)]


def _video_stream(file: MediaFile, fmt: str, container: InputContainer) -> VideoStream:
    if stream := picture_stream(container):
        return stream
    found = "sound but no video; attach it as audio"
    if not container.streams.audio:
        found = "no streams (no video, no sound)"
    raise MediaError(file.name, f"this {fmt} file has {found}")


def picture_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is no cover art."""
    cover = av.stream.Disposition.attached_pic
    return next((one for one in container.streams.video if not one.disposition & cover), None)


def _take(
    file: MediaFile, reader: FrameReader, targets: list[int], limits: MediaLimits
) -> tuple[dict[int, NDArray[np.uint8]], tuple[int, int]]:
    """Upright frames, RGB (H, W, 3), by the tick at which they appear; and the first's true size.

    Each has the size of the first, (width, height), scaled down to the limits.
    """
    taken: dict[int, NDArray[np.uint8]] = {}
    upright = (0, 0)
    for target in targets:
        frame = reader.at(target)
        if frame is None or tick_of(frame) in taken:  # shown for longer than an interval
            continue
        limits.check_pixels(file.name, frame.width, frame.height)
        upright = upright if taken else upright_size(frame)
        taken[tick_of(frame)] = upright_pixels(
            frame, limits.fitted(*upright, file.view, len(targets))
        )
    return taken, upright


def quarter_turns(frame: VideoFrame) -> int:
    """How often a frame is turned by 90 degrees counter-clockwise, by the display matrix."""
    return round(frame.rotation / 90) % 4


def upright_size(frame: VideoFrame) -> tuple[int, int]:
    """(width, height) of a frame as it is shown."""
    sides = frame.width, frame.height
    return sides[::-1] if quarter_turns(frame) % 2 else sides


def upright_pixels(frame: VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame as it is shown, RGB (H, W, 3), scaled to ``size``: (width, height)."""
    turns = quarter_turns(frame)
    width, height = size[::-1] if turns % 2 else size
    scaled = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA")
    return np.ascontiguousarray(np.rot90(scaled.to_ndarray(), turns))


def _sound_track(file: MediaFile, fmt: str, limits: MediaLimits, cut: list[str]) -> Audio | None:
    """The clip's sound. If it cannot be decoded: None, and the reason is added to ``cut``."""
    try:
        with (
            decoder_errors(file, limits, "its data is damaged or of an unknown codec"),
            opened(file, fmt) as container,
        ):
            audio = read_sound(file, fmt, container, limits)
    except MediaError as error:
        cut.append(f"the sound track is not used: {error.reason}")
        return None
    cut += audio.report.cut
    return audio


def tick_of(frame: VideoFrame) -> int:
    return frame.pts if frame.pts is not None else frame.dts or 0


@dataclass
class FrameReader:
    """Finds the frame shown at a time, by decoding from the keyframe before it.

    Ask for times in rising order.
    """

    container: InputContainer
    stream: VideoStream
    timeline: Timeline
    damage: list[Exception] = field(default_factory=list)
    _shown: VideoFrame | None = None
    _next: VideoFrame | None = None
    _frames: Iterator[VideoFrame] = field(default_factory=lambda: iter(()))

    def at(self, tick: int) -> VideoFrame | None:
        """The frame shown at ``tick``; if it cannot be decoded, a frame near it."""
        number = bisect.bisect_right(self.timeline.keyframes, tick)
        keyframe = self.timeline.keyframes[number - 1] if number else self.timeline.start
        if self._shown is None or not keyframe <= tick_of(self._shown) <= tick:
            self._seek(tick)
        while self._next is not None and tick_of(self._next) <= tick:
            self._shown, self._next = self._next, next(self._frames, None)
        return self._shown or self._next

    def _seek(self, tick: int) -> None:
        """Start decoding at a keyframe that is shown at or before ``tick``.

        Containers seek by decoding time, which is ahead of display time, so a seek can land after
        ``tick``: then seek further back, at last to the start.
        """
        start, back = self.timeline.start, max(1, round(1 / self.timeline.time_base))
        goal = tick
        while True:
            self.container.seek(goal, stream=self.stream)
            self._frames = frames_of(self.container, self.stream, self.damage)
            self._shown, self._next = None, next(self._frames, None)
            landed = self._next is not None and tick_of(self._next) <= tick
            if landed or goal <= start:
                return
            goal, back = max(start, tick - back), back * 4


@dataclass(frozen=True)
class Timeline:
    """Times of a video stream, in ticks of ``time_base`` seconds.

    ``ticks`` are those at which the frames appear, in rising order, as are the ``keyframes``.
    """

    time_base: Fraction
    end: int
    ticks: list[int]
    keyframes: list[int]

    @property
    def start(self) -> int:
        return self.ticks[0]

    @property
    def n_frames(self) -> int:
        return len(self.ticks)

    def seconds(self, tick: int) -> float:
        return float((tick - self.start) * self.time_base)

    def centres(self, n: int) -> list[int]:
        length = self.end - self.start
        return [self.start + (2 * i + 1) * length // (2 * n) for i in range(n)]


def timeline_of(container: InputContainer, stream: VideoStream, n_bytes: int) -> Timeline | None:
    """The timeline of a stream; None when it has no frames.

    Headers may claim wrong durations and frame counts. So the times come from the container's index
    of the frames within the file's ``n_bytes``, or, without an index (WebM, fragmented MP4), from
    all packets. Seek afterwards: reading the packets leaves the container at its end.
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
    end = ticks[-1] + _frame_ticks(stream, ticks)
    return Timeline(stream.time_base or Fraction(1, av.time_base), end, ticks, keyframes)


def _frame_ticks(stream: VideoStream, ticks: list[int]) -> int:
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
    # An index has decoding times, which are ahead of display times if frames are reordered.
    shift = stream.start_time - min(ticks) if ticks and stream.start_time is not None else 0
    return [tick + shift for tick in ticks], [tick + shift for tick in keyframes]


def _scanned(container: InputContainer, stream: VideoStream) -> tuple[list[int], list[int]]:
    ticks, keyframes = [], []
    with suppress(av.InvalidDataError):  # the rest of the file is damaged
        for packet in container.demux(stream):
            tick = packet.pts if packet.pts is not None else packet.dts
            if packet.size == 0 or tick is None or packet.is_discard:
                continue
            ticks.append(tick)
            if packet.is_keyframe:
                keyframes.append(tick)
    return ticks, keyframes

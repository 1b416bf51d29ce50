"""What is measured as a file is decoded: scenes, brightness, motion, perceptual hashes, loudness.

Each frame, much reduced, goes to PySceneDetect. Two frames a second are measured, and the energy of
each tenth of a second of sound: a few megabytes for ten hours.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import cv2
import imagehash
import numpy as np
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image
from scenedetect.detectors import AdaptiveDetector

from mico_chat.media import MediaLimits
from mico_chat.media.video import quarter_turns, tick_of
from mico_corpus.recipe import ClipsRecipe
from mico_corpus.rows import Row

SEEN, MEASURED = 64, 128
"""Scenes are sought in frames whose longer side has SEEN pixels; those measured have MEASURED."""
SPACING = 0.5
"""Two frames that are measured are so many seconds apart."""
SHORTEST_SCENE = 0.6
"""After a cut, the next may come after so many seconds: a flash is no scene."""
BIN = 0.1
"""The energy of so many seconds of sound is kept as one number."""
QUIETEST = -120.0
"""This many dB stand for silence."""


@dataclass(frozen=True)
class ClipMeasures:
    start: float
    end: float
    brightness: float
    motion: float
    loudness: float
    hash: bytes | None
    damaged: bool

    def row(self, reason: str) -> Row:
        return {
            "start": self.start,
            "end": self.end,
            "reason": reason,
            "brightness": self.brightness,
            "motion": self.motion,
            "loudness": self.loudness,
            "hash": self.hash,
        }


@dataclass
class Loudness:
    """The power of a sound over time. ``zero`` is the time stamp of second 0."""

    zero: float
    longest: float
    heard: bool = False
    _energy: array[float] = field(default_factory=lambda: array("d"))
    _n: array[float] = field(default_factory=lambda: array("d"))
    _after: float = 0.0

    def hear(self, frame: AudioFrame) -> None:
        time = self._after if frame.time is None else frame.time - self.zero
        self._after = time + frame.samples / max(1, frame.sample_rate)
        if not 0 <= time <= self.longest:
            return
        place = int(time / BIN)
        if place >= len(self._n):
            more = bytes(8 * (place + 1 - len(self._n)))
            self._energy.frombytes(more)
            self._n.frombytes(more)
        samples = _floats(frame)
        energy = float(np.vdot(samples, samples))
        if not math.isfinite(energy):  # sound of floats may hold anything
            samples = np.nan_to_num(samples, nan=0.0, posinf=1.0, neginf=-1.0).clip(-1, 1)
            energy = float(np.vdot(samples, samples))
        self._energy[place] += energy
        self._n[place] += samples.size
        self.heard = True

    def between(self, start: float, end: float) -> float:
        """dB of full scale; NaN where there is no sound."""
        part = slice(int(start / BIN), max(int(start / BIN) + 1, round(end / BIN)))
        n = sum(self._n[part])
        if not n:
            return math.nan
        return max(QUIETEST, 10 * math.log10(max(sum(self._energy[part]) / n, 1e-12)))


def _floats(frame: AudioFrame) -> NDArray[np.float32]:
    """Samples of all channels, full scale is 1."""
    samples = frame.to_ndarray().ravel()
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    zero = 128 if samples.dtype.kind == "u" else 0
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
    floats: NDArray[np.float32] = (samples.astype(np.float32) - zero) / np.float32(scale)
    return floats


class Scenes(AdaptiveDetector):  # type: ignore[misc]  # PySceneDetect has no types
    """The detector as it is, with times in seconds instead of its own time codes, which it only
    subtracts and compares. What it computes of two frames is computed by OpenCV in one step: the
    mean difference of hue, saturation and value. Both take most of its time otherwise.
    """

    _before: Any = None

    def _calculate_frame_score(self, timecode: float, frame_img: NDArray[np.uint8]) -> float:
        colours = cv2.cvtColor(frame_img, cv2.COLOR_BGR2HSV)
        before, self._before = self._before, colours
        if before is None:
            return 0.0
        return float(cv2.norm(colours, before, cv2.NORM_L1)) / colours.size


class Looks:
    def __init__(self, stream: VideoStream, zero: float, recipe: ClipsRecipe) -> None:
        self.zero = zero
        self._tick = float(stream.time_base or Fraction(1, av.time_base))
        rate = float(stream.average_rate or 0)
        self._detector = Scenes(recipe.threshold, min_scene_len=SHORTEST_SCENE)
        self._reduce, self._measure = VideoReformatter(), VideoReformatter()
        self._seen = self._measured = (0, 0)
        self._spacing = min(SPACING, recipe.shortest / 2) - 1e-6
        self.n_frames = 0
        self.first = self.last = 0.0
        self._shown = 1 / rate if 0.001 < rate < 10_000 else 0.04
        self._cuts: list[float] = []
        self._damaged: array[float] = array("d")
        self._previous: NDArray[np.int16] | None = None
        self._times: array[float] = array("d")
        self._brightness: array[float] = array("f")
        self._motion: array[float] = array("f")
        self._hashes = bytearray()

    @property
    def end(self) -> float:
        return round(self.last + self._shown, 6)

    @property
    def fps(self) -> float:
        return self.n_frames / max(1e-6, self.end - self.first)

    def see(self, frame: VideoFrame, damaged: bool) -> None:
        time = round(tick_of(frame) * self._tick - self.zero, 6)
        if not self.n_frames:
            self.first = self.last = time
            sides = frame.width, frame.height
            self._seen, self._measured = (
                MediaLimits(max_side=side).fitted(*sides) for side in (SEEN, MEASURED)
            )
        time = max(time, self.last)  # time stamps may be wrong, but frames have an order
        if frame.duration:
            self._shown = frame.duration * self._tick
        elif time > self.last:
            self._shown = time - self.last
        self.last = time
        self.n_frames += 1
        if damaged or frame.is_corrupt:
            self._damaged.append(time)
        small = self._reduce.reformat(
            frame, *self._seen, "bgr24", interpolation="FAST_BILINEAR", threads=1
        )
        self._cuts += self._detector.process_frame(time, small.to_ndarray())
        if not self._times or time - self._times[-1] >= self._spacing:
            self._sample(frame, time)

    def finish(self, damaged: bool) -> None:
        if damaged:
            self._damaged.append(self.last)

    def _sample(self, frame: VideoFrame, time: float) -> None:
        grey = self._measure.reformat(
            frame, *self._measured, "gray", interpolation="AREA", threads=1
        )
        upright = np.ascontiguousarray(np.rot90(grey.to_ndarray(), quarter_turns(frame)))
        luma = upright.astype(np.int16)
        change = math.nan
        if self._previous is not None and self._previous.shape == luma.shape:
            change = float(np.abs(luma - self._previous).mean()) / 255
        self._previous = luma
        self._times.append(time)
        self._brightness.append(float(luma.mean()) / 255)
        self._motion.append(change)
        bits = imagehash.phash(Image.fromarray(upright)).hash
        self._hashes += np.packbits(bits).tobytes()

    def clips(
        self, loudness: Loudness, longest: float, spans: Sequence[tuple[float, float]] = ()
    ) -> Iterator[ClipMeasures]:
        """The spans as far as the file goes; without any, the scenes, a longer one in parts."""
        times, motion = np.array(self._times), np.array(self._motion)
        brightness, damaged = np.array(self._brightness), np.array(self._damaged)
        bounds = [self.first, *self._cuts, self.end]
        within = [(start, max(start, min(end, self.end))) for start, end in spans]
        for scene, after in within or itertools.pairwise(bounds):
            n = 1 if spans else max(1, math.ceil((after - scene) / longest - 1e-6))
            for i in range(n):
                start = round(scene + (after - scene) * i / n, 6)
                end = round(scene + (after - scene) * (i + 1) / n, 6)
                low, high = (int(place) for place in np.searchsorted(times, [start, end]))
                middle = (
                    low + int(np.abs(times[low:high] - (start + end) / 2).argmin())
                    if high > low
                    else -1
                )
                yield ClipMeasures(
                    start,
                    end,
                    _mean(brightness[low:high]),
                    _mean(motion[low + 1 : high]),
                    loudness.between(start, end),
                    bytes(self._hashes[8 * middle : 8 * middle + 8]) if middle >= 0 else None,
                    bool(((damaged >= start) & (damaged <= end)).any()),
                )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan

"""Decoded media: numpy arrays and a report of what was decoded and what was cut.

Legend: H height, W width, T frames, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mico_chat.media.kinds import Kind

SAMPLE_RATE = 16_000
"""Samples a second of every decoded sound (mono)."""


class MediaReport(BaseModel):
    """What was found in a medium and what of it is used. Sizes and rates are the source's."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Kind
    format: str = "array"
    bytes: int = 0
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    """Length of a video clip; of a sound, the length kept."""
    frames_used: int | None = None
    frames_total: int | None = None
    frame_times: list[float] | None = None
    sample_rate: int | None = None
    channels: int | None = None
    audio_used: bool | None = None
    """Video only: True, its sound is used; False, it has one that is not; None, it has none."""
    cut: list[str] = []
    """What was left out or scaled down, in words."""
    tokens: int | None = None
    """Context tokens of the medium, those of its sound track included."""
    cached: bool | None = None
    """True: its context tokens were there, or another request was making them."""
    decode_ms: float | None = None
    encode_ms: float | None = None
    """From handing it to the encoder to having its context tokens. Both times are None where
    nothing had to be done."""


_NO_REPORT = MediaReport(name="", kind="image")


def _describe(medium: Image | Audio | Video | Depth | Normal, report: MediaReport) -> None:
    """Give a medium made straight from arrays a report of its own."""
    if medium.report is _NO_REPORT:
        object.__setattr__(medium, "report", report)


def _check(what: str, array: NDArray[np.generic], dtype: type, shape: str, *, ok: bool) -> None:
    if array.dtype != dtype or not ok:
        raise ValueError(
            f"{what} is {array.dtype} {array.shape}; it must be {np.dtype(dtype)} {shape}"
        )


@dataclass(frozen=True, eq=False)
class Image:
    """A still image: ``pixels`` uint8 (H, W, 3), RGB."""

    pixels: NDArray[np.uint8]
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    kind: ClassVar[Kind] = "image"

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        _check("pixels", self.pixels, np.uint8, "(H, W, 3)", ok=len(shape) == 3 and shape[2] == 3)
        _describe(self, MediaReport(name="image", kind="image", width=shape[1], height=shape[0]))


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: ``samples`` float32 (n,) in [-1, 1], mono, at ``sample_rate`` 16,000 Hz."""

    samples: NDArray[np.float32]
    sample_rate: int = SAMPLE_RATE
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    kind: ClassVar[Kind] = "audio"

    def __post_init__(self) -> None:
        _check("samples", self.samples, np.float32, "(n,)", ok=self.samples.ndim == 1)
        if self.sample_rate != SAMPLE_RATE:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be {SAMPLE_RATE}")
        _describe(
            self,
            MediaReport(
                name="audio",
                kind="audio",
                seconds=self.seconds,
                sample_rate=self.sample_rate,
                channels=1,
            ),
        )

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a clip: ``frames`` uint8 (T, H, W, 3) RGB, shown at ``times`` float64 (T,).

    Times are seconds from the start of the clip. ``audio`` is the sound track, None without one.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    audio: Audio | None = None
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    kind: ClassVar[Kind] = "video"

    def __post_init__(self) -> None:
        shape = self.frames.shape
        ok = len(shape) == 4 and shape[3] == 3 and shape[0] > 0
        _check("frames", self.frames, np.uint8, "(T, H, W, 3)", ok=ok)
        _check("times", self.times, np.float64, f"({shape[0]},)", ok=self.times.shape == shape[:1])
        _describe(
            self,
            MediaReport(
                name="video",
                kind="video",
                width=shape[2],
                height=shape[1],
                frames_used=shape[0],
                frames_total=shape[0],
                frame_times=self.times.tolist(),
                audio_used=None if self.audio is None else True,
            ),
        )


@dataclass(frozen=True, eq=False)
class Depth:
    """A depth map: ``values`` float32 (H, W), NaN where nothing was measured (a hole).

    Larger is farther. ``metric``: values are metres; otherwise they are relative, in [0, 1].
    """

    values: NDArray[np.float32]
    metric: bool = True
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    kind: ClassVar[Kind] = "depth"

    def __post_init__(self) -> None:
        shape = self.values.shape
        _check("values", self.values, np.float32, "(H, W)", ok=len(shape) == 2)
        _describe(self, MediaReport(name="depth", kind="depth", width=shape[1], height=shape[0]))


@dataclass(frozen=True, eq=False)
class Normal:
    """A map of surface normals: ``pixels`` uint8 (H, W, 3), x, y, z as R, G, B."""

    pixels: NDArray[np.uint8]
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    kind: ClassVar[Kind] = "normal"

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        _check("pixels", self.pixels, np.uint8, "(H, W, 3)", ok=len(shape) == 3 and shape[2] == 3)
        _describe(self, MediaReport(name="normal", kind="normal", width=shape[1], height=shape[0]))


Medium = Image | Audio | Video | Depth | Normal

"""What is shown of a medium: pictures of what the model was given, and the report in words.

Files come from users, so they are decoded in the media layer's own worker process, under its
limits, with as many frames as the server's report says it took.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from mico_chat.media import Audio, Depth, MediaDecoder, MediaFile, MediaLimits, Medium, Video
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_ui.browser.pictures import (
    MEL_SIZE,
    data_uri,
    depth_pixels,
    mel_pixels,
    stretched,
    wave_pixels,
)

STILL_SIDE = 360
FRAME_SIDE = 176
"""Longest sides of preview pictures, in pixels."""


class Picture(BaseModel):
    """One picture of a preview: ``src`` is a data URI, ``alt`` tells those who cannot see it."""

    model_config = ConfigDict(frozen=True)

    src: str
    alt: str
    caption: str = ""


class Preview(BaseModel):
    """``pictures`` of a medium; ``facts`` says what they do not show, such as distances."""

    model_config = ConfigDict(frozen=True)

    pictures: tuple[Picture, ...]
    facts: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """What it takes in memory, about."""
        return sum(len(picture.src) for picture in self.pictures)


def preview_of(medium: Medium, name: str) -> Preview:
    """Pictures of a decoded medium; ``name`` is the file's, for the texts beside them."""
    if isinstance(medium, Audio):
        return Preview(pictures=_of_sound(medium, f"the sound {name}"))
    if isinstance(medium, Video):
        return _of_video(medium, name)
    if isinstance(medium, Depth):
        return _of_depth(medium, name)
    kind = "normal map" if medium.kind == "normal" else "picture"
    picture = Picture(src=data_uri(medium.pixels, STILL_SIDE), alt=f"{kind} {name}")
    return Preview(pictures=(picture,))


def _of_sound(sound: Audio, what: str) -> tuple[Picture, ...]:
    length = f"{sound.seconds:.1f} s"
    wave = data_uri(wave_pixels(sound.samples), MEL_SIZE[0], lossless=True)
    mel = stretched(mel_pixels(sound.samples, sound.sample_rate), MEL_SIZE)
    return (
        Picture(src=wave, alt=f"waveform of {what}, {length}", caption="waveform"),
        Picture(
            src=data_uri(mel, MEL_SIZE[0]),
            alt=f"spectrogram of {what}: time to the right, pitch upwards",
            caption="spectrogram (pitch over time)",
        ),
    )


def _of_video(video: Video, name: str) -> Preview:
    frames = tuple(
        Picture(
            src=data_uri(frame, FRAME_SIDE),
            alt=f"frame of {name} at {time:.1f} s",
            caption=f"{time:.1f} s",
        )
        for frame, time in zip(video.frames, video.times, strict=True)
    )
    sound = () if video.audio is None else _of_sound(video.audio, f"the sound track of {name}")
    return Preview(pictures=frames + sound)


def _of_depth(depth: Depth, name: str) -> Preview:
    unit = " m" if depth.metric else " (relative)"
    nearest, farthest = float(np.nanmin(depth.values)), float(np.nanmax(depth.values))
    span = f"nearest {nearest:.2f}{unit}, farthest {farthest:.2f}{unit}"
    facts = [span]
    if holes := float(np.isnan(depth.values).mean()):
        facts.append(f"not measured: {max(holes, 0.01):.0%} (grey)")
    picture = Picture(
        src=data_uri(depth_pixels(depth.values), STILL_SIDE, lossless=True),
        alt=f"depth map {name} in colours, {span}",
        caption="bright is near, dark is far",
    )
    return Preview(pictures=(picture,), facts=tuple(facts))


@dataclass
class Previewer:
    """Makes previews and keeps the last ones, for each user apart, within ``max_bytes``."""

    max_bytes: int = 64 << 20
    _kept: OrderedDict[tuple[str, str, Kind], Preview] = field(default_factory=OrderedDict)
    _decoder: MediaDecoder = field(default_factory=MediaDecoder)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def kept(self, user: str, medium_id: str, kind: Kind) -> Preview | None:
        """The preview of a user's stored medium, if it was made before and is still here."""
        with self._lock:
            if (found := self._kept.get((user, medium_id, kind))) is not None:
                self._kept.move_to_end((user, medium_id, kind))
            return found

    async def make(
        self, user: str, medium_id: str, source: Path | bytes, report: MediaReport
    ) -> Preview:
        """Decode a file that the server has accepted, and keep its preview.

        Raises:
            MediaError: when it cannot be decoded here.
        """
        preview = await asyncio.to_thread(self._make, source, report)
        with self._lock:
            self._kept[user, medium_id, report.kind] = preview
            while sum(kept.n_bytes for kept in self._kept.values()) > self.max_bytes:
                self._kept.popitem(last=False)
        return preview

    def _make(self, source: Path | bytes, report: MediaReport) -> Preview:
        file = MediaFile(report.kind, source, report.name)
        medium = self._decoder.decode(file)
        if isinstance(medium, Video) and not _same_frames(medium, report):
            # The server takes another number of frames than this machine's limits say.
            limits = MediaLimits(max_frames=max(1, report.frames_used or 1))
            with MediaDecoder(limits) as decoder:
                medium = decoder.decode(file)
        return preview_of(medium, report.name)

    def close(self) -> None:
        """End the worker process."""
        self._decoder.close()


def _same_frames(video: Video, report: MediaReport) -> bool:
    times = report.frame_times
    return times is None or (len(times) == len(video.times) and np.allclose(times, video.times))

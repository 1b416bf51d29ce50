"""Small clips for the data engine's tests, good ones and bad ones, made by PyAV."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

RATE = 16_000
ENCRYPTION = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}
QUICK: dict[str, dict[str, object]] = {
    "libx264": {"preset": "ultrafast", "threads": "1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
}
MILLISECOND = Fraction(1, 1000)


@dataclass(frozen=True)
class Scene:
    """Blocks of random colours, which the seed draws. They move, unless the scene is ``still``."""

    seed: int
    seconds: float = 6.0
    still: bool = False
    dark: bool = False

    def frames(self, n: int, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
        """``n`` pictures, RGB uint8 (H, W, 3)."""
        width, height = size
        top = 12 if self.dark else 256
        blocks = np.random.default_rng(self.seed).integers(0, top, (6, 8, 3), dtype=np.uint8)
        rows, columns = np.arange(height) * 6 // height, np.arange(width) * 8 // width
        picture = blocks[rows][:, columns]
        return [picture if self.still else np.roll(picture, i, axis=1) for i in range(n)]


def make_video(
    path: Path,
    scenes: Sequence[Scene] = (Scene(1),),
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    sound: float | None = 0.3,
    rotation: int = 0,
    variable: bool = False,
    encrypted: bool = False,
    codec: str = "libx264",
    audio_codec: str = "flac",
    gop: int = 10,
    sounds: int = 1,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip of scenes, and give its path back.

    ``sound`` is a tone's loudest sample, 0 is silence, and None is no sound track; ``sounds``
    counts the tracks. ``rotation``: degrees clockwise by which a player turns the frames, of an
    MP4. ``variable``: in the second half of each scene a frame is shown three times as long.
    """
    about = (ENCRYPTION if encrypted else {}) | (options or {})
    seconds = sum(scene.seconds for scene in scenes)
    with av.open(str(path), "w", options=about) as container:
        stream = container.add_stream(codec, rate=1000 if variable else fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.time_base = MILLISECOND if variable else Fraction(1, fps)
        stream.options = dict(QUICK.get(codec, {}))
        tracks = [
            container.add_stream(audio_codec, rate=RATE, layout="mono")
            for _ in range(0 if sound is None else sounds)
        ]
        start = 0.0
        for scene in scenes:
            times = _times(scene.seconds, fps, variable)
            for time, picture in zip(times, scene.frames(len(times), size), strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = stream.codec_context.time_base
                frame.pts = round((start + time) / frame.time_base)
                container.mux(stream.encode(frame))
            start += scene.seconds
        container.mux(stream.encode(None))
        for number, track in enumerate(tracks):
            assert isinstance(track, av.AudioStream)
            _write_tone(container, track, seconds, sound or 0.0, 440.0 * (number + 1))
    if rotation:
        _rotate(path, rotation)
    return path


def make_sound(path: Path, seconds: float = 1.0, codec: str = "flac") -> Path:
    """A file with a tone alone."""
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=RATE, layout="mono")
        assert isinstance(track, av.AudioStream)
        _write_tone(container, track, seconds, 0.3, 440.0)
    return path


def _times(seconds: float, fps: int, variable: bool) -> list[float]:
    if not variable:
        return [i / fps for i in range(round(seconds * fps))]
    half = seconds / 2
    slow = round(half * fps / 3)
    return _times(half, fps, False) + [half + 3 * i / fps for i in range(slow)]


def _write_tone(
    container: av.container.OutputContainer,
    track: av.AudioStream,
    seconds: float,
    loudest: float,
    hertz: float,
) -> None:
    t = np.arange(round(seconds * RATE)) / RATE
    samples = (loudest * np.sin(2 * np.pi * hertz * t)).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
    to_codec = av.AudioResampler(track.format, track.layout, RATE, track.frame_size or 4096)
    for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
        container.mux(track.encode(part))
    container.mux(track.encode(None))


_TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def _rotate(path: Path, rotation: int) -> None:
    """Write the matrix of an MP4's first track header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (turn << 16 for turn in _TURNS[rotation])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def claim_hours(path: Path, hours: float = 10.0) -> Path:
    """Let the header of a Matroska file claim so many hours."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # Duration, 8 bytes: milliseconds (RFC 9559, 5.1.2.10)
    data[at : at + 8] = struct.pack(">d", hours * 3_600_000)
    path.write_bytes(data)
    return path

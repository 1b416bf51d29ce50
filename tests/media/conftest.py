"""Media made on the spot: images by Pillow, sounds and clips by PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from mico_chat.media import MediaDecoder, MediaLimits

MakeSound = Callable[..., Path]
MakeClip = Callable[..., Path]


@pytest.fixture(scope="session")
def limits() -> MediaLimits:
    return MediaLimits()


@pytest.fixture(scope="session")
def decoder() -> Iterator[MediaDecoder]:
    """One worker process for all tests that do not harm it."""
    with MediaDecoder(MediaLimits(timeout_s=20)) as shared:
        yield shared


def tone(seconds: float, rate: int, channels: int, hertz: float = 440.0) -> NDArray[np.float32]:
    """(channels, n) float32: the same sine in every channel."""
    t = np.arange(round(seconds * rate)) / rate
    return np.tile(0.5 * np.sin(2 * np.pi * hertz * t).astype(np.float32), (channels, 1))


def _encode_sound(
    stream: av.AudioStream, samples: NDArray[np.float32]
) -> Iterator[av.Packet[av.AudioStream]]:
    """Packets of float samples (channels, n) at the stream's own rate and layout."""
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
    frame.sample_rate = stream.rate
    frame.time_base = Fraction(1, stream.rate)
    frame.pts = 0
    size = stream.frame_size or 4096
    to_codec = av.AudioResampler(stream.format, stream.layout, stream.rate, size)
    for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
        yield from stream.encode(part)
    yield from stream.encode(None)


@pytest.fixture
def make_sound(tmp_path: Path) -> MakeSound:
    """A sound file of a 440 Hz tone."""

    def make(
        name: str,
        codec: str,
        *,
        seconds: float = 1.0,
        rate: int = 44_100,
        layout: str = "stereo",
    ) -> Path:
        path = tmp_path / name
        channels = av.AudioLayout(layout).nb_channels
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, layout=layout)
            assert isinstance(stream, av.AudioStream)
            for packet in _encode_sound(stream, tone(seconds, rate, channels)):
                container.mux(packet)
        return path

    return make


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """A clip whose frame i is grey of brightness ``20 + 200 * i / n``: colour encodes time."""

    def make(
        name: str,
        codec: str,
        *,
        n: int = 60,
        fps: int = 20,
        size: tuple[int, int] = (64, 48),
        keyframe_every: int = 10,
        sound: str | None = None,
        options: dict[str, str] | None = None,
        container_options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w", options=container_options or {}) as container:
            stream = container.add_stream(codec, rate=fps, options=options or {})
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.gop_size = keyframe_every
            track = None if sound is None else container.add_stream(sound, rate=48_000)
            for i in range(n):
                grey = np.full((size[1], size[0], 3), 20 + 200 * i // n, np.uint8)
                grey[: size[1] // 4, : size[0] // 4] = (255, 0, 0)  # red: the top left corner
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode(None))
            if isinstance(track, av.AudioStream):
                for packet in _encode_sound(track, tone(n / fps, 48_000, 2)):
                    container.mux(packet)
        return path

    return make

"""Sound files and clips made on the spot by PyAV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

REPEATABLE = {"fflags": "+bitexact"}
"""Options for a container without random numbers and without the writer's version."""


def tone(seconds: float, rate: int, channels: int, hertz: float = 440.0) -> NDArray[np.float32]:
    t = np.arange(round(seconds * rate)) / rate
    return np.tile(0.5 * np.sin(2 * np.pi * hertz * t).astype(np.float32), (channels, 1))


def write_sound(
    target: str | BinaryIO,
    codec: str,
    *,
    container_format: str | None = None,
    seconds: float = 1.0,
    rate: int = 44_100,
    layout: str = "stereo",
    hertz: float = 440.0,
    container_options: dict[str, str] | None = None,
) -> None:
    samples = tone(seconds, rate, av.AudioLayout(layout).nb_channels, hertz)
    with av.open(
        target, "w", format=container_format, options=container_options or {}
    ) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        for packet in _encode_sound(stream, samples):
            container.mux(packet)


def write_clip(
    target: str | BinaryIO,
    codec: str,
    *,
    container_format: str | None = None,
    n: int = 60,
    fps: int | Fraction = 20,
    size: tuple[int, int] = (64, 48),
    keyframe_every: int = 10,
    sound: str | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """A clip whose frame i is grey of brightness ``20 + 200 * i / n``: colour encodes time.

    A corner of each frame, the upper left, is red.
    """
    with av.open(
        target, "w", format=container_format, options=container_options or {}
    ) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = keyframe_every
        track = None if sound is None else container.add_stream(sound, rate=48_000)
        for i in range(n):
            grey = np.full((size[1], size[0], 3), 20 + 200 * i // n, np.uint8)
            grey[: size[1] // 4, : size[0] // 4] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
        if isinstance(track, av.AudioStream):
            for packet in _encode_sound(track, tone(float(n / fps), 48_000, 2)):
                container.mux(packet)


def write_pictures(target: BinaryIO, pictures: Sequence[bytes], container_format: str) -> None:
    """A clip of JPEG files as they are, of whatever size; its header says 64 x 48."""
    with av.open(target, "w", format=container_format, options=REPEATABLE) as container:
        stream = container.add_stream("mjpeg", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i, data in enumerate(pictures):
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, 10)
            packet.pts = packet.dts = i
            packet.is_keyframe = True
            container.mux(packet)


def _encode_sound(
    stream: av.AudioStream, samples: NDArray[np.float32]
) -> Iterator[av.Packet[av.AudioStream]]:
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=stream.layout.name)
    frame.sample_rate = stream.rate
    frame.time_base = Fraction(1, stream.rate)
    frame.pts = 0
    size = stream.frame_size or 4096
    to_codec = av.AudioResampler(stream.format, stream.layout, stream.rate, size)
    for part in [*to_codec.resample(frame), *to_codec.resample(None)]:
        yield from stream.encode(part)
    yield from stream.encode(None)

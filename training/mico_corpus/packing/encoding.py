"""Frames and sounds to the files of a shard; the same pixels and samples give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.media import SAMPLE_RATE, Audio

X264 = {"preset": "veryfast", "crf": "23", "threads": "1", "mbtree": "0"}
"""Without macroblock trees: x264 reads memory there that it has not written, so that the bytes of
one clip differed from run to run."""
QUALITY = 90
TICKS = 90_000
"""The clock of frames has so many ticks a second."""


def mp4(frames: NDArray[np.uint8], seconds: float, sound: Audio | None) -> bytes:
    """H.264, with the sound as AAC. ``frames``, RGB (T, H, W, 3), share ``seconds`` evenly."""
    file = io.BytesIO()
    height, width = (max(2, side - side % 2) for side in frames.shape[1:3])  # 4:2:0 needs even ones
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        rate = Fraction(len(frames) / seconds).limit_denominator(1000)
        video = container.add_stream("libx264", rate=rate, options=X264)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.thread_count = 1
        video.gop_size = max(1, round(2 * rate))
        video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
        packets: list[av.Packet[Any]] = []
        if sound is not None:
            audio = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            packets += _encoded(audio, sound.samples, "fltp")
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(width, height, "yuv420p")
            frame.pts, frame.time_base = round(number * TICKS / rate), Fraction(1, TICKS)
            packets += video.encode(frame)
        packets += video.encode()
        # Both side by side, for players.
        container.mux(sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)))
    return file.getvalue()


def flac(sound: Audio) -> bytes:
    """16 bit, 16 kHz, mono."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        stream.codec_context.format = "s16"
        samples = (sound.samples * 32767).round().astype(np.int16)
        container.mux(list(_encoded(stream, samples, "s16")))
    return file.getvalue()


def _encoded(
    stream: av.AudioStream, samples: NDArray[np.float32] | NDArray[np.int16], form: str
) -> Iterator[av.Packet[Any]]:
    frame = av.AudioFrame.from_ndarray(samples[None], format=form, layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = SAMPLE_RATE, Fraction(1, SAMPLE_RATE), 0
    fifo = av.AudioFifo()
    fifo.write(frame)
    while part := fifo.read(stream.codec_context.frame_size or 4096, partial=True):
        yield from stream.encode(part)
    yield from stream.encode()


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()

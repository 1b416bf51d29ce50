"""The media that benchmarks show: drawn from a seed, so that each is new to what is measured."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import wavfile

from mico_chat.media.kinds import Kind

RATE = 30
"""Frames in a second of a :func:`landscape`."""


def jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def noisy_picture(seed: int) -> bytes:
    """A JPEG of 640 x 480 and 200 kB."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(96, 160, (480, 640, 3)) + rng.integers(-90, 90, 3)
    return jpeg(pixels.clip(0, 255).astype(np.uint8), 93)


def soft_colours(
    rng: np.random.Generator, size: tuple[int, int], grid: tuple[int, int] = (12, 16)
) -> NDArray[np.uint8]:
    """Pixels of a picture of (width, height), enlarged from a grid of random colours."""
    small = Image.fromarray(rng.integers(0, 256, (*grid, 3), dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG that compresses about as well as a photograph."""
    rng = np.random.default_rng(seed)
    pixels = soft_colours(rng, size).astype(np.int16)
    pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    return jpeg(pixels.clip(0, 255).astype(np.uint8), 90)


def draw(kind: Kind, folder: Path, seed: int) -> tuple[Kind, str]:
    """A new medium for a question: media of two seeds have different bytes."""
    suffix, make = DRAWN[kind]
    return kind, str(make(folder / f"{kind}-{seed}{suffix}", seed).absolute())


def scene(path: Path, seed: int) -> Path:
    path.write_bytes(jpeg(_disc(seed, 0.0), 90))
    return path


def tone(path: Path, seed: int) -> Path:
    """A WAV of 3 s with one tone and some noise."""
    rng = np.random.default_rng(seed)
    at = np.arange(3 * 16_000) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * rng.uniform(200, 2000) * at)
    wave += 0.02 * rng.standard_normal(len(at))
    wavfile.write(path, 16_000, (wave * 32_767).astype(np.int16))
    return path


def clip(path: Path, seed: int, seconds: float = 4.0, rate: int = 10) -> Path:
    """An MP4 of 640 x 480 in which a disc wanders to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        n = int(seconds * rate)
        for frame in range(n):
            pixels = _disc(seed, frame / n)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


DRAWN: dict[Kind, tuple[str, Callable[[Path, int], Path]]] = {
    "image": (".jpg", scene),
    "video": (".mp4", clip),
    "audio": (".wav", tone),
}


def _disc(seed: int, shift: float) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.7)
    ground, disc = rng.integers(0, 256, (2, 3))
    rows, columns = np.mgrid[0:480, 0:640]
    inside = (columns / 640 - x - 0.4 * shift) ** 2 + (rows / 480 - y) ** 2 < 0.02
    shade = 0.6 + 0.4 * rows[..., None] / 480
    pixels: NDArray[np.uint8] = np.where(inside[..., None], disc, ground * shade).astype(np.uint8)
    return pixels


def landscape(path: Path, size: tuple[int, int], seconds: int, *, silent: bool = False) -> Path:
    """A camera that pans over a landscape, with the noise of a sensor; H.264 and AAC."""
    width, height = size
    rng = np.random.default_rng(0)
    land = soft_colours(rng, (4 * width, height), (12, 48)).astype(np.int16)
    land = land + rng.integers(-25, 25, (height, 4 * width, 1))
    noise = rng.normal(0, 4, (height + 64, width + 64, 1)).astype(np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        sound = None if silent else container.add_stream("aac", rate=44_100, layout="stereo")
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * RATE):
            at, (y, x) = 3 * number % (3 * width), rng.integers(0, 64, 2)
            shown = land[:, at : at + width] + noise[y : y + height, x : x + width]
            pixels = shown.clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if isinstance(sound, av.AudioStream):
            for start in range(0, seconds * 44_100, 1024):
                samples = rng.normal(0, 0.1, (2, 1024)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path

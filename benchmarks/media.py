"""Media for the benchmarks, drawn anew for every request: no two have the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import wavfile


def picture(path: Path, seed: int) -> Path:
    """A JPEG of 640 x 480: a bright disc on a smooth ground."""
    Image.fromarray(_scene(seed, 0.0)).save(path, quality=90)
    return path


def clip(path: Path, seed: int, seconds: float = 4.0, rate: int = 10) -> Path:
    """An MP4 of 640 x 480 in which the disc wanders to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for frame in range(int(seconds * rate)):
            pixels = _scene(seed, frame / (seconds * rate))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def sound(path: Path, seed: int, seconds: float = 3.0) -> Path:
    """A WAV of a tone in noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(16_000 * seconds)) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time)
    wave += 0.02 * rng.standard_normal(len(time))
    wavfile.write(path, 16_000, (wave * 32_767).astype(np.int16))
    return path


KINDS: dict[str, tuple[str, Callable[[Path, int], Path]]] = {
    "image": (".jpg", picture),
    "video": (".mp4", clip),
    "audio": (".wav", sound),
}


def draw(kind: str, folder: Path, seed: int) -> tuple[str, Path]:
    """A medium of a kind, as a question wants it."""
    suffix, maker = KINDS[kind]
    return kind, maker(folder / f"{kind}-{seed}{suffix}", seed)


def _scene(seed: int, shift: float) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.7)
    ground, disc = rng.integers(0, 256, (2, 3))
    rows, columns = np.mgrid[0:480, 0:640]
    inside = (columns / 640 - x - 0.4 * shift) ** 2 + (rows / 480 - y) ** 2 < 0.02
    shade = 0.6 + 0.4 * rows[..., None] / 480
    pixels: NDArray[np.uint8] = np.where(inside[..., None], disc, ground * shade).astype(np.uint8)
    return pixels

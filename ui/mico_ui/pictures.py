"""Arrays as pictures to look at: colour-mapped depth, a sound's waveform and spectrogram.

Legend: H height, W width, n samples, B mel bands.
"""

from __future__ import annotations

import base64
import io
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.media import Depth

# viridis at equal steps, from Matplotlib (CC0): even in lightness, and safe for colour-blind eyes.
_VIRIDIS = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    dtype=np.float64,
)
_HOLE = (128, 128, 128)

WAVE_SIZE = (480, 72)
MEL_SIZE = (480, 96)
_WAVE_COLOUR = (42, 120, 214)

Pixels = NDArray[np.uint8]


def colours(values: NDArray[np.floating]) -> Pixels:
    """Values in [0, 1] of any shape as colours (..., 3), dark to bright; NaN is grey."""
    steps = np.linspace(0.0, 1.0, len(_VIRIDIS))
    known = np.nan_to_num(values, nan=0.0)
    channels = [np.interp(known, steps, _VIRIDIS[:, c]) for c in range(3)]
    mapped = np.stack(channels, axis=-1).round().astype(np.uint8)
    mapped[np.isnan(values)] = _HOLE
    return mapped


def depth_pixels(values: NDArray[np.float32]) -> Pixels:
    """A depth map (H, W) as colours, near bright and far dark; holes are grey."""
    measured = values[~np.isnan(values)]
    nearest, farthest = (measured.min(), measured.max()) if len(measured) else (0.0, 0.0)
    span = farthest - nearest
    return colours((farthest - values) / span if span > 0 else values * 0 + 1)


def distances(depth: Depth) -> str:
    """The nearest and the farthest measured distance of a depth map, in words."""
    if not np.isfinite(depth.values).any():
        return "nothing was measured"
    unit = " m" if depth.metric else " (relative)"
    nearest, farthest = np.nanmin(depth.values), np.nanmax(depth.values)
    return f"nearest {nearest:.2f}{unit}, farthest {farthest:.2f}{unit}"


def wave_pixels(samples: NDArray[np.float32]) -> Pixels:
    """The waveform of a sound (n,) as bars of lowest to highest sample, on white."""
    width, height = WAVE_SIZE
    picture = np.full((height, width, 3), 255, np.uint8)
    edges = np.linspace(0, len(samples), width + 1).astype(int)
    middle = (height - 1) / 2
    for column, (start, end) in enumerate(pairwise(edges)):
        part = samples[start : max(end, start + 1)]
        if len(part) == 0:
            continue
        top = int(middle - part.max() * middle)
        bottom = int(np.ceil(middle - part.min() * middle))
        picture[max(0, top) : bottom + 1, column] = _WAVE_COLOUR
    return picture


def mel_pixels(samples: NDArray[np.float32], sample_rate: int) -> Pixels:
    """The log-mel spectrogram of a sound (n,): time to the right, pitch upwards, loud bright.

    80 dB from dark to bright, 64 bands to half the sample rate, windows of 64 ms.
    """
    size, n_bands = 1024, 64
    padded = np.pad(samples, (size // 2, size))
    n_columns = min(MEL_SIZE[0], max(1, len(samples) // 160))
    starts = np.linspace(0, max(0, len(samples) - 1), n_columns).astype(int)
    windows = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(windows, axis=1)) ** 2  # (columns, size / 2 + 1)
    mel = power @ _mel_filters(n_bands, size, sample_rate)  # (columns, B)
    decibels = 10 * np.log10(np.maximum(mel, 1e-10))
    loudness = np.clip((decibels - decibels.max()) / 80 + 1, 0, 1)
    picture = Image.fromarray(colours(loudness.T[::-1]))
    return np.asarray(picture.resize(MEL_SIZE, Image.Resampling.BILINEAR))


def _mel_filters(n_bands: int, size: int, sample_rate: int) -> NDArray[np.float64]:
    """Triangles (size / 2 + 1, B), evenly spread on the mel scale (O'Shaughnessy 1987)."""
    highest = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, highest, n_bands + 2) / 2595) - 1)
    at = np.linspace(0, sample_rate / 2, size // 2 + 1)[:, None]
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (at - low) / (centre - low), (high - at) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def data_uri(pixels: Pixels, longest: int, *, lossless: bool = False) -> str:
    """Pixels (H, W, 3) as a picture inside a page, its longest side at most ``longest``."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((longest, longest))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=82, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

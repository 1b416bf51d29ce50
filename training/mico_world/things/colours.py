"""Named colours: draw one, find the colour of a cut-out, paint a cut-out in another colour.

Things are painted in colours that are not theirs, so that "What colour is the apple?" cannot be
answered without looking. Each colour is a range in HSV. A pixel has the name of the range that is
nearest to it in CIELAB, so a colour drawn from a range gets the name of that range.
"""

from functools import cache

import matplotlib.colors
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

# Name: (hue from, to), (saturation from, to), (value from, to). A hue below 0 is red too.
RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-9, 8), (0.65, 1.0), (0.4, 1.0)),
    "orange": ((20, 35), (0.6, 1.0), (0.78, 1.0)),
    "yellow": ((46, 60), (0.5, 1.0), (0.78, 1.0)),
    "green": ((78, 155), (0.35, 1.0), (0.22, 0.85)),
    "blue": ((200, 245), (0.45, 1.0), (0.32, 1.0)),
    "purple": ((264, 300), (0.35, 0.9), (0.25, 0.8)),
    "pink": ((318, 365), (0.2, 0.55), (0.85, 1.0)),
    "brown": ((14, 32), (0.4, 0.8), (0.25, 0.52)),
    "black": ((0, 360), (0.0, 0.2), (0.02, 0.18)),
    "white": ((0, 360), (0.0, 0.09), (0.8, 1.0)),
    "grey": ((0, 360), (0.0, 0.08), (0.38, 0.62)),
}
COLOURS = tuple(RANGES)
_DOMINANT = 0.62  # least share of a cut-out's pixels that its colour has


def hsv_to_rgb(hsv: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) HSV (any degrees, 0-1, 0-1) -> RGB in 0-1."""
    unit = hsv / np.array([360.0, 1.0, 1.0]) % np.array([1.0, 1.01, 1.01])
    return np.asarray(matplotlib.colors.hsv_to_rgb(unit), np.float64)


def rgb_to_lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) sRGB in 0-1 -> CIELAB (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def sample(rng: np.random.Generator, colour: str) -> NDArray[np.uint8]:
    """An RGB value (3,) uint8 that people call ``colour``."""
    low, high = np.array(RANGES[colour]).T
    return np.round(hsv_to_rgb(rng.uniform(low, high)) * 255).astype(np.uint8)


@cache
def _table() -> NDArray[np.uint8]:
    """(32, 32, 32) index into ``COLOURS`` of the nearest named colour of each RGB cell."""
    prototypes, owners = [], []
    for index, name in enumerate(COLOURS):
        low, high = np.array(RANGES[name]).T
        steps = np.stack(np.meshgrid(*[np.linspace(0, 1, 4)] * 3), -1).reshape(-1, 3)
        prototypes.append(rgb_to_lab(hsv_to_rgb(low + steps * (high - low))))
        owners.append(np.full(len(steps), index, dtype=np.uint8))
    points, owner = np.concatenate(prototypes), np.concatenate(owners)
    axis = (np.arange(32) + 0.5) / 32
    cells = rgb_to_lab(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3))
    blocks = np.split(cells, 16)  # 2048 cells each: less memory
    nearest = [owner[((b[:, None] - points) ** 2).sum(-1).argmin(1)] for b in blocks]
    return np.concatenate(nearest).reshape(32, 32, 32)


def shares(rgb: Pixels) -> dict[str, float]:
    """The share of the pixels (..., 3) uint8 that each named colour has."""
    cell = rgb.reshape(-1, 3) >> 3
    counts = np.bincount(_table()[cell[:, 0], cell[:, 1], cell[:, 2]], minlength=len(COLOURS))
    return {n: float(c) / max(1, len(cell)) for n, c in zip(COLOURS, counts, strict=True)}


def dominant(rgba: Pixels) -> str | None:
    """The colour of a cut-out (h, w, 4), or None where no colour clearly dominates. Black outlines
    do not count against another colour."""
    solid = rgba[rgba[..., 3] > 128][:, :3]
    if len(solid) < 50:
        return None
    share = shares(solid)
    best = max(share, key=lambda name: share[name])
    if best != "black":
        ink = min(share["black"], 0.3)
        share = {name: value / (1 - ink) for name, value in share.items()}
    rest = max(value for name, value in share.items() if name not in (best, "black"))
    return best if share[best] >= _DOMINANT and rest <= 0.2 else None


def tint(rgba: Pixels, rgb: NDArray[np.uint8]) -> Pixels:
    """The cut-out (h, w, 4) painted in ``rgb``, with its shading. Pixels of the median luminance
    become ``rgb`` itself, darker pixels its shades and lighter pixels its tints."""
    grey = np.asarray(Image.fromarray(rgba).convert("RGB").convert("L"))
    solid = grey[rgba[..., 3] > 128]
    if solid.size == 0:
        return rgba
    low, middle, high = np.percentile(solid[:: max(1, solid.size // 4000)], [4, 50, 96]) / 255
    light = np.arange(256) / 255
    # A low contrast is not stretched to the whole range: that would bleach the thing.
    darker = -np.clip((middle - light) / max(middle - low, 0.35), 0, 1)
    lighter = np.clip((light - middle) / max(high - middle, 0.35), 0, 1)
    t = np.where(light < middle, darker, lighter)[:, None]
    base = rgb.astype(np.float64)
    brightness = float(base.max()) / 255.0
    dark = base * (0.8 if min(base) > 235 else 0.45)
    pale = base + (255.0 - base) * (0.12 if brightness < 0.2 else 0.35)
    painted = np.where(t < 0, base + t * (base - dark), base + t * (pale - base))
    return np.dstack([np.round(painted).astype(np.uint8)[grey], rgba[..., 3]])

"""Colours by name: sampling one, naming a cut-out's, and giving a thing another.

Recolouring makes colour independent of what a thing is, so that "what colour is the apple?"
cannot be answered without looking. Ranges are in HSV (degrees, 0-1, 0-1); naming is by the
nearest of their members in CIELAB, so that sampling and naming agree.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

# name: ((hue from, to), (saturation from, to), (value from, to)); hue may run below 0.
RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-7, 6), (0.78, 1.0), (0.62, 1.0)),
    "orange": ((22, 34), (0.82, 1.0), (0.88, 1.0)),
    "yellow": ((49, 59), (0.7, 1.0), (0.88, 1.0)),
    "green": ((92, 150), (0.5, 1.0), (0.35, 0.85)),
    "blue": ((206, 240), (0.6, 1.0), (0.5, 1.0)),
    "purple": ((266, 288), (0.5, 0.9), (0.42, 0.8)),
    "pink": ((318, 342), (0.32, 0.62), (0.92, 1.0)),
    "brown": ((16, 30), (0.55, 0.8), (0.3, 0.52)),
    "black": ((0, 360), (0.0, 0.15), (0.03, 0.14)),
    "white": ((0, 360), (0.0, 0.03), (0.95, 1.0)),
    "grey": ((0, 360), (0.0, 0.06), (0.42, 0.66)),
}
COLOURS = tuple(RANGES)
_DOMINANT = 0.62  # share of a cut-out's pixels that one colour needs to be its colour


def accept(colour: str) -> tuple[str, ...]:
    also = {"grey": ("gray", "silver"), "purple": ("violet",)}
    return (colour, *also.get(colour, ()))


def hsv_to_rgb(hsv: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) HSV (degrees, 0-1, 0-1) -> RGB in 0-1."""
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]

    def channel(n: float) -> NDArray[np.float64]:
        k = (n + hue / 60.0) % 6.0
        ramp = np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)
        return np.asarray(value - value * saturation * ramp, dtype=np.float64)

    return np.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-1)


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
    rgb = hsv_to_rgb(rng.uniform(low, high) % np.array([360.0, 1.01, 1.01]))
    return np.round(rgb * 255).astype(np.uint8)


@lru_cache(maxsize=1)
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
    """The colour of a cut-out (h, w, 4), or None where no one colour clearly dominates. Black
    outlines do not count against a colour."""
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
    """The cut-out (h, w, 4) in the colour ``rgb``: shading kept, every hue replaced. The median
    luminance becomes ``rgb`` itself, darker parts its shades, lighter ones its tints."""
    light = (rgba[..., :3] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)) / 255.0
    solid = light[rgba[..., 3] > 128]
    if solid.size == 0:
        return rgba
    low, middle, high = np.percentile(solid[:: max(1, solid.size // 4000)], [4, 50, 96])
    # Shades and tints each get half the range, so a photograph's contrast does not bleach it.
    darker = -np.clip((middle - light) / max(middle - low, 0.35), 0, 1)
    lighter = np.clip((light - middle) / max(high - middle, 0.35), 0, 1)
    t = np.where(light < middle, darker, lighter).astype(np.float32)[..., None]
    base = rgb.astype(np.float32)
    brightness = float(base.max()) / 255.0
    dark = base * (0.8 if min(base) > 235 else 0.45)
    pale = base + (255.0 - base) * (0.12 if brightness < 0.2 else 0.35)
    painted = np.where(t < 0, base + t * (base - dark), base + t * (pale - base))
    return np.concatenate([np.round(painted).astype(np.uint8), rgba[..., 3:]], axis=-1)

"""Backgrounds for composed scenes: plain, gradient, noise, stripes, checks, horizon, collage."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mico_training.world import colours

Pixels = NDArray[np.uint8]
KINDS = ("white", "plain", "gradient", "noise", "stripes", "checks", "horizon", "collage")
_WEIGHTS = np.array([0.27, 0.18, 0.13, 0.12, 0.05, 0.04, 0.11, 0.10])


def _any_colour(rng: np.random.Generator) -> NDArray[np.float32]:
    hsv = np.array([rng.uniform(0, 360), rng.uniform(0, 1) ** 1.5, rng.uniform(0.08, 1) ** 0.6])
    return (colours.hsv_to_rgb(hsv) * 255).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Clouds: random colours at a few scales."""
    total = np.zeros((height, width, 3), np.float32)
    base, spread = _any_colour(rng), float(rng.uniform(10, 60))
    grey = rng.random() < 0.5
    for cells in (3, 8, 24, 80):
        grid = rng.normal(0, 1, (cells, cells, 1 if grey else 3)).astype(np.float32)
        grid = np.repeat(grid, 3, axis=2) if grey else grid
        levels = np.clip(grid * 40 + 128, 0, 255).astype(np.uint8)
        layer = Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR)
        weight = 1.0 / math.sqrt(cells) if rng.random() < 0.7 else 0.3
        total += (np.asarray(layer, dtype=np.float32) - 128) / 40 * weight
    return np.clip(base + total * spread, 0, 255).astype(np.uint8)


def _mix(a: NDArray[np.float32], b: NDArray[np.float32], t: NDArray[np.float32]) -> Pixels:
    return np.asarray(a + (b - a) * t[..., None]).astype(np.uint8)


def _collage(rng: np.random.Generator, height: int, width: int, cut_outs: list[Pixels]) -> Pixels:
    """Large, strongly blurred cut-outs: a picture out of focus."""
    canvas = Image.new("RGB", (64, 64), tuple(int(v) for v in _any_colour(rng)))
    for rgba in cut_outs:
        side = int(rng.integers(30, 80))
        thing = Image.fromarray(rgba).resize((side, side), Image.Resampling.BOX)
        left, top = (int(v) for v in rng.integers(-20, 50, 2))
        canvas.paste(thing, (left, top), thing)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 4))))
    return np.asarray(canvas.resize((width, height), Image.Resampling.BICUBIC))


def make(
    rng: np.random.Generator,
    height: int,
    width: int,
    cut_outs: list[Pixels],
    kind: str | None = None,
) -> Pixels:
    """A background (height, width, 3) uint8; ``cut_outs`` (RGBA) are what a collage is made of."""
    kind = kind or str(rng.choice(KINDS, p=_WEIGHTS))
    if kind == "collage" and not cut_outs:
        kind = "noise"
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    first, second = _any_colour(rng), _any_colour(rng)
    if kind == "white":
        return np.full((height, width, 3), 255 if rng.random() < 0.7 else 246, np.uint8)
    if kind == "plain":
        return np.broadcast_to(first.astype(np.uint8), (height, width, 3)).copy()
    if kind == "gradient":
        angle = float(rng.uniform(0, 2 * math.pi))
        along = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
        return _mix(first, second, np.clip(along + 0.5, 0, 1))
    if kind == "noise":
        return _noise(rng, height, width)
    near = first + (second - first) * float(rng.uniform(0.15, 0.5))
    if kind == "stripes":
        angle, width_px = float(rng.uniform(0, math.pi)), float(rng.uniform(6, 30))
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) / width_px * math.pi)
        return _mix(first, near, np.clip(wave * 4 + 0.5, 0, 1))
    if kind == "checks":
        size = int(rng.integers(10, 44))
        return _mix(first, near, np.asarray((x // size + y // size) % 2, dtype=np.float32))
    if kind == "horizon":
        return _horizon(rng, height, width)
    return _collage(rng, height, width, cut_outs)


def _horizon(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Sky over ground, or wall over floor."""
    row = int(height * rng.uniform(0.4, 0.75))
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    upper, lower = _any_colour(rng), _any_colour(rng)
    if rng.random() < 0.5:
        upper = np.array([rng.uniform(110, 200), rng.uniform(170, 225), 245], np.float32)
        lower = np.array([rng.uniform(60, 190), rng.uniform(120, 180), 60], np.float32)
    image = np.where(
        np.arange(height)[:, None, None] < row, upper * (0.8 + 0.25 * ramp), lower * (1.25 - ramp)
    )
    image = image + rng.normal(0, float(rng.uniform(0, 7)), (height, width, 1))
    picture = np.clip(np.broadcast_to(image, (height, width, 3)), 0, 255)
    return np.asarray(picture, dtype=np.uint8)

"""Procedural shapes in neutral grey, which ``colours.tint`` paints; they need no package."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw
from scipy.ndimage import minimum_filter

from mico_training.data.language.english import Rng
from mico_training.data.table import Table

Point = tuple[float, float]
Coordinate = float | Literal["low", "high"]
SIDE = 192
STYLES = ("plain", "outlined", "shaded", "striped", "dotted", "gradient")
_MID = 150  # the grey that becomes the colour of a painted shape


class Face(Table):
    """A side of a solid; without a ``grey`` it is shaded as a round body."""

    form: Literal["polygon", "ellipse", "rectangle"]
    points: tuple[Point, ...]
    grey: int | None = None


class Shapes(Table):
    names: dict[str, tuple[str, ...]]
    corners: dict[str, tuple[tuple[Coordinate, Coordinate], ...]]
    solids: dict[str, tuple[Face, ...]]


shapes = Shapes.reader(Path(__file__).with_name("shapes.yaml"))


def _ngon(n: int, start: float = -90.0, radius: float = 0.48) -> list[Point]:
    angles = [math.radians(start + 360.0 * i / n) for i in range(n)]
    return [(0.5 + radius * math.cos(a), 0.5 + radius * math.sin(a)) for a in angles]


def _outline(name: str, rng: Rng) -> list[Point]:
    half = float(rng.uniform(0.13, 0.2))
    if name == "heart":
        t = np.linspace(0, 2 * math.pi, 80, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return list(zip(0.5 + x / 34.0, 0.47 - y / 34.0, strict=True))
    if name in ("pentagon", "hexagon"):
        return _ngon(5) if name == "pentagon" else _ngon(6, 0.0)
    if name == "star":
        inside = _ngon(5, -90.0 + 180.0 / 5, 0.48 * float(rng.uniform(0.38, 0.5)))
        return [p for pair in zip(_ngon(5), inside, strict=True) for p in pair]
    if name == "rectangle":
        half = float(rng.uniform(0.18, 0.3))
    ends: dict[Coordinate, Coordinate] = {"low": 0.5 - half, "high": 0.5 + half}
    corners = shapes().corners[name]
    return [(float(ends.get(x, x)), float(ends.get(y, y))) for x, y in corners]


def _silhouette(name: str, rng: Rng, side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)

    def ellipse(x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        draw.ellipse((x0 * side, y0 * side, x1 * side, y1 * side), fill=fill)

    if name in ("circle", "ball", "ring", "crescent"):
        ellipse(0.02, 0.02, 0.98, 0.98)
    if name == "ring":
        inner = float(rng.uniform(0.2, 0.28))
        ellipse(inner, inner, 1 - inner, 1 - inner, 0)
    elif name == "crescent":
        ellipse(0.32, -0.05, 1.2, 0.85, 0)
    elif name == "oval":
        half = float(rng.uniform(0.25, 0.33))
        ellipse(0.02, 0.5 - half, 0.98, 0.5 + half)
    elif name not in ("circle", "ball"):
        draw.polygon([(x * side, y * side) for x, y in _outline(name, rng)], fill=255)
    return mask


def _solid(name: str, side: int) -> Image.Image:
    image = Image.new("LA", (side, side), (0, 0))
    round_body = np.interp(np.linspace(0, 1, side), [0.1, 0.35, 0.9], [_MID, 205, 90])
    for face in shapes().solids[name]:
        mask = Image.new("L", (side, side), 0)
        draw_face = getattr(ImageDraw.Draw(mask), face.form)
        draw_face([(x * side, y * side) for x, y in face.points], fill=255)
        row = round_body if face.grey is None else np.full(side, face.grey)
        grey = Image.fromarray(np.tile(row, (side, 1)).astype(np.uint8))
        image.paste(Image.merge("LA", (grey, mask)), mask=mask)
    return image


def _surface(name: str, style: str, rng: Rng, side: int) -> NDArray[np.floating]:
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if name == "ball" or style == "shaded":
        distance = np.hypot(x - 0.36, y - 0.33)
        return np.asarray(np.interp(distance, [0.0, 0.25, 0.75], [240, _MID + 10, 75]))
    if style == "striped":
        angle = float(rng.uniform(0, math.pi))
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * float(rng.uniform(25, 50)))
        return np.where(wave > 0.5, 100.0, _MID)
    if style == "dotted":
        rate = float(rng.uniform(5, 8)) * math.pi
        return np.where(np.sin(x * rate) * np.sin(y * rate) > 0.7, 215.0, _MID)
    if style == "gradient":
        angle = float(rng.uniform(0, 2 * math.pi))
        along = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)
        return np.asarray(_MID + 110.0 * along)
    return np.full((side, side), float(_MID))


@lru_cache(maxsize=512)
def draw(name: str, style: str, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    side = 2 * SIDE
    if name in shapes().solids:
        image = _solid(name, side)
    else:
        mask = _silhouette(name, rng, side)
        surface = _surface(name, style, rng, side).astype(np.float32)
        grey = Image.fromarray(np.clip(surface, 0, 255).astype(np.uint8))
        if style == "outlined":
            width = int(rng.integers(3, 7)) * 2 + 1
            # As Pillow's MinFilter, which sorts the whole window of each pixel.
            inside = Image.fromarray(minimum_filter(np.asarray(mask), width, mode="nearest"))
            grey.paste(15, mask=ImageChops.subtract(mask, inside))
        image = Image.merge("LA", (grey, mask))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA"))

"""Ways and paths of the things and of the camera of a clip.

Things and the camera move in the world; a thing's place in a frame is its place in the world seen
by the camera. So "the dog moves left" is about the dog and what is behind it, also when the camera
follows the dog.

Places and sizes are fractions of the picture: x to the right, y down, a thing's size (its longest
side) of the picture's short side. Legend: T frames.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_training.data.language.english import Rng
from mico_world.things.catalogue import Thing

Line = NDArray[np.float64]
WAYS = ("left", "right", "up", "down", "nearer", "away", "still")
MOVES = WAYS[:-1]
# The direction in x and y.
STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
REVERSED = dict(zip(WAYS, ("right", "left", "down", "up", "away", "nearer", "still"), strict=True))


@dataclass(frozen=True)
class Path:
    """Centre and size in each frame, three arrays (T,). The camera's size is that of its view."""

    x: Line
    y: Line
    size: Line

    def seen_by(self, camera: "Path") -> "Path":
        x, y = ((p - c) / camera.size + 0.5 for p, c in ((self.x, camera.x), (self.y, camera.y)))
        return Path(x, y, self.size / camera.size)


@dataclass(frozen=True)
class Track:
    """A thing that moves: its cut-out, its way in the world, and its path in the picture."""

    thing: Thing
    colour: str | None
    image: Image.Image
    way: str
    path: Path

    def boxes(self, shape: tuple[int, int]) -> Line:
        """Its boxes (T, 4) in a picture of this height and width: centre, width and height."""
        scale = self.path.size * min(shape) / max(self.image.size)
        width, height = (scale * n / m for n, m in zip(self.image.size, shape[::-1], strict=True))
        return np.stack([self.path.x, self.path.y, width, height], 1)


def _pace(rng: Rng, n: int) -> Line:
    """How far along its path something is, from 0 to 1: evenly, gently, or with stops."""
    t, sort = np.linspace(0, 1, n), rng.random()
    if sort < 0.4:
        return t
    if sort < 0.7:
        return t * t * (3 - 2 * t)
    knots = rng.uniform(0, 1, (2, int(rng.integers(1, 4))))
    when, where = np.sort(np.pad(knots, ((0, 0), (1, 1)), constant_values=((0, 1),)))
    return np.asarray(np.interp(t, when, where))


def path_of(rng: Rng, way: str, n: int, size: float, travel: float, ratio: float) -> Path:
    """A path whose middle is anywhere. A thing that goes sideways bobs, bends and drifts a little;
    one that comes nearer or goes away changes its size by ``ratio``."""
    along = _pace(rng, n) - 0.5
    sizes = np.full(n, size)
    if way in ("nearer", "away"):
        sizes = size * ratio ** (along if way == "nearer" else -along)
        travel = float(rng.uniform(0, 0.1))
    wave = np.sin(2 * np.pi * (rng.uniform(0.5, 4) * np.linspace(0, 1, n) + rng.random()))
    bend = (4 * along**2 - 0.4) * rng.uniform(-0.3, 0.3) * (rng.random() < 0.4)
    bob = wave * min(0.04, 0.2 * travel) / max(travel, 0.01) * (rng.random() < 0.3)
    across = (along * rng.uniform(-0.35, 0.35) + bend + bob) * travel * (way != "still")
    x, y = (
        rng.uniform(size / 2, 1 - size / 2) + (step * travel * along if step else across)
        for step in STEP.get(way, (0.0, 0.0))
    )
    return Path(x, y, sizes)


def camera_path(rng: Rng, way: str, n: int) -> Path:
    """A camera whose view is the unit square in the middle of the clip."""
    travel, ratio = float(rng.uniform(0.12, 0.7)), float(rng.uniform(1.25, 2.2))
    # A camera that goes nearer sees less.
    path = path_of(rng, REVERSED[way] if way in ("nearer", "away") else way, n, 1.0, travel, ratio)
    return replace(path, x=path.x - np.median(path.x) + 0.5, y=path.y - np.median(path.y) + 0.5)


def shaken(rng: Rng, path: Path) -> Path:
    steps = rng.normal(0, float(rng.uniform(0.0005, 0.004)), (2, len(path.x)))
    x, y = (np.convolve(step.cumsum() * 0.5 + step, (0.25, 0.5, 0.25), "same") for step in steps)
    return replace(path, x=path.x + x - x.mean(), y=path.y + y - y.mean())

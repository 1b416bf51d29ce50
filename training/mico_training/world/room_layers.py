"""Layered scenes: flat or curved shapes that float before a far background, at exact depths.

They need no mesh. Depth maps of test sets are often this simple, and without a floor neither
size nor height in the picture tells what is nearer: only the depth does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mico_training.world.raycast import Floats, directions

OUTLINES = ("rectangle", "square", "circle", "oval", "triangle", "polygon")


@dataclass(frozen=True)
class Layer:
    """A shape: ``outline`` of ``OUTLINES``; centre and half sides in units of half the view's side
    (x right, y up); ``depth`` of its centre in metres; ``bulge`` metres by which a curved one comes
    nearer in its middle; ``slant`` (2,) change of depth, metres per unit of x and y."""

    outline: str
    centre: tuple[float, float]
    half: tuple[float, float]
    depth: float
    bulge: float = 0.0
    slant: tuple[float, float] = (0.0, 0.0)
    corners: tuple[tuple[float, float], ...] = ()


def polygon(outline: str, rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Corners in [-1, 1]^2, counter-clockwise, of a triangle or an irregular convex shape."""
    if outline == "triangle":
        return ((-1.0, -1.0), (1.0, -1.0), (float(rng.uniform(-0.5, 0.5)), 1.0))
    n_corners = int(rng.integers(5, 9))
    turns = np.arange(n_corners) / n_corners + rng.uniform(0, 0.6 / n_corners, n_corners)
    return tuple((float(np.cos(a)), float(np.sin(a))) for a in 2 * np.pi * turns)


def draw(
    layers: list[Layer], background: Floats, size: int, tan_half: float
) -> tuple[Floats, Floats, NDArray[np.int32]]:
    """Depth (H, W), normals (H, W, 3) and owner (H, W; -1 is the background) of the layers."""
    depth = background.copy()
    normal = surface_normals(background, tan_half)
    owner = np.full((size, size), -1, np.int32)
    rays = directions(size, 1.0)
    for index, layer in enumerate(layers):
        x, y = rays[..., 0] - layer.centre[0], rays[..., 1] - layer.centre[1]
        across, up = x / layer.half[0], y / layer.half[1]
        if layer.outline in ("circle", "oval"):
            dome = np.sqrt(np.clip(1 - across**2 - up**2, 0, None))
        else:
            dome = np.clip(1 - across**2, 0, None) * np.clip(1 - up**2, 0, None)
        field = layer.depth + layer.slant[0] * x + layer.slant[1] * y - layer.bulge * dome
        field = field.astype(np.float32)
        seen = _inside(layer, across, up) & (field < depth)
        depth[seen] = field[seen]
        normal[seen] = surface_normals(field, tan_half)[seen]
        owner[seen] = index
    return depth, normal, owner


def surface_normals(depth: Floats, tan_half: float) -> Floats:
    """Camera-space unit normals (H, W, 3), facing the camera, of a smooth depth field (H, W)."""
    points = directions(len(depth), tan_half) * depth[..., None]
    along_rows, along_columns = np.gradient(points, axis=(0, 1))
    normal = np.cross(along_columns, -along_rows)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    facing = (normal * points).sum(axis=-1, keepdims=True) < 0
    return np.where(facing, normal, -normal).astype(np.float32)


def _inside(layer: Layer, across: Floats, up: Floats) -> NDArray[np.bool_]:
    if layer.corners:
        inside = np.ones(across.shape, np.bool_)
        for (ax, ay), (bx, by) in zip(
            layer.corners, layer.corners[1:] + layer.corners[:1], strict=True
        ):
            inside &= (bx - ax) * (up - ay) - (by - ay) * (across - ax) >= 0
        return inside
    if layer.outline in ("circle", "oval"):
        return np.asarray(across**2 + up**2 <= 1)
    return (np.abs(across) <= 1) & (np.abs(up) <= 1)

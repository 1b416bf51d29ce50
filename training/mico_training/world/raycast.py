"""Rays of a pinhole camera into triangle meshes: exact depth, normals, owners and shadows.

Everything is in the camera's frame, as OpenGL has it: x right, y up, the camera looks along -z.
A ray's direction is (x, y, -1), so the distance that Embree returns *is* the depth along the
optical axis. A view of 192 x 192 pixels takes about 2 ms; the tree over 30,000 triangles 20 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

Floats = NDArray[np.float32]
_NOTHING = -1


@dataclass(frozen=True)
class Hits:
    """What each pixel sees.

    depth (H, W) metres along the optical axis, 0 where nothing is hit; normal (H, W, 3) unit
    vectors that face the camera, 0 where nothing is hit; owner (H, W) index of the mesh or -1;
    face (H, W) index of its triangle; lit (H, W) False in shadow.
    """

    depth: Floats
    normal: Floats
    owner: NDArray[np.int32]
    face: NDArray[np.int32]
    lit: NDArray[np.bool_]


def directions(size: int, tan_half: float) -> Floats:
    """(H, W, 3) ray directions (x, y, -1) of a square view; ``tan_half``: of half its field."""
    ticks = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * np.float32(tan_half)
    x, y = np.meshgrid(ticks, -ticks)
    return np.stack([x, y, -np.ones_like(x)], axis=-1).astype(np.float32)


def cast(
    meshes: Sequence[tuple[Floats, NDArray[np.int32]]],
    size: int,
    tan_half: float,
    light: Floats | None = None,
) -> Hits:
    """Cast one ray a pixel into ``meshes``: (vertices (V, 3), faces (F, 3)) in the camera's frame.

    ``light`` is the unit direction towards the sun for shadows; None casts none.
    """
    scene = EmbreeScene()
    for vertices, faces in meshes:
        TriangleMesh(
            scene=scene,
            vertices=np.ascontiguousarray(vertices, np.float32),
            indices=np.ascontiguousarray(faces, np.int32),
        )
    rays = directions(size, tan_half).reshape(-1, 3)
    found = scene.run(np.zeros_like(rays), rays, output=1)
    hit = found["primID"] != _NOTHING
    depth = np.where(hit, found["tfar"], 0).astype(np.float32)
    normal = np.where(hit[:, None], found["Ng"], 0).astype(np.float32)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    normal *= np.where((normal * rays).sum(axis=1, keepdims=True) > 0, -1, 1)
    lit = np.ones(len(rays), np.bool_)
    if light is not None:
        start = rays * depth[:, None] + normal * (1e-3 * depth[:, None])
        sun = np.broadcast_to(light.astype(np.float32), start.shape)
        blocked = scene.run(start, np.ascontiguousarray(sun), query="OCCLUDED")
        lit = (blocked == _NOTHING) | ~hit
    shape = (size, size)
    return Hits(
        depth=depth.reshape(shape),
        normal=normal.reshape(*shape, 3),
        owner=np.where(hit, found["geomID"], _NOTHING).astype(np.int32).reshape(shape),
        face=found["primID"].astype(np.int32).reshape(shape),
        lit=lit.reshape(shape),
    )


def shade(
    albedo: NDArray[np.uint8],
    normal: Floats,
    light: Floats,
    *,
    ambient: float,
    lit: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Lambert's law with an ambient part: (H, W, 3) colours under a sun in direction ``light``."""
    direct = np.clip((normal * light).sum(axis=-1), 0, 1)
    if lit is not None:
        direct = direct * lit
    # a weak second lamp at the camera keeps the shape visible inside shadows
    fill = 0.3 * np.clip(normal[..., 2], 0, 1)
    strength = ambient + (1 - ambient) * (0.8 * direct + fill)
    return np.asarray(np.clip(albedo * strength[..., None], 0, 255), np.uint8)


def normal_picture(normal: Floats) -> NDArray[np.uint8]:
    """Unit normals as colours, (n + 1) / 2 * 255: x right is red, y up green, to the camera blue.

    Where there is no surface (a zero vector) the picture is black.
    """
    picture = np.asarray(np.rint((normal + 1) * 127.5), np.uint8)
    picture[~normal.any(axis=-1)] = 0
    return picture

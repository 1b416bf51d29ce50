"""The views of rooms: ray-cast things on a floor, or layers before a background.

Depths are drawn clearly apart and in random order. The sizes in the picture do not depend on them,
so that the larger thing is the nearer one only by chance. Layers are flat or curved shapes that
float at exact depths: without a floor, only the depth map tells which layer is nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_training.world import colours, meshes
from mico_training.world.language import Rng, pick
from mico_training.world.meshes import Floats, directions
from mico_training.world.sample import Split
from mico_training.world.sources import split_of

OUTLINES = ("rectangle", "square", "circle", "oval", "triangle", "polygon")
SIZE = 192  # width and height in pixels of every picture and map
MAX_DEPTH = 20.0  # metres; a depth sensor measures nothing beyond, so the depth map has a hole
MIN_VISIBLE = 0.55  # least share of a thing's pixels that no other thing hides
N_VARIANTS = 4000  # proportions of each solid or outline; each variant is in one split


@dataclass(frozen=True)
class Scene:
    """A view before it is encoded; all arrays are (H, W) or (H, W, 3)."""

    names: tuple[str, ...]
    rgb: NDArray[np.uint8]
    depth: Floats  # metres, 0: nothing
    normal: Floats
    owner: NDArray[np.int32]  # index into ``names``; other numbers are no thing
    albedo: NDArray[np.uint8]
    tan_half: float
    floor: bool  # whether the things stand on a floor
    curved: bool = True  # whether the normals tell the things from the background


def _variant(rng: Rng, split: Split, kind: str) -> Rng:
    """The random stream of one variant of a solid or outline that belongs to ``split``."""
    while True:
        number = int(rng.integers(N_VARIANTS))
        if split_of(f"{kind}/{number}") == split:
            return np.random.default_rng([sum(kind.encode()), number])


def _depths(rng: Rng, count: int, first: float) -> NDArray[np.float64]:
    """Depths from ``first`` on, each 1.2 to 2 times the one before, in random order."""
    steps = rng.uniform(1.22, {1: 2.2, 2: 2.4, 3: 1.7, 4: 1.5}[count], count)
    steps[0] = 1.0
    depths = np.asarray(first * np.cumprod(steps), np.float64)
    rng.shuffle(depths)
    return depths


def _columns(rng: Rng, count: int) -> NDArray[np.float64]:
    slots = (np.arange(count) + 0.5) / count * 2 - 1
    jitter = 0.45 if count == 1 else 0.3 / count
    return np.asarray(0.92 * slots + rng.uniform(-jitter, jitter, count))


def _chosen_meshes(
    rng: Rng, split: Split, count: int, modelled: bool
) -> tuple[tuple[str, ...], list[meshes.Mesh]]:
    same = count > 1 and rng.random() < 0.15
    if not modelled:
        shapes = rng.choice(meshes.SOLIDS, count, replace=same)
        shapes = np.repeat(shapes[:1], count) if same else shapes
        made = []
        for shape in map(str, shapes):
            variant = _variant(rng, split, f"solid/{shape}")
            colour = colours.sample(rng, str(rng.choice(colours.COLOURS)))
            made.append(meshes.solid(shape, colour, variant))
        return tuple(map(str, shapes)), made
    by_name = meshes.models_of(split)
    # The square root keeps the 60 chairs from crowding out the one seesaw.
    names = list(by_name)
    weights = np.array([len(by_name[name]) ** 0.5 for name in names])
    chosen = [pick(rng, by_name[str(rng.choice(names, p=weights / weights.sum()))])]
    words = set(chosen[0].name.split())
    for name in map(str, rng.permutation(names)):
        if len(chosen) == count or same:
            break
        alike = 0.45 < max(by_name[name][0].size) / max(chosen[0].size) < 2.2
        if alike and words.isdisjoint(name.split()):  # no table beside a pool table
            chosen.append(pick(rng, by_name[name]))
            words.update(name.split())
    if len(chosen) < count:
        chosen = [pick(rng, by_name[chosen[0].name]) for _ in range(count)]
    rng.shuffle(chosen)
    return tuple(model.name for model in chosen), [meshes.load(model) for model in chosen]


def room_scene(rng: Rng, split: Split, count: int, modelled: bool) -> Scene | None:
    """Ray-cast things on a floor; None if a thing leaves the view or touches another."""
    names, chosen = _chosen_meshes(rng, split, count, modelled)
    tan_half = float(np.tan(np.radians(rng.uniform(38, 72)) / 2))
    real = float(np.mean([np.ptp(mesh.vertices, axis=0).max() for mesh in chosen]))
    share = rng.uniform(0.4, 1.0) * {1: 1.1, 2: 0.8, 3: 0.6, 4: 0.48}[count]
    first = float(rng.uniform(0.5, 6.0)) if not modelled else real / (share * 2 * tan_half)
    first = float(np.clip(first * rng.uniform(0.7, 1.2), 0.4, 9.0))
    depths = _depths(rng, count, first)
    pitch = float(np.radians(rng.choice([rng.uniform(3, 20), rng.uniform(15, 40)])))
    middle = float(np.exp(np.log(depths).mean()))
    height = middle * np.tan(pitch + np.arctan(rng.uniform(0.1, 0.5) * tan_half))
    cos, sin = np.cos(pitch), np.sin(pitch)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], np.float32).T

    def to_camera(points: NDArray[Any]) -> Floats:
        moved = points - np.array([0, height, 0])
        return np.asarray(moved @ np.linalg.inv(turn), np.float32)

    # In 3 of 10 views the things float: on a floor the lower thing is always the nearer one.
    floats = bool(rng.random() < 0.3)
    placed: list[tuple[Floats, NDArray[np.int32]]] = []
    feet: list[tuple[float, float, float]] = []
    for mesh, column, depth in zip(chosen, _columns(rng, count), depths, strict=True):
        extent = float(np.ptp(mesh.vertices, axis=0).max())
        wanted = share * rng.uniform(0.6, 1.25) * tan_half * depth * 1.2
        scale = wanted / extent if not modelled else np.clip(wanted / extent, 0.55, 1.7)
        yaw = rng.uniform(-1.1, 1.1) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
        spin = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        # The foot is on the floor (or above it by ``lift``), at this depth along the optical axis.
        ground = (depth - height * sin) / cos
        lift = rng.uniform(0, 0.9) * tan_half * depth if floats else 0.0
        foot = np.array([column * tan_half * depth, lift, -ground])
        vertices = to_camera(mesh.vertices * scale @ spin.T + foot)
        if vertices[:, 2].max() > -0.12:
            return None
        image = vertices[:, :2] / -vertices[:, 2:] / tan_half
        if np.abs(image).max() > 1.12 or np.abs(image.mean(axis=0)).max() > 0.95:
            return None
        flat = float(np.ptp((mesh.vertices * scale)[:, [0, 2]], axis=0).max()) / 2
        if any(np.hypot(x - foot[0], z - foot[2]) < 0.75 * (flat + r) for x, z, r in feet):
            return None
        feet.append((float(foot[0]), float(foot[2]), flat))
        placed.append((vertices, mesh.faces))
    wall = max(-z + r for _, z, r in feet) * rng.uniform(1.05, 2.0)
    walled = rng.random() < 0.8
    plane = np.array([[-90, 0, 5], [90, 0, 5], [90, 0, -90], [-90, 0, -90]])
    upright = np.array([[-90, 0, -wall], [90, 0, -wall], [90, 60, -wall], [-90, 60, -wall]])
    quad = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    ground_meshes = [(to_camera(corners), quad) for corners in (plane, upright)[: 1 + walled]]
    light = rng.normal(size=3) * 0.6 + np.array([0.0, 1.3, 0.7])
    light_camera = np.asarray(light / np.linalg.norm(light) @ np.linalg.inv(turn), np.float32)
    shadows = bool(rng.random() < 0.6)
    hits = meshes.cast(placed + ground_meshes, SIZE, tan_half, light_camera if shadows else None)
    for index, thing in enumerate(placed if count > 1 else ()):
        alone = meshes.cast([thing], SIZE, tan_half).owner == 0
        if (hits.owner == index).sum() < MIN_VISIBLE * alone.sum():
            return None
    albedo = _ground_albedo(rng, hits, turn, height, tan_half, count)
    for index, mesh in enumerate(chosen):
        seen = hits.owner == index
        albedo[seen] = mesh.colours[hits.face[seen]]
    rgb = meshes.shade(
        albedo, hits.normal, light_camera, ambient=float(rng.uniform(0.3, 0.6)), lit=hits.lit
    )
    nothing = hits.owner < 0
    rgb[nothing] = albedo[nothing]
    depth = np.where(hits.depth > MAX_DEPTH, 0, hits.depth).astype(np.float32)
    return Scene(names, rgb, depth, hits.normal, hits.owner, albedo, tan_half, not floats)


def _ground_albedo(
    rng: Rng, hits: meshes.Hits, turn: Floats, height: float, tan_half: float, count: int
) -> NDArray[np.uint8]:
    """(H, W, 3) colours of the sky, the floor (plain, tiles or planks) and the wall."""
    albedo = np.empty((*hits.depth.shape, 3), np.uint8)
    albedo[:] = rng.integers(150, 240, 3)
    floor, wall = hits.owner == count, hits.owner == count + 1
    colour = _muted(rng)
    albedo[floor], albedo[wall] = colour, _muted(rng)
    pattern = rng.choice(["plain", "tiles", "planks"])
    if pattern != "plain":
        points = directions(len(hits.depth), tan_half) * hits.depth[..., None]
        world = points[floor] @ turn + np.array([0, height, 0])
        cell = float(np.exp(rng.uniform(np.log(0.15), np.log(1.0)))) * max(height, 0.3)
        odd = np.floor(world[:, 0] / cell).astype(int)
        if pattern == "tiles":
            odd = odd + np.floor(world[:, 2] / cell).astype(int)
        shade = np.where(odd % 2 == 0, 1.0, rng.uniform(0.75, 0.95))
        albedo[floor] = (np.array(colour) * shade[:, None]).astype(np.uint8)
    return albedo


def _muted(rng: Rng) -> NDArray[np.uint8]:
    grey = rng.uniform(70, 235)
    return np.asarray(np.clip(grey + rng.uniform(-28, 28, 3), 20, 250), np.uint8)


def layered_scene(rng: Rng, split: Split, count: int) -> Scene:
    """Floating outlines before a flat, slanted or floor-like background."""
    tan_half = float(np.tan(np.radians(rng.uniform(40, 70)) / 2))
    depths = _depths(rng, count, float(np.exp(rng.uniform(np.log(0.5), np.log(5.0)))))
    far = float(depths.max()) * rng.uniform(1.2, 2.5)
    rays = directions(SIZE, 1.0)
    background = np.full((SIZE, SIZE), far, np.float32)
    style = rng.random()
    if style < 0.2:
        background *= 1 + np.float32(rng.uniform(-0.15, 0.15)) * rays[..., 0]
    elif style < 0.4:  # a ramp that is nearer at the bottom, like a floor
        background *= 1 / (1 + np.float32(rng.uniform(0.05, 0.8)) * np.clip(-rays[..., 1], 0, 1))
    layers: list[Layer] = []
    palette = rng.permutation(colours.COLOURS)
    same = rng.random() < 0.3
    outline = str(rng.choice(OUTLINES))
    curved_style = rng.random() < 0.35
    slants = rng.uniform(-0.1, 0.1, (count, 2)) * (rng.random() < 0.2)
    equal_size = rng.random() < 0.25
    shared = rng.uniform(0.45, 0.9) / count
    outlines = rng.permutation(OUTLINES)
    for index, (column, depth) in enumerate(zip(_columns(rng, count), depths, strict=True)):
        outline = outline if same else str(outlines[index])
        variant = _variant(rng, split, f"outline/{outline}")
        half = min(float(shared if equal_size else rng.uniform(0.4, 1.0) / count), 0.6)
        ratio = 1.0
        stretched = outline in ("rectangle", "oval")
        if stretched:
            ratio = float(variant.choice([variant.uniform(0.4, 0.7), variant.uniform(1.4, 2.2)]))
        elif outline not in ("square", "circle"):
            ratio = float(variant.uniform(0.8, 1.4))
        across = half if ratio < 1 or stretched else half / ratio**0.5
        sides = (across, min(half * ratio, 0.85) if ratio < 1 or stretched else half)
        top = 0.95 - sides[1]
        centre = (float(column), float(rng.uniform(-top, top)) * 0.9)
        bulge = float(depth * rng.uniform(0.02, 0.08)) if curved_style else 0.0
        slant = (slants[index][0] * depth, slants[index][1] * depth)
        corners = polygon(outline, variant) if outline in ("triangle", "polygon") else ()
        layers.append(Layer(outline, centre, sides, float(depth), bulge, slant, corners))
    depth_map, normal, owner = draw_layers(layers, background, SIZE, tan_half)
    albedo = np.empty((SIZE, SIZE, 3), np.uint8)
    albedo[:] = _muted(rng)
    for index in range(count):
        albedo[owner == index] = colours.sample(rng, str(palette[index]))
    light = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.7), 1.0])
    light = np.asarray(light / np.linalg.norm(light), np.float32)
    rgb = meshes.shade(albedo, normal, light, ambient=float(rng.uniform(0.4, 0.9)))
    names = tuple(layer.outline for layer in layers)
    return Scene(names, rgb, depth_map, normal, owner, albedo, tan_half, False, curved_style)


@dataclass(frozen=True)
class Layer:
    """A shape of ``OUTLINES``; centre and half sides in units of half the view's side (x right, y
    up); ``depth`` of its centre in metres; ``bulge`` metres by which its middle comes nearer;
    ``slant``: the change of depth, metres per unit of x and y."""

    outline: str
    centre: tuple[float, float]
    half: tuple[float, float]
    depth: float
    bulge: float = 0.0
    slant: tuple[float, float] = (0.0, 0.0)
    corners: tuple[tuple[float, float], ...] = ()


def polygon(outline: str, rng: Rng) -> tuple[tuple[float, float], ...]:
    """Corners in [-1, 1]^2, counter-clockwise, of a triangle or an irregular convex shape."""
    if outline == "triangle":
        return ((-1.0, -1.0), (1.0, -1.0), (float(rng.uniform(-0.5, 0.5)), 1.0))
    n_corners = int(rng.integers(5, 9))
    turns = np.arange(n_corners) / n_corners + rng.uniform(0, 0.6 / n_corners, n_corners)
    return tuple((float(np.cos(a)), float(np.sin(a))) for a in 2 * np.pi * turns)


def draw_layers(
    layers: list[Layer], background: Floats, size: int, tan_half: float
) -> tuple[Floats, Floats, NDArray[np.int32]]:
    """Depth (H, W), normals (H, W, 3) and owner (H, W; -1 is the background) of the view."""
    depth = background.copy()
    normal = surface_normals(background, tan_half)
    owner = np.full((size, size), -1, np.int32)
    rays = directions(size, 1.0)
    for index, layer in enumerate(layers):
        x, y = rays[..., 0] - layer.centre[0], rays[..., 1] - layer.centre[1]
        across, up = x / layer.half[0], y / layer.half[1]
        if layer.outline in ("circle", "oval"):
            dome = np.sqrt(np.clip(1 - across**2 - up**2, 0, None))
            inside = across**2 + up**2 <= 1
        else:
            dome = np.clip(1 - across**2, 0, None) * np.clip(1 - up**2, 0, None)
            inside = (np.abs(across) <= 1) & (np.abs(up) <= 1) | bool(layer.corners)
        following = layer.corners[1:] + layer.corners[:1]
        for (ax, ay), (bx, by) in zip(layer.corners, following, strict=True):
            inside &= (bx - ax) * (up - ay) - (by - ay) * (across - ax) >= 0
        field = layer.depth + layer.slant[0] * x + layer.slant[1] * y - layer.bulge * dome
        field = field.astype(np.float32)
        seen = inside & (field < depth)
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

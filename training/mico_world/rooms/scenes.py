"""The views of rooms: ray-cast things on a floor, layers, or cut-outs before a background.

Depths are drawn clearly apart and in random order. The sizes in the picture do not depend on them
(but for half of the views of cut-outs), so that the larger thing is the nearer one only by chance.
Layers are flat or curved shapes that float at exact depths: without a floor, only the depth map
tells which layer is nearer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mico_training.data.language.english import Rng, pick
from mico_training.data.sources.written import Split
from mico_world.pictures.compose import Item, Placed, dress, photographic, render, room
from mico_world.rooms import meshes
from mico_world.rooms.meshes import Floats, Mesh, directions
from mico_world.sources import split_of
from mico_world.things import colours
from mico_world.things.catalogue import Catalogue
from mico_world.things.photographs import Photographs

OUTLINES = ("rectangle", "square", "circle", "oval", "triangle", "polygon")
SIZE = 224  # width and height in pixels of every picture and map
MAX_DEPTH = 20.0  # metres; a depth sensor measures nothing beyond, so the depth map has a hole
MIN_VISIBLE = 0.6  # least share of a thing's pixels that no other thing hides
N_VARIANTS = 4000  # proportions of each solid or outline; each variant is in one split


class Label(NamedTuple):
    """What a thing of a view is. ``accept`` are its right names."""

    identity: str
    name: str
    accept: tuple[str, ...]
    colour: str | None = None


@dataclass(frozen=True)
class RoomScene:
    """A view before it is encoded; all arrays are (H, W) or (H, W, 3)."""

    labels: tuple[Label, ...]
    rgb: NDArray[np.uint8]
    depth: Floats  # metres, 0: nothing
    normal: Floats
    owner: NDArray[np.int32]  # index into ``labels``; other numbers are no thing
    tan_half: float
    asked: int = 0  # so many of the things are asked about, the first ones; the rest is clutter
    floor: bool = False  # whether the things stand on a floor
    curved: bool = True  # whether the normals tell the things from the background


def _variant(rng: Rng, split: Split, kind: str) -> tuple[Label, Rng]:
    """A variant of a solid or outline that belongs to ``split``, and its own random stream."""
    while True:
        number = int(rng.integers(N_VARIANTS))
        identity, name = f"{kind}/{number}", kind.rpartition("/")[2]
        if split_of(identity) == split:
            stream = np.random.default_rng([sum(kind.encode()), number])
            return Label(identity, name, (name,)), stream


def _depths(rng: Rng, count: int, first: float) -> NDArray[np.float64]:
    """Depths from ``first`` on, each 1.2 to 2 times the one before, in random order."""
    steps = rng.uniform(1.22, {1: 2.2, 2: 2.4, 3: 1.7}.get(count, 1.5), count)
    steps[0] = 1.0
    depths = np.asarray(first * np.cumprod(steps), np.float64)
    rng.shuffle(depths)
    return depths


def _columns(rng: Rng, count: int) -> NDArray[np.float64]:
    slots = (np.arange(count) + 0.5) / count * 2 - 1
    jitter = 0.45 if count == 1 else 0.3 / count
    return np.asarray(0.92 * slots + rng.uniform(-jitter, jitter, count))


def _chosen_meshes(rng: Rng, split: Split, count: int, modelled: bool) -> list[tuple[Label, Mesh]]:
    same = count > 1 and rng.random() < 0.15
    if not modelled:
        shapes = rng.choice(meshes.SOLIDS, count, replace=same)
        made = []
        for shape in map(str, np.repeat(shapes[:1], count) if same else shapes):
            label, variant = _variant(rng, split, f"solid/{shape}")
            colour = colours.sample(rng, str(rng.choice(colours.COLOURS)))
            made.append((label, meshes.solid(shape, colour, variant)))
        return made
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
    labels = [Label(f"sweethome3d/{model.id}", model.name, (model.name,)) for model in chosen]
    return list(zip(labels, map(meshes.load, chosen), strict=True))


def room_scene(
    rng: Rng, split: Split, count: int, modelled: bool, photographs: Photographs | None = None
) -> RoomScene | None:
    """Ray-cast things on a floor; None if a thing leaves the view or touches another. Half of the
    rooms with models hold up to four further ones as clutter."""
    labels, chosen = zip(*_asked_and_clutter(rng, split, count, modelled), strict=True)
    tan_half = float(np.tan(np.radians(rng.uniform(38, 72)) / 2))
    real = float(np.mean([np.ptp(mesh.vertices, axis=0).max() for mesh in chosen]))
    share = rng.uniform(0.4, 1.0) * {1: 1.1, 2: 0.8, 3: 0.6, 4: 0.48}[count]
    first = float(rng.uniform(0.5, 6.0)) if not modelled else real / (share * 2 * tan_half)
    first = float(np.clip(first * rng.uniform(0.7, 1.2), 0.4, 9.0))
    depths = _depths(rng, count, first)
    beside = len(chosen) - count
    columns = np.append(_columns(rng, count), rng.uniform(-1.0, 1.0, beside))
    depths = np.append(depths, depths.max() * rng.uniform(0.7, 1.6, beside))
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
    placed: list[Mesh] = []
    kept: list[Label] = []
    feet: list[tuple[float, float, float]] = []
    for index, (mesh, column, depth) in enumerate(zip(chosen, columns, depths, strict=True)):
        needed = index < count
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
        image = vertices[:, :2] / np.minimum(vertices[:, 2:], -0.12) / -tan_half
        flat = float(np.ptp((mesh.vertices * scale)[:, [0, 2]], axis=0).max()) / 2
        near = vertices[:, 2].max() > -0.12
        outside = np.abs(image).max() > (1.12 if needed else 1.5)
        outside |= np.abs(image.mean(axis=0)).max() > 0.95
        gaps = [np.hypot(x - foot[0], z - foot[2]) - 0.75 * (flat + r) for x, z, r in feet]
        if near or outside or min(gaps, default=0.0) < 0:
            if needed:
                return None
            continue
        feet.append((float(foot[0]), float(foot[2]), flat))
        kept.append(labels[index])
        placed.append(Mesh(vertices, mesh.faces, mesh.colours))
    planes = _planes(rng, feet)
    quad = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    backdrop = [(to_camera(corners), quad) for corners in planes.values()]
    light = rng.normal(size=3) * 0.6 + np.array([0.0, 1.3, 0.7])
    light = np.asarray(light / np.linalg.norm(light) @ np.linalg.inv(turn), np.float32)
    shadows = bool(rng.random() < 0.6)
    hits = meshes.cast([*placed, *backdrop], SIZE, tan_half, light if shadows else None)
    points = directions(SIZE, tan_half) * hits.depth[..., None] @ turn + np.array([0, height, 0])
    albedo = np.empty((SIZE, SIZE, 3), np.uint8)
    albedo[:] = rng.integers(150, 240, 3)
    for index, plane in enumerate(planes, start=len(placed)):
        across = {"floor": (0, 2), "wall": (0, 1)}.get(plane, (2, 1))
        seen = hits.owner == index
        albedo[seen] = _covered(rng, points[seen][:, across] / max(height, 0.3), photographs, split)
    ambient = float(rng.uniform(0.3, 0.6))
    view = (albedo, tan_half, light, ambient)
    return _seen(kept, placed, hits, *view, asked=count, floor=not floats)


def _asked_and_clutter(
    rng: Rng, split: Split, count: int, modelled: bool
) -> list[tuple[Label, Mesh]]:
    more = int(rng.integers(1, 5)) if modelled and rng.random() < 0.5 else 0
    things = _chosen_meshes(rng, split, count, modelled)
    around = _chosen_meshes(rng, split, more, modelled) if more else []
    named = {word for label, _ in things for word in label.name.split()}
    return things + [one for one in around if named.isdisjoint(one[0].name.split())]


def _planes(rng: Rng, feet: Sequence[tuple[float, float, float]]) -> dict[str, NDArray[Any]]:
    """The corners of the floor, and perhaps of a wall and two sides, around the things.

    ``feet`` holds the x, the z and the radius of each thing.
    """
    wall = max(-z + r for _, z, r in feet) * rng.uniform(1.05, 2.0)
    sides = (max(abs(x) + r for x, _, r in feet) * rng.uniform(1.05, 2.5, 2)) * (-1, 1)
    planes = {
        "floor": np.array([[-90, 0, 5], [90, 0, 5], [90, 0, -90], [-90, 0, -90]]),
        "wall": np.array([[-90, 0, -wall], [90, 0, -wall], [90, 60, -wall], [-90, 60, -wall]]),
    }
    for x in sides:
        planes[f"side {x}"] = np.array([[x, 0, 5], [x, 0, -90], [x, 60, -90], [x, 60, 5]])
    chances = {"floor": 1.0, "wall": 0.85}
    return {k: v for k, v in planes.items() if rng.random() < chances.get(k, 0.4)}


def _seen(
    labels: Sequence[Label],
    placed: Sequence[Mesh],
    hits: meshes.Hits,
    albedo: NDArray[np.uint8],
    tan_half: float,
    light: Floats,
    ambient: float,
    *,
    asked: int,
    **facts: bool,
) -> RoomScene | None:
    """The scene that ``hits`` shows, or None if another thing hides much of one that is asked
    about. ``albedo`` has the colours of the backdrop."""
    coloured = []
    for index, (label, mesh) in enumerate(zip(labels, placed, strict=True)):
        seen = hits.owner == index
        if index < asked and _mostly_hidden(index, placed, int(seen.sum()), tan_half):
            return None
        albedo[seen] = mesh.colours[hits.face[seen]]
        share = colours.shares(albedo[seen])
        best = max(share, key=lambda colour: share[colour])
        coloured.append(label._replace(colour=best if share[best] >= 0.8 else None))
    rgb = meshes.shade(albedo, hits.normal, light, ambient, hits.lit)
    nothing = hits.owner < 0
    rgb[nothing] = albedo[nothing]
    depth = np.where(hits.depth > MAX_DEPTH, 0, hits.depth).astype(np.float32)
    return RoomScene(tuple(coloured), rgb, depth, hits.normal, hits.owner, tan_half, asked, **facts)


def _mostly_hidden(index: int, placed: Sequence[Mesh], pixels: int, tan_half: float) -> bool:
    """Whether other things hide much of a thing of which ``pixels`` are visible."""
    if pixels == 0:
        return True
    boxes = []
    for mesh in placed:
        points = mesh.vertices[:, :2] / -mesh.vertices[:, 2:]
        boxes.append((points.min(axis=0), points.max(axis=0), -mesh.vertices[:, 2].max()))
    low, high, _ = boxes[index]
    far = -float(placed[index].vertices[:, 2].min())
    if not any(
        near < far and (low < other_high).all() and (other_low < high).all()
        for number, (other_low, other_high, near) in enumerate(boxes)
        if number != index
    ):
        return False
    alone = 4 * int((meshes.cast([placed[index]], SIZE // 2, tan_half).owner == 0).sum())
    return pixels < MIN_VISIBLE * alone


def _covered(
    rng: Rng, places: NDArray[np.float64], photographs: Photographs | None, split: Split
) -> NDArray[np.uint8]:
    """(N, 3) colours of a floor or a wall at ``places`` (N, 2): a photographed surface, one colour,
    tiles or planks."""
    pattern = rng.choice(["photograph", "plain", "tiles", "planks"], p=[0.6, 0.2, 0.1, 0.1])
    if pattern == "photograph" and photographs is not None:
        tile = np.asarray(photographs.view(rng, split, "surface", (256, 256)))
        u, v = (places * 256 / float(np.exp(rng.uniform(-1.0, 0.7)))).astype(np.int64).T % 256
        return np.asarray(tile[v, u])
    colour, shade = _muted(rng), np.ones(len(places))
    if pattern in ("tiles", "planks"):
        odd = np.floor(places / float(np.exp(rng.uniform(np.log(0.15), 0.0)))).astype(int)
        even = (odd[:, 0] + odd[:, 1] * (pattern == "tiles")) % 2 == 0
        shade = np.where(even, 1.0, rng.uniform(0.75, 0.95))
    return (np.array(colour) * shade[:, None]).astype(np.uint8)


def _muted(rng: Rng) -> NDArray[np.uint8]:
    grey = rng.uniform(70, 235)
    return np.asarray(np.clip(grey + rng.uniform(-28, 28, 3), 20, 250), np.uint8)


def layered_scene(rng: Rng, split: Split, count: int) -> RoomScene | None:
    """Floating outlines before a flat or leaning background; None if one hides another."""
    tan_half = float(np.tan(np.radians(rng.uniform(40, 70)) / 2))
    depths = _depths(rng, count, float(np.exp(rng.uniform(np.log(0.5), np.log(5.0)))))
    far = float(depths.max()) * rng.uniform(1.2, 2.5)
    leans = ((rng.uniform(-0.15, 0.15), 0), (0, rng.uniform(0.05, 0.6)), *[(0, 0)] * 3)
    corners = outline_of("square", rng)
    background = sheet(corners, (0, 0), (1.2, 1.2), far, tan_half, slant=pick(rng, leans))
    same, outlines = rng.random() < 0.3, rng.permutation(OUTLINES)
    curved, slanted = bool(rng.random() < 0.35), rng.random() < 0.2
    equal_size, shared = rng.random() < 0.25, rng.uniform(0.45, 0.9)
    labels, placed = [], []
    palette = map(str, rng.permutation(colours.COLOURS))
    for index, (column, depth) in enumerate(zip(_columns(rng, count), depths, strict=True)):
        outline = str(outlines[0 if same else index])
        label, variant = _variant(rng, split, f"outline/{outline}")
        longer = min(float(shared if equal_size else rng.uniform(0.4, 1.0)) / count, 0.6)
        ratio = float(variant.uniform(0.8, 1.4))
        if outline in ("rectangle", "oval"):
            ratio = float(variant.choice([variant.uniform(0.4, 0.7), variant.uniform(1.4, 2.2)]))
        elif outline in ("square", "circle"):
            ratio = 1.0
        half = (longer / max(1.0, ratio), longer * min(1.0, ratio))
        centre = (float(column), float(rng.uniform(-0.9, 0.9)) * (0.95 - half[1]))
        bulge = float(depth * rng.uniform(0.02, 0.08)) if curved else 0.0
        slant = rng.uniform(-0.1, 0.1, 2) * slanted
        points = outline_of(outline, variant)
        vertices, faces = sheet(points, centre, half, depth, tan_half, bulge, slant)
        colour = colours.sample(rng, next(palette))
        placed.append(Mesh(vertices, faces, np.tile(colour, (len(faces), 1))))
        labels.append(label)
    light = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.7), 1.0])
    light = np.asarray(light / np.linalg.norm(light), np.float32)
    hits = meshes.cast([*placed, background], SIZE, tan_half)
    albedo = np.tile(_muted(rng).astype(np.uint8), (SIZE, SIZE, 1))
    ambient = float(rng.uniform(0.4, 0.9))
    view = (albedo, tan_half, light, ambient)
    return _seen(labels, placed, hits, *view, asked=count, curved=curved)


def outline_of(outline: str, rng: Rng) -> NDArray[np.float64]:
    """Points (N, 2) in [-1, 1]^2 around a shape of ``OUTLINES``, x right and y up."""
    if outline == "triangle":
        return np.array([[-1, -1], [1, -1], [rng.uniform(-0.5, 0.5), 1]])
    if outline in ("square", "rectangle"):
        return np.array([[-1.0, -1.0], [1, -1], [1, 1], [-1, 1]])
    n = int(rng.integers(5, 9)) if outline == "polygon" else 64
    jitter = rng.uniform(0, 0.6 / n, n) if outline == "polygon" else 0
    angles = 2 * np.pi * (np.arange(n) / n + jitter)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def sheet(
    points: NDArray[np.float64],
    centre: tuple[float, float],
    half: tuple[float, float],
    depth: float,
    tan_half: float,
    bulge: float = 0.0,
    slant: Sequence[float] | NDArray[np.float64] = (0.0, 0.0),
) -> tuple[Floats, NDArray[np.int32]]:
    """Vertices (V, 3) and faces (F, 3) of a layer with these outline ``points`` (N, 2).

    ``centre`` and the half sides ``half`` are in units of half the view's side. The centre is
    ``depth`` metres away. The middle of a dome comes nearer by ``bulge`` metres, ``slant`` is the
    relative change of depth per unit of x and y.
    """
    rings = np.linspace(0, 1, 17 if bulge else 2)[:, None, None]
    across = rings * points * half
    away = depth / (1 - across @ np.asarray(slant)) - bulge * (1 - rings[..., 0] ** 2)
    view = (across + centre) * tan_half
    rays = np.concatenate([view, -np.ones_like(view[..., :1])], axis=-1)
    index = np.arange(away.size, dtype=np.int32).reshape(away.shape)
    a, b = index[:-1], index[1:]
    c, d = np.roll(a, -1, axis=1), np.roll(b, -1, axis=1)
    faces = np.stack([np.stack([a, b, d], -1), np.stack([a, d, c], -1)]).reshape(-1, 3)
    return (rays * away[..., None]).reshape(-1, 3).astype(np.float32), faces


def cut_out_scene(rng: Rng, split: Split, things: Catalogue) -> RoomScene | None:
    """Two to four cut-outs before a wall or on a ground plane; None if one hides much of another.
    In half of these views a nearer thing is larger and lower, as perspective makes it."""
    n = int(rng.choice(3, p=(0.6, 0.25, 0.15))) + 2
    near = float(rng.uniform(0.6, 3.0))
    depths = _depths(rng, n, near)
    wall = float(depths.max() * rng.uniform(1.15, 2.0))
    perspective = rng.random() < 0.5
    items = []
    zipped = zip(things.distinct(rng, split, n), depths, _columns(rng, n), strict=True)
    for thing, depth, column in zipped:
        colour, rgba = dress(rng, thing, None, tint_share=0.3)
        size = float(rng.uniform(0.26, {2: 0.5, 3: 0.42}.get(n, 0.34)))
        y = float(rng.uniform(size / 2, 1 - size / 2))
        if perspective:
            size = float(np.clip(0.5 * near / depth * rng.uniform(0.9, 1.1), 0.16, 0.5))
            y = float(0.5 + 0.42 * near / depth - size / 2 + 0.05)
        items.append(Item(thing, colour, rgba, float(column + 1) / 2, y, size, float(depth)))
    horizon = 0.55 if perspective else float(rng.uniform(0.35, 0.6))
    height = 0.42 * near if perspective else near * float(rng.uniform(0.2, 0.5))
    ground = (horizon, height) if rng.random() < 0.6 else None
    backdrop, shape = None, (SIZE, SIZE)
    if things.photographs and rng.random() < 0.75:
        if ground:
            view = room(rng, shape, things.photographs, split, horizon, horizon + height / wall)
            backdrop = np.asarray(view)
        else:
            backdrop = photographic(rng, shape, things.photographs, split, "surface")
    scene = render(rng, items, things=things, shape=shape, split=split, backdrop=backdrop)
    if any(one.visible < MIN_VISIBLE for one in scene.placed):
        return None
    depth_map = depth_of(scene.placed, wall, ground)
    owner = np.full((SIZE, SIZE), -1, np.int32)
    for index, one in enumerate(scene.placed):
        owner[one.mask] = index
    labels = [Label(p.thing.identity, p.name, p.thing.accept, p.colour) for p in scene.placed]
    tan_half = float(np.tan(np.radians(30.0)))
    normal = normals_of(depth_map, tan_half)
    return RoomScene(tuple(labels), scene.pixels, depth_map, normal, owner, tan_half, n)


def depth_of(placed: Sequence[Placed], wall: float, ground: tuple[float, float] | None) -> Floats:
    """The depth map (H, W) in metres of slightly bulging things before a wall.

    ``ground`` adds a ground plane below the horizon, its first number (a fraction of the height).
    At a row d below the horizon (again a fraction) the plane is ``ground[1] / d`` metres away.
    """
    height, width = placed[0].mask.shape
    depth = np.full((height, width), wall, np.float32)
    if ground is not None:
        below = np.arange(height, dtype=np.float32)[:, None] / height - ground[0]
        floor = np.where(below > 0, ground[1] / np.maximum(below, 1e-3), np.inf)
        depth = np.minimum(depth, np.maximum(floor, 0.3)).astype(np.float32)
    for one in sorted(placed, key=lambda p: -p.depth):
        soft = Image.fromarray(one.mask).convert("L").filter(ImageFilter.BoxBlur(6))
        bulge = np.asarray(soft, dtype=np.float32)[one.mask] / 255.0 - 0.5
        depth[one.mask] = one.depth * (1.0 - 0.08 * bulge)
    return depth


def normals_of(depth: Floats, tan_half: float) -> Floats:
    step = 2 * tan_half / len(depth) * depth  # metres a pixel
    down, right = np.gradient(depth)
    # The limits are for outlines: the jump of depth there is no slope of a surface.
    nx, ny = (np.clip(rise / step, -4.0, 4.0) for rise in (right, -down))
    normal = np.stack([nx, ny, np.ones_like(depth)], axis=-1)
    return np.asarray(normal / np.linalg.norm(normal, axis=-1, keepdims=True), np.float32)

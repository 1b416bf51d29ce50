"""Triangle meshes with a plain name and a real size, and rays of a pinhole camera into them.

The 820 models are in the catalogues (``.sh3f``) of the package ``sweethome3d-furniture``. Every
mesh stands on y = 0, is centred in x and z, and faces +z; y is up; units are metres.

Rays are in the camera's frame, as in OpenGL: x right, y up, the camera looks along -z. A ray's
direction is (x, y, -1), so the distance that Embree returns *is* the depth along the optical axis.
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import trimesh
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene
from numpy.typing import NDArray

from mico_training.data.sources.written import Split
from mico_training.data.table import Table
from mico_world.sources import source, split_of
from mico_world.things.catalogue import furniture

Floats = NDArray[np.float32]
_NOTHING = -1  # Embree's index where a ray hits nothing
MAX_FACES = 8_000  # a view is about 200 px wide: finer triangles are smaller than a pixel
TEXTURE_SIDE = 32  # pixels; a texture is reduced to this size and sampled once for each face

SOLIDS = ("ball", "box", "cylinder", "cone", "ring")


class Mesh(NamedTuple):
    """vertices (V, 3) float32 in metres, faces (F, 3) int32, colours (F, 3) uint8 per face."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    colours: NDArray[np.uint8]


@dataclass(frozen=True)
class MeshModel:
    """An entry of a catalogue: ``size`` is (width, height, depth) in metres."""

    id: str
    name: str
    archive: Path
    member: str
    size: tuple[float, ...]
    rotation: tuple[float, ...] | None


class Furniture(Table):
    names: dict[str, tuple[str, ...]]


@cache
def models_of(split: Split) -> dict[str, list[MeshModel]]:
    known = Furniture.read(Path(__file__).with_name("furniture.yaml")).names
    plain_names = {raw: plain for plain, raws in known.items() for raw in raws}
    found: dict[str, list[MeshModel]] = defaultdict(list)
    for archive in sorted(source("sweethome3d-furniture").rglob("*.sh3f")):
        for entry in furniture(archive):
            name = plain_names.get(entry["name"])
            hangs = float(entry.get("elevation", "0")) > 0
            if name is None or hangs or split_of(f"sweethome3d/{entry['id']}") != split:
                continue
            size = tuple(float(entry[side]) / 100 for side in ("width", "height", "depth"))
            rotation = tuple(map(float, entry.get("modelRotation", "").split())) or None
            model = MeshModel(
                entry["id"], name, archive, entry["model"].lstrip("/"), size, rotation
            )
            found[name].append(model)
    return found


@lru_cache(maxsize=512)
def load(model: MeshModel) -> Mesh:
    with zipfile.ZipFile(model.archive) as archive:
        mesh = _simplified(_read_obj(archive, model.member))
    turn = np.array(model.rotation or np.eye(3), np.float32).reshape(3, 3).T
    return mesh._replace(vertices=_fitted(mesh.vertices @ turn, model.size))


def solid(shape: str, colour: NDArray[np.uint8], rng: np.random.Generator) -> Mesh:
    """A solid of ``SOLIDS`` with random proportions, its largest side 1 m, standing on y = 0."""
    slim = float(rng.uniform(0.35, 1.0))
    wide = float(rng.uniform(0.3, 0.7))
    make = trimesh.creation
    makers: dict[str, Any] = {
        "ball": lambda: make.icosphere(subdivisions=4, radius=0.5),
        "box": lambda: make.box(extents=rng.uniform(0.4, 1.0, 3)),
        "cylinder": lambda: make.cylinder(radius=slim / 2, height=1.0, sections=64),
        "cone": lambda: make.cone(radius=slim / 2, height=1.0, sections=64),
        "ring": lambda: make.torus(1.0, 0.3 * wide, major_sections=64, minor_sections=32),
    }
    made = makers[shape]()
    vertices = np.asarray(made.vertices, np.float32)
    faces = np.asarray(made.faces, np.int32)
    if shape != "ring" or rng.random() < 0.3:
        vertices = vertices[:, [1, 2, 0]]  # trimesh builds along z; here y is up
    extent = np.ptp(vertices, axis=0)
    colours = np.broadcast_to(colour, (len(faces), 3)).copy()
    return Mesh(_fitted(vertices, extent / extent.max()), faces, colours)


def _fitted(vertices: Floats, size: Sequence[float] | Floats) -> Floats:
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    unit = (vertices - low) / np.maximum(high - low, 1e-6) - np.array([0.5, 0.0, 0.5])
    return np.ascontiguousarray(unit * np.asarray(size, np.float64), dtype=np.float32)


def _simplified(mesh: Mesh) -> Mesh:
    """Vertices merged on a grid, coarser until at most ``MAX_FACES`` faces are left."""
    for cells in (160, 112, 80, 56, 40):
        if len(mesh.faces) <= MAX_FACES:
            break
        low = mesh.vertices.min(axis=0)
        step = float(np.ptp(mesh.vertices, axis=0).max()) / cells
        grid = np.floor((mesh.vertices - low) / step).astype(np.int64)
        keys = (grid[:, 0] * 4096 + grid[:, 1]) * 4096 + grid[:, 2]
        _, first, index = np.unique(keys, return_index=True, return_inverse=True)
        faces = index[mesh.faces].astype(np.int32)
        order = np.sort(faces, axis=1)
        kept = np.flatnonzero(
            (np.diff(order, axis=1) > 0).all(axis=1)
        )  # no two corners were merged
        rows = kept[np.unique(order[kept], axis=0, return_index=True)[1]]
        mesh = Mesh(mesh.vertices[first], faces[rows], mesh.colours[rows])
    return mesh


def _read_obj(archive: zipfile.ZipFile, member: str) -> Mesh:
    """A Wavefront OBJ file of a zip. Each triangle has the colour of its material's texture in the
    triangle's middle, or the material's diffuse colour."""
    folder = member.rpartition("/")[0] + "/"
    names = [name for name in archive.namelist() if name.startswith(folder)]
    files = {name.removeprefix(folder): io.BytesIO(archive.read(name)) for name in names}
    scene = trimesh.load_scene(
        files[member.removeprefix(folder)],
        file_type="obj",
        resolver=trimesh.resolvers.ZipResolver(files),
        process=False,
    )
    parts: list[Any] = list(scene.geometry.values())
    whole: Any = trimesh.util.concatenate(parts)
    colours = np.concatenate([_colours(part) for part in parts])
    return Mesh(whole.vertices.astype(np.float32), whole.faces.astype(np.int32), colours)


def _colours(mesh: Any) -> NDArray[np.uint8]:
    material = getattr(mesh.visual, "material", mesh.visual)
    corners = getattr(mesh.visual, "uv", None)
    if corners is None or getattr(material, "image", None) is None:
        # The catalogues store linear reflectance; a screen shows about its square root.
        shown = 255 * (material.main_color[:3] / 255) ** 0.6
        return np.tile(shown.astype(np.uint8), (len(mesh.faces), 1))
    texture = np.asarray(material.image.convert("RGB").resize((TEXTURE_SIDE, TEXTURE_SIDE)))
    u, v = np.moveaxis(corners[mesh.faces].mean(axis=1) % 1.0, -1, 0)
    rows = ((1 - v) * 0.999 * TEXTURE_SIDE).astype(int)
    return np.asarray(texture[rows, (u * TEXTURE_SIDE).astype(int)])


@dataclass(frozen=True)
class Hits:
    """What each pixel shows. Where a ray hits nothing, depth and normal are 0, the owner is -1."""

    depth: Floats  # (H, W) metres along the optical axis
    normal: Floats  # (H, W, 3) unit vectors that face the camera
    owner: NDArray[np.int32]  # (H, W) index of the mesh
    face: NDArray[np.int32]  # (H, W) index of its triangle
    lit: NDArray[np.bool_]  # (H, W) False in shadow


def directions(size: int, tan_half: float) -> Floats:
    """(H, W, 3) ray directions (x, y, -1) of a square view. ``tan_half`` is the tangent of half the
    field of view."""
    ticks = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) * np.float32(tan_half)
    x, y = np.meshgrid(ticks, -ticks)
    return np.stack([x, y, -np.ones_like(x)], axis=-1).astype(np.float32)


def cast(
    meshes: Sequence[tuple[Any, ...]], size: int, tan_half: float, light: Floats | None = None
) -> Hits:
    """Cast a ray per pixel into ``meshes``: vertices (V, 3) in the camera's frame, faces (F, 3).
    ``light`` is the unit direction towards the sun; without it there are no shadows."""
    scene = EmbreeScene()
    for vertices, faces, *_ in meshes:
        corners = np.ascontiguousarray(vertices, np.float32)
        TriangleMesh(scene, corners, np.ascontiguousarray(faces, np.int32))
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
    owner = np.where(hit, found["geomID"], _NOTHING).astype(np.int32)
    flat: tuple[Any, ...] = (depth, normal, owner, found["primID"].astype(np.int32), lit)
    return Hits(*(values.reshape(size, size, *values.shape[1:]) for values in flat))


def shade(
    albedo: NDArray[np.uint8], normal: Floats, light: Floats, ambient: float, lit: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """(H, W, 3) colours under a sun in direction ``light`` by Lambert's law, plus ``ambient``."""
    direct = np.clip((normal * light).sum(axis=-1), 0, 1) * lit
    # a weak second lamp at the camera keeps the shape visible inside shadows
    fill = 0.3 * np.clip(normal[..., 2], 0, 1)
    strength = ambient + (1 - ambient) * (0.8 * direct + fill)
    return np.asarray(np.clip(albedo * strength[..., None], 0, 255), np.uint8)


def normal_picture(normal: Floats) -> NDArray[np.uint8]:
    """Unit normals as colours, (n + 1) / 2 * 255: x right is red, y up green, to the camera blue.
    Where there is no surface (a zero vector) the picture is black."""
    picture = np.asarray(np.rint((normal + 1) * 127.5), np.uint8)
    picture[~normal.any(axis=-1)] = 0
    return picture

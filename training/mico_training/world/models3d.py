"""Meshes with a plain name and a real size: 820 furniture models, and solids that need no file.

The models are the catalogues (``.sh3f``, a zip) of the package ``sweethome3d-furniture``:
Wavefront OBJ + MTL with the size in centimetres in ``PluginFurnitureCatalog.properties``. Parsing
one takes up to seconds, so each is simplified once and kept as an ``.npz`` in the cache folder.
Every mesh stands on y = 0, is centred in x and z, and faces +z; y is up; units are metres.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from mico_training.world.model_names import plain_names
from mico_training.world.sample import Split
from mico_training.world.sources import cache_dir, source, split_of

MAX_FACES = 16_000  # a view is about 200 px wide: finer triangles are below a pixel
TEXTURE_SIDE = 32  # textures are averaged down to this and sampled once a face
GREY: tuple[int, int, int] = (160, 160, 160)

SOLIDS = ("ball", "box", "cylinder", "cone", "ring")


@dataclass(frozen=True)
class Mesh:
    """vertices (V, 3) float32 in metres, faces (F, 3) int32, colours (F, 3) uint8 per face."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    colours: NDArray[np.uint8]


@dataclass(frozen=True)
class Model:
    """One entry of a catalogue: ``size`` is (width, height, depth) in metres."""

    id: str
    name: str
    archive: Path
    member: str
    size: tuple[float, float, float]
    rotation: tuple[float, ...] | None

    @property
    def split(self) -> Split:
        return split_of(f"sweethome3d/{self.id}")


@cache
def models() -> tuple[Model, ...]:
    """All named models that stand on the floor, of every catalogue of the package."""
    found: list[Model] = []
    for archive in sorted(source("sweethome3d-furniture").rglob("*.sh3f")):
        entries: dict[str, dict[str, str]] = defaultdict(dict)
        with zipfile.ZipFile(archive) as catalogue:
            text = catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")
        for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\r?$", text, re.MULTILINE):
            entries[number][key] = value
        for entry in entries.values():
            name = plain_names().get(entry["name"])
            if name is None or float(entry.get("elevation", "0")) > 0:
                continue
            width, height, depth = (float(entry[k]) / 100 for k in ("width", "height", "depth"))
            rotation = entry.get("modelRotation")
            found.append(
                Model(
                    id=entry["id"],
                    name=name,
                    archive=archive,
                    member=entry["model"].lstrip("/"),
                    size=(width, height, depth),
                    rotation=tuple(map(float, rotation.split())) if rotation else None,
                )
            )
    return tuple(found)


@cache
def models_of(split: Split) -> tuple[Model, ...]:
    """The models of one split; no model is in both."""
    return tuple(model for model in models() if model.split == split)


@lru_cache(maxsize=192)
def load(model: Model) -> Mesh:
    """The model's mesh at its real size, from the cache folder or, the first time, its archive."""
    path = cache_dir() / "models3d" / f"{hashlib.sha1(model.id.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as stored:
            return Mesh(stored["vertices"], stored["faces"], stored["colours"])
    with zipfile.ZipFile(model.archive) as archive:
        mesh = _simplified(_read_obj(archive, model.member))
    vertices = mesh.vertices
    if model.rotation is not None:
        vertices = vertices @ np.array(model.rotation, np.float32).reshape(3, 3).T
    mesh = Mesh(_fitted(vertices, model.size), mesh.faces, mesh.colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.npz")  # two writers never see half a file
    np.savez_compressed(partial, vertices=mesh.vertices, faces=mesh.faces, colours=mesh.colours)
    partial.replace(path)
    return mesh


def solid(shape: str, colour: NDArray[np.uint8], rng: np.random.Generator) -> Mesh:
    """A solid of ``SOLIDS`` with random proportions, its largest side 1 m, standing on y = 0.

    Raises KeyError for another shape.
    """
    slim = float(rng.uniform(0.35, 1.0))
    wide = float(rng.uniform(0.3, 0.7))
    makers: dict[str, Any] = {
        "ball": lambda: trimesh.creation.icosphere(subdivisions=4, radius=0.5),
        "box": lambda: trimesh.creation.box(extents=rng.uniform(0.4, 1.0, 3)),
        "cylinder": lambda: trimesh.creation.cylinder(radius=slim / 2, height=1.0, sections=64),
        "cone": lambda: trimesh.creation.cone(radius=slim / 2, height=1.0, sections=64),
        "ring": lambda: trimesh.creation.torus(
            1.0, 0.3 * wide, major_sections=64, minor_sections=32
        ),
    }
    made = makers[shape]()
    vertices = np.asarray(made.vertices, np.float32)
    faces = np.asarray(made.faces, np.int32)
    if shape != "ring" or rng.random() < 0.3:
        vertices = vertices[:, [1, 2, 0]]  # trimesh builds along z; here y is up
    extent = np.ptp(vertices, axis=0)
    width, height, depth = (float(side) for side in extent / extent.max())
    colours = np.broadcast_to(colour, (len(faces), 3)).copy()
    return Mesh(_fitted(vertices, (width, height, depth)), faces, colours)


def _fitted(vertices: NDArray[np.float32], size: tuple[float, float, float]) -> NDArray[np.float32]:
    """Vertices scaled to ``size``, centred in x and z, with the lowest at y = 0."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    unit = (vertices - low) / np.maximum(high - low, 1e-6) - np.array([0.5, 0.0, 0.5])
    return np.ascontiguousarray(unit * np.array(size), dtype=np.float32)


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
        a, b, c = faces.T
        kept = (a != b) & (b != c) & (a != c)
        order = np.sort(faces, axis=1)
        _, once = np.unique(order[kept], axis=0, return_index=True)
        rows = np.flatnonzero(kept)[once]
        mesh = Mesh(mesh.vertices[first], faces[rows], mesh.colours[rows])
    return mesh


def _read_obj(archive: zipfile.ZipFile, member: str) -> Mesh:
    """A Wavefront OBJ of a zip: polygons as fans, each face with its material's diffuse colour."""
    folder = member.rpartition("/")[0]
    vertices: list[list[float]] = []
    texels: list[tuple[float, float]] = []
    faces: list[tuple[int, int, int]] = []
    colours: list[NDArray[np.uint8]] = []
    materials: dict[str, NDArray[np.uint8]] = {}
    plain = np.array(GREY, np.uint8).reshape(1, 1, 3)
    texture = plain
    for line in archive.read(member).decode("latin-1").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "v":
            vertices.append([float(word) for word in rest.split()[:3]])
        elif key == "vt":
            u, v = rest.split()[:2]
            texels.append((float(u), float(v)))
        elif key == "f":
            corners = [word.split("/") for word in rest.split()]
            index = [_index(corner[0], len(vertices)) for corner in corners]
            colour = texture[0, 0]
            places = [_index(corner[1], len(texels)) for corner in corners if any(corner[1:2])]
            # some files number texture corners that they do not have
            if texture.size > 3 and places and max(places) < len(texels):
                u, v = np.mean([texels[place] for place in places], axis=0) % 1.0
                colour = texture[int((1 - v) * 0.999 * len(texture)), int(u * len(texture))]
            for second, third in pairwise(index[1:]):
                faces.append((index[0], second, third))
                colours.append(colour)
        elif key == "usemtl":
            texture = materials.get(rest.strip(), plain)
        elif key == "mtllib":
            materials.update(_read_mtl(archive, folder, rest.strip()))
    return Mesh(
        np.array(vertices, np.float32), np.array(faces, np.int32), np.array(colours, np.uint8)
    )


def _index(word: str, count: int) -> int:
    """An OBJ index, one-based or negative from the end, as a zero-based index."""
    number = int(word)
    return number - 1 if number > 0 else count + number


def _read_mtl(archive: zipfile.ZipFile, folder: str, name: str) -> dict[str, NDArray[np.uint8]]:
    """Material name -> its texture, or its diffuse colour as a texture of one pixel."""
    found: dict[str, NDArray[np.uint8]] = {}
    members = set(archive.namelist())
    if f"{folder}/{name}" not in members:
        return found
    current = ""
    for line in archive.read(f"{folder}/{name}").decode("latin-1").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key == "newmtl":
            current = rest.strip()
            found[current] = np.array(GREY, np.uint8).reshape(1, 1, 3)
        elif key == "Kd" and found[current].size == 3:
            diffuse = np.array([float(word) for word in rest.split()[:3]])
            # catalogues store linear reflectance: a screen shows its square root, about
            found[current] = (255 * diffuse.clip(0, 1) ** 0.6).astype(np.uint8).reshape(1, 1, 3)
        elif key == "map_Kd" and f"{folder}/{rest.strip()}" in members:
            with Image.open(io.BytesIO(archive.read(f"{folder}/{rest.strip()}"))) as picture:
                small = picture.convert("RGB").resize((TEXTURE_SIDE, TEXTURE_SIDE))
            found[current] = np.asarray(small)
    return found

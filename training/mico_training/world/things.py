"""Things: named cut-outs with transparency, the stuff that scenes are composed of.

``catalogue()`` gathers them from the packages (``catalogues.py``) and the procedural shapes;
decoded cut-outs are kept small, in one cache file and in memory.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_training.world import catalogues, colours, shapes
from mico_training.world.sample import Split
from mico_training.world.sources import cache_dir, split_of

Pixels = NDArray[np.uint8]
CUT_OUT_SIDE = 192  # longest side of a stored cut-out, pixels
_CACHE_VERSION = 1
_MAX_PIXELS = 40_000_000  # larger drawings take seconds to decode; there are enough others


@dataclass(frozen=True)
class Thing:
    """A named cut-out. ``names`` are further right names; ``colour`` its own, if one dominates.

    ``identity`` decides the split; variants of one original share it. ``load()`` gives RGBA
    (h, w, 4) with no empty margin; a shape is neutral grey, made to be tinted.
    """

    identity: str
    name: str
    names: tuple[str, ...]
    category: str
    colour: str | None
    photo: bool
    load: Callable[[], Pixels]

    @property
    def accept(self) -> tuple[str, ...]:
        """Every right name."""
        return (self.name, *self.names)


class Catalogue:
    """Things by split and name. Sampling is even over names, so no clip-art series dominates."""

    def __init__(self, things: Iterable[Thing], shape_share: float = 0.15) -> None:
        self.things = tuple(things)
        self.shape_share = shape_share
        self._by_name: dict[Split, dict[str, list[Thing]]] = {
            "train": defaultdict(list),
            "validation": defaultdict(list),
        }
        for thing in self.things:
            self._by_name[split_of(thing.identity)][thing.name].append(thing)
        self._pools = {
            split: {
                "shape": [n for n, ts in by_name.items() if ts[0].category == "shape"],
                "other": [n for n, ts in by_name.items() if ts[0].category != "shape"],
            }
            for split, by_name in self._by_name.items()
        }

    def names(self, split: Split) -> tuple[str, ...]:
        """The distinct names of ``split``."""
        return tuple(self._by_name[split])

    def of_name(self, split: Split, name: str) -> list[Thing]:
        """The things called ``name`` in ``split``."""
        return self._by_name[split][name]

    def sample(self, rng: np.random.Generator, split: Split) -> Thing:
        """One thing: its kind by ``shape_share``, then evenly by name, then evenly."""
        pools = self._pools[split]
        wanted = "shape" if rng.random() < self.shape_share else "other"
        pool = pools[wanted] or pools["shape"] or pools["other"]
        things = self._by_name[split][pool[int(rng.integers(len(pool)))]]
        return things[int(rng.integers(len(things)))]

    def distinct(
        self, rng: np.random.Generator, split: Split, n: int, unlike: Iterable[Thing] = ()
    ) -> list[Thing]:
        """``n`` things none of which a person could call by another's name."""
        taken = list(unlike)
        found: list[Thing] = []
        for _ in range(50 * n):
            if len(found) == n:
                break
            thing = self.sample(rng, split)
            if all(not confusable(thing, other) for other in taken):
                taken.append(thing)
                found.append(thing)
        if len(found) == n:
            return found
        raise ValueError(f"split {split!r} has fewer than {n} things of distinct names")


def confusable(a: Thing, b: Thing) -> bool:
    """Whether a right name for one might be said of the other ("ball", "soccer ball")."""
    alike = catalogues.words().alike
    words_a, words_b = ({n.split()[-1] for n in t.accept} | {*t.accept} for t in (a, b))
    return bool(words_a & words_b) or any(
        x in alike.get(y, ()) or y in alike.get(x, ()) for x in words_a for y in words_b
    )


def shape_things() -> list[Thing]:
    """The procedural shapes in every style."""
    things = []
    for name, names in shapes.NAMES.items():
        solid = name in ("ball", "cube", "cylinder", "cone")
        for style in ("plain",) if solid else shapes.STYLES:
            for seed in range(3):
                identity = f"shape/{name}/{style}/{seed}"
                load = partial(_shape, name, style, seed)
                things.append(Thing(identity, name, names, "shape", None, False, load))
    return things


@lru_cache(maxsize=512)
def _shape(name: str, style: str, seed: int) -> Pixels:
    return shapes.draw(name, style, seed)


@lru_cache(maxsize=1)
def catalogue() -> Catalogue:
    """All things: shapes and the packages' cut-outs. The first call fetches and decodes them."""
    folder = cache_dir() / "world"
    stem = f"things-{_CACHE_VERSION}-{catalogues.words_digest()}"
    index, blob = folder / f"{stem}.json", folder / f"{stem}.bin"
    if not index.exists():
        _write_cache(index, blob)
    things = shape_things()
    for row in json.loads(index.read_text()):
        offset, size = row.pop("offset"), row.pop("size")
        load = partial(_decode, str(blob), offset, size)
        things.append(Thing(**{**row, "names": tuple(row["names"]), "load": load}))
    return Catalogue(things)


@lru_cache(maxsize=768)
def _decode(blob: str, offset: int, size: int) -> Pixels:
    with open(blob, "rb") as file:
        file.seek(offset)
        return np.asarray(Image.open(io.BytesIO(file.read(size))).convert("RGBA"))


def _write_cache(index: Path, blob: Path) -> None:
    """Decode every cut-out once, shrink it, name its colour, and store all in one file."""
    index.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.NamedTemporaryFile(dir=index.parent, delete=False) as out:
        for entry in catalogues.entries():
            rgba = trim(entry.open())
            if rgba is None:
                continue
            packed = io.BytesIO()
            Image.fromarray(rgba).save(packed, "PNG", compress_level=6)
            row = {k: v for k, v in asdict(entry).items() if k not in ("path", "member")}
            row |= {"colour": colours.dominant(rgba), "offset": out.tell(), "size": packed.tell()}
            out.write(packed.getvalue())
            rows.append(row)
    os.replace(out.name, blob)
    partial_index = index.with_suffix(".partial")
    partial_index.write_text(json.dumps(rows, ensure_ascii=False))
    os.replace(partial_index, index)


def trim(image: Image.Image) -> Pixels | None:
    """The picture without its empty margin, at most CUT_OUT_SIDE; None if it is no cut-out.

    Not a cut-out: (nearly) nothing visible, or a rectangle that fills its frame, or a poster.
    """
    if image.width * image.height > _MAX_PIXELS:
        return None
    rgba = image.convert("RGBA")
    if max(rgba.size) > 3 * CUT_OUT_SIDE:
        rgba = rgba.reduce(max(1, max(rgba.size) // (2 * CUT_OUT_SIDE)))
    alpha = np.asarray(rgba)[..., 3]
    rows, columns = np.flatnonzero((alpha > 24).any(1)), np.flatnonzero((alpha > 24).any(0))
    if len(rows) < 24 or len(columns) < 24:
        return None
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    inside = alpha[box[1] : box[3], box[0] : box[2]] > 128
    if inside.mean() > 0.985 or inside.mean() < 0.06:
        return None
    rgba = rgba.crop(box)
    rgba.thumbnail((CUT_OUT_SIDE, CUT_OUT_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(rgba)

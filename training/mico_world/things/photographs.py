"""Photographs of places and surfaces, before which things are shown; they come from packages.

``backgrounds.yaml`` lists them. They are stored small and as JPEG in the cache, as the things are.
"""

import fnmatch
import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.settings import cache_dir
from mico_training.data.language.english import Rng, pick
from mico_training.data.sources.written import Split
from mico_training.data.table import Table
from mico_world.sources import in_one_step, source, split_of

Pixels = NDArray[np.uint8]
Kind = Literal["scene", "surface"]
SIDE = 640  # longest side of a stored photograph, pixels
VIEWS = 6
_BRIGHTEST = 1e4  # light beyond it, as of the sun, is cut off
_LEAST_SIDE = 240  # a smaller picture is left out
_TABLE = Path(__file__).with_name("backgrounds.yaml")


class Group(Table):
    source: str
    kind: Kind
    files: tuple[str, ...]
    archive: str = ""
    skip: tuple[str, ...] = ()
    crops: int = 0


class Groups(Table):
    shows: frozenset[str] = frozenset()
    groups: tuple[Group, ...]


groups = Groups.reader(_TABLE)


@dataclass(frozen=True)
class Photograph:
    """A stored photograph. The crops of one share its ``identity``, which decides the split."""

    identity: str
    kind: Kind
    blob: str
    offset: int
    size: int

    def image(self) -> Image.Image:
        return _decode(self.blob, self.offset, self.size)


class Photographs:
    def __init__(self, photographs: Iterable[Photograph]) -> None:
        self._found: dict[tuple[Split, Kind], list[Photograph]] = {}
        for one in photographs:
            self._found.setdefault((split_of(one.identity), one.kind), []).append(one)

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))

    def view(self, rng: Rng, split: Split, kind: Kind, shape: tuple[int, int]) -> Image.Image:
        """A random crop of a photograph, as often mirrored as not, ``shape`` (height, width)."""
        image = pick(rng, self._found[split, kind]).image()
        height, width = shape
        most = min(image.width / width, image.height / height)
        scale = most * float(rng.uniform(0.5, 1.0))
        w, h = scale * width, scale * height
        left, top = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
        box = (left, top, left + w, top + h)
        image = image.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=1.5)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


@lru_cache(maxsize=256)
def _decode(blob: str, offset: int, size: int) -> Image.Image:
    with open(blob, "rb") as file:
        file.seek(offset)
        return Image.open(io.BytesIO(file.read(size))).convert("RGB")


@cache
def photographs() -> Photographs:
    """All photographs of the packages. The first call fetches and decodes the packages."""
    digest = hashlib.sha1(_TABLE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:8]
    folder = cache_dir() / "world"
    index, blob = (folder / f"photographs-{digest}.{end}" for end in ("json", "bin"))
    if not index.exists():
        _write_cache(index, blob)
    return Photographs(Photograph(**row, blob=str(blob)) for row in json.loads(index.read_text()))


def _write_cache(index: Path, blob: Path) -> None:
    rows = []
    with in_one_step(blob) as scratch, scratch.open("wb") as out:
        for group in groups().groups:
            for name, image in _images(group):
                for cut in _crops(image, name, group.crops):
                    packed = io.BytesIO()
                    cut.save(packed, "JPEG", quality=90)
                    row = {"identity": name, "kind": group.kind}
                    rows.append(row | {"offset": out.tell(), "size": packed.tell()})
                    out.write(packed.getvalue())
    with in_one_step(index) as scratch:
        scratch.write_text(json.dumps(rows))


def _images(group: Group) -> Iterator[tuple[str, Image.Image]]:
    """The names and pictures of a group; small and transparent pictures are left out."""
    root = source(group.source)

    def wanted(name: str) -> bool:
        return not any(part in Path(name).name for part in group.skip)

    def opened() -> Iterator[tuple[str, Image.Image]]:
        if not group.archive:
            paths = {path for pattern in group.files for path in root.glob(pattern)}
            for path in sorted(path for path in paths if wanted(path.name)):
                name = path.relative_to(root).as_posix()
                if path.suffix == ".exr":
                    with path.open("rb") as panorama:
                        yield from ((name, view) for view in views(panorama))
                else:
                    yield name, Image.open(path)
            return
        with zipfile.ZipFile(root / group.archive) as archive:
            for name in sorted(archive.namelist()):
                hit = any(fnmatch.fnmatch(name, pattern) for pattern in group.files)
                if hit and wanted(name) and name.endswith((".jpg", ".png")):
                    yield name, Image.open(io.BytesIO(archive.read(name)))

    for name, image in opened():
        clear = image.has_transparency_data
        if min(image.size) >= _LEAST_SIDE and max(image.size) <= 3 * min(image.size) and not clear:
            yield f"{group.source}/{name}", image.convert("RGB")


def views(panorama: BinaryIO) -> Iterator[Image.Image]:
    """``VIEWS`` views in as many directions out of a panorama of all directions (OpenEXR)."""
    with av.open(panorama, "r") as container:
        frame = next(container.decode(video=0)).reformat(format="gbrpf32le")
        light = np.nan_to_num(frame.to_ndarray()).clip(0, _BRIGHTEST)
    height, width = light.shape[:2]
    levels = (255 * (light / (light + 1.2 * np.median(light))) ** (1 / 2.2)).astype(np.uint8)
    x, y = np.meshgrid(np.linspace(-0.9, 0.9, 256), np.linspace(-0.68, 0.68, 192))
    rows = ((np.arctan2(y, np.hypot(1, x)) / np.pi + 0.5) * height).astype(int)
    for yaw in range(VIEWS):
        columns = ((np.arctan(x) + yaw) / (2 * np.pi) * width).astype(int) % width
        yield Image.fromarray(levels[rows, columns]).resize((512, 384), Image.Resampling.BICUBIC)


def _crops(image: Image.Image, name: str, count: int) -> Iterator[Image.Image]:
    """The whole picture and ``count`` crops of a third to two thirds of it; each fits ``SIDE``."""
    rng = np.random.default_rng(list(name.encode()))
    boxes = [(0.0, 0.0, 1.0)]
    for _ in range(count):
        share = float(rng.uniform(0.33, 0.66))
        left, top = (float(v) for v in rng.uniform(0, 1 - share, 2))
        boxes.append((left, top, share))
    for x, y, share in boxes:
        corner = round(x * image.width), round(y * image.height)
        w, h = round(share * image.width), round(share * image.height)
        cut = image.crop((*corner, corner[0] + w, corner[1] + h))
        cut.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        yield cut

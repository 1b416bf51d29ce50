"""Evaluation items of real media: photographs, recordings, videos, and what is made of them.

``real.yaml`` lists the media. They are in packages that no training shard draws on. Composites show
two photographs side by side, a cut-out photograph moves across another one, and pairs of
photographs from two lenses give depth maps. The only simulated media are rooms with furniture.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.ndimage import binary_fill_holes, median_filter, uniform_filter

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.answers import NUMBERS
from mico_chat.media.kinds import Kind
from mico_training.data.language.english import plural
from mico_training.data.table import Table
from mico_world.motion.motion import encode_video
from mico_world.pictures.compose import depth_png, encoded
from mico_world.rooms import meshes
from mico_world.sounds.synth import decode, flac
from mico_world.sources import source
from mico_world.things.colours import COLOURS

TABLE = Path(__file__).with_name("real.yaml")
PICTURES = (".webp", ".png", ".jpg", ".jpeg")
SOUNDS = (".ogg", ".wav", ".mp3")
VIDEOS = (".mp4",)
SECONDS = 10.0  # of a recording
VIDEO_SIDE, VIDEO_FPS = 320, 8
COMPOSITES = 50
ROOMS, COUNTED = 14, 50
STEREO_WIDTH = 320
STEREO = 0.075 * 451 / 2  # metres x pixels: the distance of the lenses x the focal length
WAYS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIDES = ("left", "right")

Words = dict[str, dict[str, tuple[str, ...]]]
Floats = NDArray[np.float32]
Read = Callable[[], bytes]


class Stereo(Table):
    """``side`` of the view between two shares of its width is nearer."""

    between: tuple[float, float]
    side: Literal["left", "right"]


class Real(Table):
    """``things`` are photographs of one thing alone: its name, and its colour if that is clear."""

    questions: dict[str, tuple[str, ...]]
    photographs: Words
    sounds: Words
    clips: Words
    things: dict[str, tuple[str, str | None]]
    cut_outs: dict[str, str]
    backgrounds: tuple[str, ...]
    stereo: dict[str, dict[str, Stereo]]
    models: dict[str, dict[str, tuple[float, float, float]]]


class Item(NamedTuple):
    """A medium with a question: ``data`` are the bytes of the file ``name``."""

    id: str
    skill: str
    kind: Kind
    name: str
    data: bytes
    accept: tuple[str, ...]
    choices: tuple[str, ...] = ()
    reject: tuple[str, ...] = ()
    asked: str = ""  # what the question names


def real_items(table: Real | None = None) -> list[tuple[Item, str]]:
    """Each item with its question, which is the next one of the skill's questions. The order is
    random: the first items of a skill are of all packages."""
    table = table or Real.read(TABLE)
    texts = {skill: cycle(questions) for skill, questions in table.questions.items()}
    asked = []
    for item in _items(table):
        be = "are" if item.asked.endswith("s") else "is"
        asked.append((item, next(texts[item.skill]).format(item.asked, be)))
    return Random(3).sample(asked, len(asked))


def _items(table: Real) -> Iterator[Item]:
    shown: dict[str, Image.Image] = {}
    words: dict[str, tuple[str, ...]] = {}
    wanted = {*table.things, *table.cut_outs, *table.backgrounds}
    for id, name, data, accept in listed(table.photographs, PICTURES):
        yield Item(id, "real photographs", "image", name, data, accept)
        if id in wanted:
            shown[id], words[id] = _picture(data), accept
    if missing := wanted - set(shown):
        raise DataError(Path("real.yaml"), None, f"{min(missing)} is not among the photographs")
    for id, name, data, accept in listed(table.sounds, SOUNDS):
        yield Item(f"sound-{id}", "real sounds", *medium(name, data), accept)
    for id, name, data, accept in listed(table.clips, VIDEOS):
        yield Item(id, "real clips", *medium(name, data), accept)
    yield from _composites(table, shown, words)
    yield from _moving(table, shown)
    yield from _counted(table, shown)
    yield from _nearer(table)


# --- listed media -------------------------------------------------------------------------------


def listed(
    table: Words, suffixes: Sequence[str]
) -> Iterator[tuple[str, str, bytes, tuple[str, ...]]]:
    """The id, file name, bytes and accepted words of each listed medium."""
    for place, listed in table.items():
        there = media_at(place, suffixes)
        for stem, accept in listed.items():
            file = stem.partition("@")[0]  # a clip's part of a video follows the @
            if file not in there:
                raise DataError(Path(place), None, f"no {' or '.join(suffixes)} named {file} in it")
            suffix, read = there[file]
            id = id_of(place, stem)
            yield id, id + suffix, read(), accept


def medium(file: str, data: bytes) -> tuple[Kind, str, bytes]:
    """The kind, file name and bytes of what an item shows of a file: a picture as it is, of a
    recording ``SECONDS`` at most, of a video the seconds that its name has after an @."""
    name, suffix = Path(file).stem, Path(file).suffix
    if suffix in PICTURES:
        return "image", file, data
    if "@" not in name:
        return "audio", f"{name}.flac", flac(decode(data, SECONDS))
    start, end = map(float, name.rpartition("@")[2].split("-"))
    return "video", f"{name}.mp4", encode_video(frames_between(data, start, end), VIDEO_FPS)


def id_of(place: str, stem: str) -> str:
    return re.sub(r"[^\w@.-]+", "_", f"{Path(place).stem}-{stem}")


def media_at(place: str, suffixes: Sequence[str]) -> dict[str, tuple[str, Read]]:
    """File name without its ending -> the ending and a function that reads the file. ``place`` is a
    package and a folder, a ``.zip`` or ``.rcc`` archive, or an archive and a folder in it."""
    package, *parts = Path(place).parts
    path, inner = source(package), ""
    for number, part in enumerate(parts, 1):
        path /= part
        if path.is_file():
            inner = "".join(f"{name}/" for name in parts[number:])
            break
    if path.suffix == ".rcc":
        return _by_stem(((name, partial(bytes, data)) for name, data in read_rcc(path)), suffixes)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.rpartition("/")[0] + "/" == (inner or "/")]
        return _by_stem(
            ((Path(name).name, partial(_unzipped, path, name)) for name in names), suffixes
        )
    if not path.is_dir():
        raise DataError(path, None, "the package has no such folder or archive")
    return _by_stem(((file.name, file.read_bytes) for file in sorted(path.iterdir())), suffixes)


def _unzipped(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(name)


def _by_stem(
    files: Iterator[tuple[str, Read]], suffixes: Sequence[str]
) -> dict[str, tuple[str, Read]]:
    found: dict[str, tuple[str, Read]] = {}
    for name, read in files:
        suffix = Path(name).suffix
        if suffix in suffixes:
            found.setdefault(name.removesuffix(suffix), (suffix, read))
    return found


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the pictures and sounds of a Qt resource file. Its header has
    big-endian offsets: of a tree of 22-byte nodes, of the contents and of the names."""
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise DataError(path, None, "not a Qt resource file")
    tree, data, names = struct.unpack(">3I", blob[8:20])

    def name_at(offset: int) -> str:
        at = names + offset
        (length,) = struct.unpack(">H", blob[at : at + 2])
        return blob[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

    def walk(node: int) -> Iterator[tuple[str, bytes]]:
        at = tree + 22 * node
        name, flags = struct.unpack(">IH", blob[at : at + 6])
        if flags & 2:
            count, first = struct.unpack(">II", blob[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from walk(child)
            return
        if not name_at(name).endswith(PICTURES + SOUNDS):
            return
        (offset,) = struct.unpack(">I", blob[at + 10 : at + 14])
        (size,) = struct.unpack(">I", blob[data + offset : data + offset + 4])
        content = blob[data + offset + 4 : data + offset + 4 + size]
        if flags & 4:
            raise DataError(path, None, f"{name_at(name)} is zstd-compressed")
        yield name_at(name), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0)


def _picture(data: bytes, side: int = 640) -> Image.Image:
    """A picture as RGB on white, its longer side at most ``side`` pixels."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image.thumbnail((side, side))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def frames_between(data: bytes, start: float, end: float) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) of a video between two seconds, ``VIDEO_FPS`` of them a second."""
    found: list[NDArray[np.uint8]] = []
    with av.open(io.BytesIO(data), "r") as container:
        for frame in container.decode(video=0):
            if frame.time is None or frame.time < start + len(found) / VIDEO_FPS:
                continue
            if frame.time >= end:
                break
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            image.thumbnail((VIDEO_SIDE, VIDEO_SIDE))
            width, height = (length - length % 2 for length in image.size)
            found.append(np.asarray(image.crop((0, 0, width, height))))
    return np.stack(found)


# --- two photographs side by side ---------------------------------------------------------------


def pairs(table: Real, words: Mapping[str, Sequence[str]], rng: Random) -> list[tuple[str, str]]:
    """Pairs of things that share no word and no colour; each thing is in about as many pairs."""

    def differ(left: str, right: str) -> bool:
        colours = {table.things[id][1] for id in (left, right)} - {None}
        said = [{word for text in words[id] for word in text.split()} for id in (left, right)]
        both = None not in (table.things[left][1], table.things[right][1])
        return said[0].isdisjoint(said[1]) and not (both and len(colours) == 1)

    found: list[tuple[str, str]] = []
    deck: list[str] = []
    while len(found) < COMPOSITES:
        if len(deck) < 2:
            deck = rng.sample(sorted(table.things), len(table.things))
        left = deck.pop()
        right = next((other for other in reversed(deck) if differ(left, other)), None)
        if right is not None:
            deck.remove(right)
            found.append((left, right))
    return found


def beside(left: Image.Image, right: Image.Image, wide: bool, gap: int) -> Image.Image:
    """Two pictures side by side: cut to two squares (wide), or whole in the halves of a square."""
    side = 336 if wide else (448 - gap) // 2
    canvas = Image.new("RGB", (2 * side + gap, side if wide else 448), "white")
    for number, image in enumerate((left, right)):
        part = ImageOps.fit(image, (side, side)) if wide else ImageOps.contain(image, (side, 448))
        at = (number * (side + gap), (canvas.height - part.height) // 2)
        canvas.paste(part, at)
    return canvas


def _composites(
    table: Real, shown: Mapping[str, Image.Image], words: Mapping[str, tuple[str, ...]]
) -> Iterator[Item]:
    for number, pair in enumerate(pairs(table, words, Random(0))):
        left, right = (shown[id] for id in pair)
        image = beside(left, right, wide=number % 2 == 0, gap=24 * (number // 2 % 2))
        name, data = f"pair-{number:02}.jpg", encoded(np.asarray(image), "JPEG", quality=92)
        for id, other, side in zip(pair, reversed(pair), SIDES, strict=True):
            item = Item(
                f"pair-{number:02}-{side}", "real left-right", "image", name, data, words[id]
            )
            yield item._replace(asked=side, reject=words[other])
            thing, colour = table.things[id]
            if colour is not None:
                item = item._replace(id=f"{item.id}-colour", skill="real colour", asked=thing)
                yield item._replace(accept=(colour,), choices=COLOURS)


# --- cut-outs that move -------------------------------------------------------------------------


def cut_out(image: Image.Image) -> Image.Image:
    """A photograph on a white ground without its ground, as RGBA cut to what is left."""
    solid = binary_fill_holes(np.asarray(image).min(axis=-1) < 240)
    found = Image.fromarray((255 * solid).astype(np.uint8))
    image = image.copy()
    image.putalpha(found)
    return image.crop(found.getbbox())


def _moving(table: Real, shown: Mapping[str, Image.Image]) -> Iterator[Item]:
    rng = Random(1)
    for number, ((id, name), way) in enumerate(zip(table.cut_outs.items(), cycle(WAYS))):
        ground = ImageOps.fit(shown[table.backgrounds[number % len(table.backgrounds)]], (320, 240))
        thing = cut_out(shown[id])
        thing.thumbnail((rng.randint(80, 130),) * 2)
        count, fps = rng.randint(10, 20), rng.choice((4, 8, 15))
        room = (320 - thing.width, 240 - thing.height)
        frames = []
        for share in np.linspace(-0.5, 0.5, count) * rng.uniform(0.6, 0.95):
            canvas = ground.copy()
            at = [
                round(length * (0.5 + step * share))
                for length, step in zip(room, WAYS[way], strict=True)
            ]
            canvas.paste(thing, (at[0], at[1]), thing)
            frames.append(np.asarray(canvas))
        data = encode_video(np.stack(frames), fps)
        item = Item(
            f"moves-{number:02}", "real direction", "video", f"moves-{number:02}.mp4", data, (way,)
        )
        yield item._replace(choices=tuple(WAYS), asked=name)


def _counted(table: Real, shown: Mapping[str, Image.Image]) -> Iterator[Item]:
    """One to five copies of a cut-out that shows one thing, before a photograph."""
    rng = Random(5)
    single = [(id, name) for id, name in table.cut_outs.items() if not name.endswith("s")]
    cells = list(product(range(3), range(2)))
    for number, (id, name) in enumerate(islice(cycle(single), COUNTED)):
        many = number % 5 + 1
        ground = ImageOps.fit(shown[table.backgrounds[number % len(table.backgrounds)]], (480, 320))
        for column, row in rng.sample(cells, many):
            thing = cut_out(shown[id])
            if rng.random() < 0.5:
                thing = ImageOps.mirror(thing)
            thing.thumbnail((rng.randint(90, 140),) * 2)
            slack = 160 - thing.width, 160 - thing.height
            at = [160 * n + rng.randint(0, s) for n, s in zip((column, row), slack, strict=True)]
            ground.paste(thing, (at[0], at[1]), thing)
        data = encoded(np.asarray(ground), "JPEG", quality=92)
        name = plural(name)
        item = Item(f"count-{number:02}", "real count", "image", f"count-{number:02}.jpg", data, ())
        yield item._replace(accept=(NUMBERS[many],), choices=tuple(NUMBERS[1:6]), asked=name)


# --- depth maps ---------------------------------------------------------------------------------


def disparity(left: Floats, right: Floats, most: int) -> Floats:
    """By how many pixels (H, W), below ``most``, a point is farther right in a left grey view than
    in the right one; 0 where the two views do not agree. It is semi-global matching (Hirschmueller
    2008) along rows and columns: neighbours of another disparity cost more."""
    signs = []
    for view in (left, right):
        shifts = [(y, x) for y in range(-2, 3) for x in range(-3, 4) if (y, x) != (0, 0)]
        signs.append(np.stack([np.roll(view, shift, (0, 1)) < view for shift in shifts], -1))
    costs = np.full((most, *left.shape), len(shifts), np.float32)
    for shift in range(most):
        unlike = signs[0][:, shift:] != signs[1][:, : left.shape[1] - shift]
        costs[shift, :, shift:] = uniform_filter(unlike.sum(-1).astype(np.float32), 3)
    total = np.zeros_like(costs)
    for axis, step in product((1, 2), (1, -1)):
        there, sums = (np.moveaxis(array, axis, 0)[::step] for array in (costs, total))
        path = np.zeros_like(there[0])
        for cost, into in zip(there, sums, strict=True):
            least = path.min(0)
            near = np.full_like(path, np.inf)
            near[1:] = path[:-1]
            near[:-1] = np.minimum(near[:-1], path[1:])
            path = cost + np.minimum(np.minimum(path, near + 6), least + 40) - least
            into += path
    found = total.argmin(axis=0)
    back = np.stack([np.roll(cost, -shift, axis=1) for shift, cost in enumerate(total)]).argmin(0)
    rows, columns = np.indices(found.shape)
    agree = np.abs(back[rows, np.maximum(columns - found, 0)] - found) <= 1
    return np.where(agree, median_filter(found, 5), 0).astype(np.float32)


def _nearer(table: Real) -> Iterator[Item]:
    maps: list[tuple[str, Floats, str]] = []
    for place, listed in table.stereo.items():
        there = media_at(place, PICTURES)
        for name, view in listed.items():
            eyes = [there[f"{name.partition('@')[0]}_{eye}"][1]() for eye in SIDES]
            views = (_picture(eye, STEREO_WIDTH).convert("L") for eye in eyes)
            left, right = (np.asarray(view, np.float32) for view in views)
            shift = disparity(left, right, most=56)
            depth = np.where(shift > 0, STEREO / np.maximum(shift, 1), 0).astype(np.float32)
            start, end = (round(share * depth.shape[1]) for share in view.between)
            maps.append((name, depth[:, start:end], view.side))
    maps += [(f"room-{n:02}", *room) for n, room in enumerate(islice(rooms(table), ROOMS))]
    for number, (name, depth, side) in enumerate(maps):
        if side != SIDES[number % 2]:
            depth, side = depth[:, ::-1], SIDES[number % 2]
        item = Item(f"nearer-{name}", "real nearer", "depth", f"nearer-{name}.png", b"", (side,))
        yield item._replace(data=depth_png(depth), choices=SIDES)


def rooms(table: Real) -> Iterator[tuple[Floats, str]]:
    """Depth maps of rooms with two pieces of furniture, and the side of the nearer one."""
    rng = Random(2)
    models = []
    for place, listed in table.models.items():
        archive, folder = source(Path(place).parts[0]), ""
        for part in Path(place).parts[1:]:
            archive, folder = (
                (archive / part, "") if archive.is_dir() else (archive, f"{folder}{part}/")
            )
        models += [
            meshes.MeshModel(n, n, archive, f"{folder}{n}.obj", size, None)
            for n, size in listed.items()
        ]
    while True:
        near, side = rng.uniform(1.4, 2.2), rng.choice(SIDES)
        eye, tan_half = rng.uniform(0.9, 1.6), rng.uniform(0.55, 0.8)
        placed: list[tuple[Any, ...]] = []
        for model, column in zip(rng.sample(models, 2), (-1, 1), strict=True):
            away = near if SIDES[column > 0] == side else near * rng.uniform(1.6, 2.4)
            turn = rng.uniform(-0.6, 0.6)
            cos, sin = np.cos(turn), np.sin(turn)
            spin = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
            across = column * away * tan_half * rng.uniform(0.45, 0.55)
            foot = np.array([across, -eye, -away - model.size[2] / 2])
            mesh = meshes.load(model)
            placed.append(((mesh.vertices @ spin + foot).astype(np.float32), mesh.faces))
        wide, deep = rng.uniform(2, 4), near * rng.uniform(3.0, 4.0)
        walls = trimesh.creation.box(bounds=[[-wide, -eye, -deep], [wide, 2.6 - eye, 1]])
        placed.append((walls.vertices, walls.faces))
        yield meshes.cast(placed, 256, tan_half).depth, side

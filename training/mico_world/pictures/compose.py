"""Scenes composed of named cut-outs, with the exact place and colour of each cut-out.

Positions and sizes are fractions of the picture: x to the right, y down.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mico_training.data.language.english import Rng
from mico_training.data.sources.written import Split
from mico_world.things import colours
from mico_world.things.catalogue import Catalogue, Thing
from mico_world.things.photographs import Photographs

Pixels = NDArray[np.uint8]
Shape = tuple[int, int]  # height and width in pixels
SIDE = 448  # longest side of a picture, pixels
VISIBLE = 0.6  # least share of a thing that nothing hides
_CONTRAST = 42.0  # least difference, of 255, between a thing and its background
_CONTRAST_IN_PHOTOGRAPHS = 26.0
_PHOTOGRAPHS = 0.75  # share of backgrounds that are photographs
_PHOTOGRAPHIC = ("scene", "surface", "room")
_PHOTOGRAPHIC_SHARES = (0.5, 0.15, 0.35)
_BACKGROUNDS = ("white", "plain", "gradient", "noise", "stripes", "checks", "horizon", "collage")
_SHARES = np.array([0.27, 0.18, 0.13, 0.12, 0.05, 0.04, 0.11, 0.10])


@dataclass(frozen=True)
class Item:
    """A thing to paint, and its cut-out (h, w, 4). ``size``, the longest side, is a fraction of the
    picture's short side; ``depth`` is in metres, and a farther item is painted first."""

    thing: Thing
    colour: str | None
    rgba: Pixels
    x: float
    y: float
    size: float
    depth: float = 0.0


@dataclass(frozen=True, eq=False)
class Placed:
    """A painted thing: ``mask`` (H, W) of its visible pixels, the box around them (centre and
    extent as fractions), and the share ``visible`` of its pixels."""

    thing: Thing
    colour: str | None
    x: float
    y: float
    width: float
    height: float
    depth: float
    mask: NDArray[np.bool_] = field(repr=False)
    visible: float = 1.0

    @property
    def name(self) -> str:
        return self.thing.name

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name


@dataclass(frozen=True)
class Scene:
    pixels: Pixels
    placed: tuple[Placed, ...]


def dress(
    rng: Rng, thing: Thing, colour: str | None, tint_share: float
) -> tuple[str | None, Pixels]:
    """The colour of a thing and its cut-out in that colour. If ``colour`` is None, every shape,
    ``tint_share`` of the pictures and a third as many of the photographs get a random colour; the
    rest keep their own."""
    rgba = thing.load()
    share = {"shape": 1.0, "photograph": tint_share / 3}.get(thing.kind, tint_share)
    if colour is None and rng.random() < share:
        colour = str(rng.choice(colours.COLOURS))
    if colour is not None:
        return colour, colours.tint(rgba, colours.sample(rng, colour))
    return thing.colour, rgba


def turned(rng: Rng, rgba: Pixels, size_px: int) -> Image.Image:
    image = Image.fromarray(rgba)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size_px / max(image.size)
    shape = (max(4, round(image.width * scale)), max(4, round(image.height * scale)))
    image = image.resize(shape, Image.Resampling.BOX if scale < 0.6 else Image.Resampling.BILINEAR)
    if rng.random() < 0.3:
        image = image.rotate(float(rng.uniform(-14, 14)), Image.Resampling.BILINEAR, expand=True)
    return image


def layout(rng: Rng, sizes: Sequence[float], reach: float = 0.46) -> list[tuple[float, float]]:
    """Centres at which things of these sizes (fractions of a square) hardly overlap. With a smaller
    ``reach`` they may overlap more."""
    half = np.array(sizes) / 2
    drawn = rng.uniform(half, 1 - half, (100, 2, len(sizes)))  # of so many, the one that fits best
    gaps = np.abs(drawn[..., :, None] - drawn[..., None, :]).max(axis=1)
    overlaps = np.maximum(0, 2 * reach * (half[:, None] + half) - gaps)
    best = drawn[np.triu(overlaps, 1).sum(axis=(1, 2)).argmin()]
    return [(float(x), float(y)) for x, y in best.T]


def background_for(
    rng: Rng,
    shape: Shape,
    things: Catalogue | None,
    items: Sequence[Item],
    *,
    plain: bool = False,
    split: Split = "train",
) -> Pixels:
    """A background from which every item stands out; with ``plain`` it is a single grey."""
    if not plain and things is not None and things.photographs and rng.random() < _PHOTOGRAPHS:
        return photographic(rng, shape, things.photographs, split)
    medians = [np.median(i.rgba[i.rgba[..., 3] > 128][::17, :3], axis=0) for i in items]
    cut_outs: list[Pixels] = []
    for attempt in range(0 if plain else 6):
        if things is not None and rng.random() < 0.25:
            cut_outs = [things.sample(rng, "train").load() for _ in range(3)]
        picture = background(rng, shape, cut_outs, None if attempt < 4 else "plain")
        small = picture[::9, ::9]
        middle = np.median(small.reshape(-1, 3), axis=0)
        named = colours.dominant(np.dstack([small, np.full(small.shape[:2], 255, np.uint8)]))
        clash = named is not None and any(i.colour == named for i in items)
        if not clash and all(np.abs(middle - m).max() > _CONTRAST for m in medians):
            return picture
    lightness = float(np.mean([m.mean() for m in medians])) if medians else 0.0
    return np.full((*shape, 3), 245 if lightness < 140 else 25, np.uint8)


def photographic(
    rng: Rng, shape: Shape, photographs: Photographs, split: Split, kind: str | None = None
) -> Pixels:
    """A photograph of a place or a surface, or a room: a wall above a floor, each a photograph."""
    kind = kind or str(rng.choice(_PHOTOGRAPHIC, p=_PHOTOGRAPHIC_SHARES))
    if kind == "room":
        foot = float(rng.uniform(0.35, 0.75))
        image = room(rng, shape, photographs, split, foot - float(rng.uniform(0.05, 0.4)), foot)
    else:
        image = photographs.view(rng, split, "scene" if kind == "scene" else "surface", shape)
    if rng.random() < 0.35:  # out of focus
        image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.7, 4))))
    return np.asarray(image.point(_levels(float(rng.uniform(0.75, 1.25)))))


def room(
    rng: Rng, shape: Shape, photographs: Photographs, split: Split, horizon: float, foot: float
) -> Image.Image:
    """A wall whose foot is at the row ``foot`` (a fraction of the height), and a floor before it
    that would reach the ``horizon``."""
    height, width = shape
    row, line = max(0, round(foot * height)), horizon * height
    image = photographs.view(rng, split, "surface", shape)
    if row >= height:
        return image
    tile = np.asarray(photographs.view(rng, split, "surface", (256, 256)))
    away = 1 / (np.arange(row, height) + 0.5 - line)[:, None]  # the floor at a row is so far away
    across = np.arange(width) - width * float(rng.uniform(0.2, 0.8))
    zoom = float(rng.uniform(0.6, 2.0)) * (height - line)
    u = (across * away * zoom).astype(np.int32) % 256
    v = (away * zoom * height * 0.5).astype(np.int32) % 256
    floor = Image.fromarray(tile[v, u]).point(_levels(float(rng.uniform(0.7, 1.2))))
    image.paste(floor, (0, row))
    if rng.random() < 0.5:  # a skirting board
        high = max(2, int(height * rng.uniform(0.01, 0.04)))
        image.paste(tuple(int(v) for v in _any_colour(rng)), (0, row - high, width, row))
    return image


def _levels(gain: float) -> list[int]:
    return [min(255, int(level * gain)) for level in range(256)] * 3


def render(
    rng: Rng,
    items: Sequence[Item],
    *,
    things: Catalogue | None = None,
    shape: Shape = (SIDE, SIDE),
    split: Split = "train",
    backdrop: Pixels | None = None,
) -> Scene:
    """Paint ``items``, the farthest first, before ``backdrop`` or a random background, and measure
    where they are. If one would hardly stand out, the background is drawn again."""
    for attempt in range(4):
        if attempt or backdrop is None:
            plain = attempt == 3
            backdrop = background_for(rng, shape, things, items, plain=plain, split=split)
        background = backdrop
        picture, owner, whole = _paint(rng, items, background)
        small, behind = picture[::2, ::2].astype(np.int16), background[::2, ::2]
        change = np.abs(small - behind).max(axis=-1)
        masks = [owner == index for index in range(len(items))]
        least = _CONTRAST_IN_PHOTOGRAPHS if things and things.photographs else _CONTRAST
        seen = [change[mask[::2, ::2]] for mask in masks]
        if all(len(one) and one.mean() >= least for one in seen):
            break
    placed = tuple(map(_measure, items, masks, whole))
    return Scene(camera(rng, picture), placed)


def camera(rng: Rng, pixels: Pixels) -> Pixels:
    """The picture as a camera might show it: its light and tint a little off, soft, with noise."""
    gains = rng.uniform(0.9, 1.06) * rng.uniform(0.97, 1.03, 3)
    levels = [min(255, int(level * gain)) for gain in gains for level in range(256)]
    image = Image.fromarray(pixels).point(levels)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2))))
    if rng.random() >= 0.3:
        return np.asarray(image)
    height, width = pixels.shape[:2]
    grain = rng.integers(-128, 128, (height, width, 1), np.int8) * np.float32(
        rng.uniform(0.01, 0.1)
    )
    return np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)


def _paint(
    rng: Rng, items: Sequence[Item], background: Pixels
) -> tuple[Pixels, NDArray[np.uint8], list[int]]:
    """The picture; for each pixel the index of the item on it (255 is the background); and for each
    item how many pixels it has, the hidden ones included."""
    height, width = background.shape[:2]
    canvas = Image.fromarray(background)
    short = min(height, width)
    shadow = rng.random() < 0.35
    offset = (short * rng.uniform(-0.03, 0.03, 2)).astype(int)
    soft_edges = float(rng.uniform(0.4, 1.3)) if rng.random() < 0.7 else 0.0
    owner = Image.new("L", (width, height), 255)
    whole = [0] * len(items)
    for index in sorted(range(len(items)), key=lambda i: -items[i].depth):
        item = items[index]
        image = turned(rng, item.rgba, max(8, round(item.size * short)))
        left = round(item.x * width - image.width / 2)
        top = round(item.y * height - image.height / 2)
        if image.width <= width:
            left = min(max(left, 0), width - image.width)
        if image.height <= height:
            top = min(max(top, 0), height - image.height)
        alpha = image.getchannel("A")
        if shadow:
            dark = alpha.point(lambda v: v * 0.4).filter(ImageFilter.BoxBlur(short // 80))
            canvas.paste((0, 0, 0), (left + int(offset[0]), top + int(offset[1])), dark)
        solid = alpha.point(lambda v: 255 if v > 96 else 0)
        whole[index] = solid.histogram()[255]
        if soft_edges:
            alpha = alpha.filter(ImageFilter.BoxBlur(soft_edges))
        lit = image.convert("RGB").point(_levels(float(rng.uniform(0.9, 1.08))))
        canvas.paste(lit, (left, top), alpha)
        owner.paste(index, (left, top), solid)
    return np.asarray(canvas), np.asarray(owner), whole


def _measure(item: Item, mask: NDArray[np.bool_], whole: int) -> Placed:
    height, width = mask.shape
    x, y, w, h = item.x, item.y, 0.0, 0.0
    if box := Image.fromarray(mask).getbbox():
        x, w = (box[0] + box[2]) / 2 / width, (box[2] - box[0]) / width
        y, h = (box[1] + box[3]) / 2 / height, (box[3] - box[1]) / height
    visible = float(mask.sum()) / max(1, whole)
    return Placed(item.thing, item.colour, x, y, w, h, item.depth, mask, visible)


def beside(scenes: Sequence[Scene], rows: int, gap: int, line: int) -> Scene:
    """Pictures of one size beside each other in ``rows``, ``gap`` pixels of grey ``line`` apart."""
    columns = len(scenes) // rows
    height, width = scenes[0].pixels.shape[:2]
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    pixels = np.full((*shape, 3), line, np.uint8)
    placed = []
    for number, scene in enumerate(scenes):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        here = slice(top, top + height), slice(left, left + width)
        pixels[here] = scene.pixels
        for one in scene.placed:
            mask = np.zeros(shape, np.bool_)
            mask[here] = one.mask
            x, y = (left + one.x * width) / shape[1], (top + one.y * height) / shape[0]
            w, h = one.width * width / shape[1], one.height * height / shape[0]
            placed.append(replace(one, x=x, y=y, width=w, height=h, mask=mask))
    return Scene(pixels, tuple(placed))


def jpeg(rng: Rng, pixels: Pixels) -> bytes:
    return encoded(pixels, "JPEG", quality=int(rng.integers(60, 96)))


def depth_png(depth: NDArray[np.float32]) -> bytes:
    """A depth map (H, W) in metres as a 16-bit PNG in millimetres; 0 is no measurement."""
    millimetres = np.clip(np.rint(depth * 1000), 0, 65535).astype(np.uint16)
    return encoded(millimetres, "PNG", compress_level=4)


def encoded(pixels: Pixels | NDArray[np.uint16], form: str, **options: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def _any_colour(rng: Rng) -> NDArray[np.float32]:
    hsv = np.array([rng.uniform(0, 360), rng.uniform(0, 1) ** 1.5, rng.uniform(0.08, 1) ** 0.6])
    return (colours.hsv_to_rgb(hsv) * 255).astype(np.float32)


def _noise(rng: Rng, height: int, width: int) -> Pixels:
    total = np.zeros((height, width, 3), np.float32)
    base, spread = _any_colour(rng), float(rng.uniform(10, 60))
    grey = rng.random() < 0.5
    for cells in (3, 8, 24, 80):
        grid = rng.normal(0, 1, (cells, cells, 1 if grey else 3)).astype(np.float32)
        grid = np.repeat(grid, 3, axis=2) if grey else grid
        levels = np.clip(grid * 40 + 128, 0, 255).astype(np.uint8)
        layer = Image.fromarray(levels).resize((width, height), Image.Resampling.BILINEAR)
        weight = 1.0 / math.sqrt(cells) if rng.random() < 0.7 else 0.3
        total += (np.asarray(layer, dtype=np.float32) - 128) / 40 * weight
    return np.clip(base + total * spread, 0, 255).astype(np.uint8)


def _mix(a: NDArray[np.float32], b: NDArray[np.float32], t: NDArray[np.floating]) -> Pixels:
    return np.asarray(a + (b - a) * t.astype(np.float32)[..., None]).astype(np.uint8)


def _collage(rng: Rng, height: int, width: int, cut_outs: list[Pixels]) -> Pixels:
    """Large, strongly blurred cut-outs: a picture out of focus."""
    canvas = Image.new("RGB", (64, 64), tuple(int(v) for v in _any_colour(rng)))
    for rgba in cut_outs:
        side = int(rng.integers(30, 80))
        thing = Image.fromarray(rgba).resize((side, side), Image.Resampling.BOX)
        left, top = (int(v) for v in rng.integers(-20, 50, 2))
        canvas.paste(thing, (left, top), thing)
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.uniform(1.5, 4))))
    return np.asarray(canvas.resize((width, height), Image.Resampling.BICUBIC))


def background(rng: Rng, shape: Shape, cut_outs: list[Pixels], kind: str | None = None) -> Pixels:
    """A background (height, width, 3) uint8; a collage is made of ``cut_outs`` (RGBA)."""
    height, width = shape
    kind = kind or str(rng.choice(_BACKGROUNDS, p=_SHARES))
    if kind == "collage" and not cut_outs:
        kind = "noise"
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    first, second = _any_colour(rng), _any_colour(rng)
    if kind == "white":
        return np.full((height, width, 3), 255 if rng.random() < 0.7 else 246, np.uint8)
    if kind == "plain":
        return np.broadcast_to(first.astype(np.uint8), (height, width, 3)).copy()
    if kind == "gradient":
        angle = float(rng.uniform(0, 2 * math.pi))
        along = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle)
        return _mix(first, second, np.clip(along + 0.5, 0, 1))
    if kind == "noise":
        return _noise(rng, height, width)
    near = first + (second - first) * float(rng.uniform(0.15, 0.5))
    if kind == "stripes":
        angle, width_px = float(rng.uniform(0, math.pi)), float(rng.uniform(6, 30))
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) / width_px * math.pi)
        return _mix(first, near, np.clip(wave * 4 + 0.5, 0, 1))
    if kind == "checks":
        size = int(rng.integers(10, 44))
        return _mix(first, near, (x // size + y // size) % 2)
    if kind == "collage":
        return _collage(rng, height, width, cut_outs)
    # a horizon: sky over ground, or wall over floor
    row = int(height * rng.uniform(0.4, 0.75))
    ramp = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    upper, lower = _any_colour(rng), _any_colour(rng)
    if rng.random() < 0.5:
        upper = np.array([rng.uniform(110, 200), rng.uniform(170, 225), 245], np.float32)
        lower = np.array([rng.uniform(60, 190), rng.uniform(120, 180), 60], np.float32)
    image = np.where(
        np.arange(height)[:, None, None] < row, upper * (0.8 + 0.25 * ramp), lower * (1.25 - ramp)
    )
    image = image + rng.normal(0, float(rng.uniform(0, 7)), (height, width, 1))
    return np.asarray(np.clip(np.broadcast_to(image, (height, width, 3)), 0, 255), np.uint8)

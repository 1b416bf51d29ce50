"""Rooms: 1 to 4 things before a camera, with exact depth, normals and questions about them.

Three in four rooms are ray-cast: furniture models or plain solids on a floor between walls, perhaps
among further furniture that no question asks about. The others are layered: floating shapes before
a background. ``make_layers`` composes cut-outs instead. The truth is measured in the pixels before
noise is added. A view with a hidden or tiny thing, or with two equally near ones, is drawn again.

Half of the depth maps are metric. The others are relative, as estimators of depth give them: grey
with any scale and shift, mostly brighter where nearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, permutations

import numpy as np
from PIL import Image

from mico_training.data.language.english import (
    Rng,
    agreement,
    article,
    counts,
    listed,
    number_word,
    pick,
    plural,
)
from mico_training.data.sources.written import NEARER_BY, Sample, Split, Turn, kind_of
from mico_world import language as en
from mico_world.language import word
from mico_world.pictures.compose import camera, depth_png, encoded, jpeg
from mico_world.rooms import meshes
from mico_world.rooms.meshes import Floats
from mico_world.rooms.scenes import RoomScene, cut_out_scene, layered_scene, room_scene
from mico_world.things.catalogue import Catalogue
from mico_world.things.photographs import photographs

KIND_WORDS = {"depth": "depth map", "normal": "normal map", "image": "picture"}
SIDES = {2: ("left", "right"), 3: ("left", "middle", "right")}
LAYERED_SHARE = 0.25
DEPTH_FORMS = {
    "metric": 0.5,
    "inverse": 0.25,
    "nearness": 0.13,
    "distance": 0.08,
    "inverse 16": 0.04,
}  # what the depth maps hold, and how often
MODEL_SHARE = 0.75  # of the ray-cast views; the others hold solids
_COUNTS = (0.24, 0.42, 0.21, 0.13)  # shares of views with 1, 2, 3, 4 things


def make(rng: Rng, split: Split, *, use_models: bool = True) -> Sample:
    layered = rng.random() < LAYERED_SHARE
    modelled = use_models and rng.random() < MODEL_SHARE
    behind = photographs() if use_models else None
    count = int(rng.choice(4, p=_COUNTS)) + 1

    def draw() -> RoomScene | None:
        if layered:
            return layered_scene(rng, split, count)
        return room_scene(rng, split, count, modelled, behind)

    return _sample(rng, split, draw, named=not layered)


def make_layers(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One sample of cut-outs, each at a depth."""
    return _sample(rng, split, lambda: cut_out_scene(rng, split, things), named=True)


def visible_things(scene: RoomScene) -> tuple[list[RoomThing], list[RoomThing]] | None:
    """The things that are asked about, from left to right, and the clutter. None when a thing that
    is asked about is hidden or tiny, or when two are equally near."""
    asked: list[RoomThing] = []
    clutter: list[RoomThing] = []
    for index, label in enumerate(scene.labels):
        seen = scene.owner == index
        pixels = int(seen.sum())
        depths = scene.depth[seen]
        # too small, too large, or beyond the sensor's reach
        fit = 0.012 * seen.size <= pixels <= 0.6 * seen.size and depths.min() > 0
        if index < scene.asked and not fit:
            return None
        if not fit and pixels < 0.003 * seen.size:
            continue
        columns, rows = (np.flatnonzero(seen.any(axis)) / len(seen) for axis in (0, 1))
        width, height = (float(np.ptp(at)) + 1 / len(seen) for at in (columns, rows))
        x, y = float(columns[0]) + width / 2, float(rows[0]) + height / 2
        known = depths[depths > 0]
        near, middle = np.quantile(known, (0.03, 0.5)) if len(known) else (np.inf, np.inf)
        thing = RoomThing(*label, x, y, width, height, float(near), float(middle))
        (asked if index < scene.asked else clutter).append(thing)
    asked.sort(key=lambda thing: thing.x)
    if any(b.x - a.x < 0.1 for a, b in pairwise(asked)):
        return None
    clear = len(asked) == 1 or depth_ends(asked) is not None
    return (asked, clutter) if asked and clear else None


def _sample(rng: Rng, split: Split, draw: Callable[[], RoomScene | None], *, named: bool) -> Sample:
    for _ in range(200):
        scene = draw()
        if scene is not None and (found := visible_things(scene)):
            break
    else:
        raise RuntimeError("no fit view in 200 draws")
    things, clutter = found
    files: dict[str, bytes] = {}
    keep = rng.random(3)
    if keep[0] < 0.75:
        files["image.jpg"] = jpeg(rng, camera(rng, scene.rgb))
    depth, spoilt = _spoilt(rng, scene.depth)
    form = str(rng.choice(list(DEPTH_FORMS), p=list(DEPTH_FORMS.values())))
    if keep[1] < 0.93 or not files:
        files["depth.png"] = depth_png(depth) if form == "metric" else _relative(rng, depth, form)
    if scene.curved and keep[2] < 0.5:
        picture = meshes.normal_picture(scene.normal)
        files["normal.png"] = encoded(picture, "PNG", compress_level=4)
    metric = form == "metric"
    asker = Asker(rng, things, list(files), scene.floor, named, bool(clutter), metric)
    turns = asker.ask()
    said = captions(rng, things, list(files))
    truth = {
        "things": [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(thing).items()}
            | {"clutter": thing in clutter, "depth": _rounded(thing.depth)}
            for thing in (*things, *clutter)
        ],
        "depth_map": form,
        "field_of_view": round(float(np.degrees(2 * np.arctan(scene.tan_half))), 1),
        "spoilt": spoilt,
    }
    concept = things[0].name if len(things) == 1 and named else None
    concepts = dict.fromkeys(files, concept) if concept else {}
    return Sample("", split, files, said, turns, concepts, truth)


def _rounded(metres: float) -> float | None:
    return round(metres, 3) if np.isfinite(metres) else None


def _spoilt(rng: Rng, depth: Floats) -> tuple[Floats, list[str]]:
    """The depth map as a sensor sees it, and what is wrong with it; 0 is a hole."""
    done: list[str] = []
    depth = depth.copy()
    seen = depth > 0
    if rng.random() < 0.25:
        noise = rng.normal(size=depth.shape) * rng.uniform(0.002, 0.015)
        depth[seen] *= (1 + noise[seen]).astype(np.float32)
        done.append("noise")
    if rng.random() < 0.2 and seen.any():
        low, high = float(depth[seen].min()) * 0.9, float(depth[seen].max())
        depth[seen] = low + np.rint((depth[seen] - low) / (high - low) * 255) / 255 * (high - low)
        done.append("256 levels")
    if rng.random() < 0.3:
        edges = np.abs(np.gradient(depth)).max(axis=0) > 0.04 * depth
        depth[(rng.random(depth.shape) < 0.02) | (edges & (rng.random(depth.shape) < 0.6))] = 0
        for _ in range(int(rng.integers(0, 5))):  # surfaces that shine, and the sensor's border
            size = rng.integers(4, 28, 2)
            top, left = rng.integers(0, len(depth) - size)
            depth[top : top + size[0], left : left + size[1]] = 0
        depth[:, : int(rng.integers(0, 16))] = 0
        done.append("holes")
    return depth, done


def _relative(rng: Rng, depth: Floats, form: str) -> bytes:
    """The depth map as grey of any scale and shift. ``form`` says what grows with the grey:
    "inverse" (8 bits) and "inverse 16" nearness as 1 / depth, "nearness" 1 - depth, "distance" the
    depth itself. 0 is a hole."""
    known = depth > 0
    if rng.random() < 0.5:  # an estimator has no holes, and its edges are soft
        filled = np.where(known, depth, depth.max(initial=0.1))
        coarse = (round(len(depth) / float(rng.uniform(1.3, 3.5))),) * 2
        soft = Image.fromarray(filled).resize(coarse, Image.Resampling.BOX)
        soft = soft.resize(depth.shape, Image.Resampling.BILINEAR)
        depth, known = np.asarray(soft), np.ones_like(known)
    metres = np.maximum(depth, 1e-3)
    value = 1 / metres if form.startswith("inverse") else metres
    low, high = np.quantile(value[known], (0.002, 0.998)) if known.any() else (0.0, 1.0)
    share = np.clip((value - low) / max(high - low, 1e-6), 0, 1)
    share = 1 - share if form == "nearness" else share
    bottom, top = rng.uniform(0.01, 0.15), rng.uniform(0.75, 1.0)
    levels = 65535 if form == "inverse 16" else 255
    grey = np.maximum(1, np.rint((bottom + share * (top - bottom)) * levels)) * known
    pixels = grey.astype(np.uint16) if levels > 255 else grey.astype(np.uint8)
    return encoded(pixels, "PNG", compress_level=4)


@dataclass(frozen=True)
class RoomThing:
    """A visible thing: the box of its visible pixels (the centre and the sides as fractions), and
    the depths of its nearest point and of its median pixel in metres."""

    identity: str
    name: str
    accept: tuple[str, ...]
    colour: str | None
    x: float
    y: float
    width: float
    height: float
    near: float
    depth: float

    def clearly_nearer(self, other: RoomThing) -> bool:
        """Whether the nearest and the median depth are both smaller by the factor NEARER_BY."""
        return self.near * NEARER_BY <= other.near and self.depth * NEARER_BY <= other.depth


def listing(names: Sequence[str]) -> str:
    if len(names) > 1 and len(set(names)) == 1:
        return f"{number_word(len(names))} {plural(names[0])}"
    return listed([article(name) for name in names])


def depth_ends(things: Sequence[RoomThing]) -> tuple[RoomThing, RoomThing] | None:
    """The nearest and the farthest thing, or None if the order in depth of any two is unclear."""
    by_depth = sorted(things, key=lambda thing: thing.near)
    clear = len(by_depth) > 1 and all(a.clearly_nearer(b) for a, b in pairwise(by_depth))
    return (by_depth[0], by_depth[-1]) if clear else None


def captions(
    rng: Rng, things: Sequence[RoomThing], members: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Captions of each member; those of a depth map also name the nearest thing, if it is clear."""
    names = [thing.name for thing in things]
    plain = listing(names)
    unique = len(set(names)) == len(names)
    ends = depth_ends(things)
    found: dict[str, tuple[str, ...]] = {}
    for member in members:
        kind = kind_of(member)
        sentences = [f"a {KIND_WORDS[kind]} of {plain}", plain]
        if kind == "image" and unique:
            hued = [f"{t.colour} {t.name}" if t.colour else t.name for t in things]
            sentences.append(listing(hued))
        if kind == "depth" and ends is not None:
            near, far = ends
            if unique and len(things) == 2:
                sentences.append(f"{article(near.name)} nearer than {article(far.name)}")
            if len(things) in SIDES:
                side = SIDES[len(things)][things.index(near)]
                more = "nearer" if len(things) == 2 else "nearest"
                sentences.append(f"a depth map of {plain}, the {side} one {more}")
        if len(things) == 2 and unique and rng.random() < 0.5:
            sentences.append(f"{article(names[0])} left of {article(names[1])}")
        found[member] = tuple(dict.fromkeys(sentences))
    return found


@dataclass
class Asker:
    """Draws the turns of one view. ``things`` are sorted from left to right. If they are not
    ``named``, they are outlines, and the questions call them shapes. Among clutter only questions
    that name a thing are clear; only a ``metric`` depth map tells a distance."""

    rng: Rng
    things: Sequence[RoomThing]
    members: Sequence[str]
    floor: bool
    named: bool
    cluttered: bool
    metric: bool

    def __post_init__(self) -> None:
        self.unique = len({thing.name for thing in self.things}) == len(self.things)
        self.ends = None if self.cluttered else depth_ends(self.things)

    def ask(self) -> tuple[Turn, ...]:
        turns: list[Turn] = []
        if "depth.png" in self.members:
            turns += [*self._nearer_side(), *self._nearer_name(), *self._nearer_or_farther()]
            turns += [*self._nearer_colour(), *self._distance(), *self._nearest()]
        clear = not self.cluttered
        for ask, chance in (
            (self._count, (0.5, 0.35, 0.6, 0.9)[len(self.things) - 1] * clear),
            (self._name, 0.6 * clear),
            (self._position, 0.5),
            (self._colour, 0.6),
            (self._kind, 0.12),
        ):
            if self._coin(chance):
                turns += ask()
        while not turns:
            turns += self._kind() if self.cluttered else self._count()
        self.rng.shuffle(turns)
        return tuple(turns)

    def _coin(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def _either_order(self, a: str, b: str, chance: float = 0.5) -> tuple[str, str]:
        return (a, b) if self._coin(chance) else (b, a)

    def _depth_media(self) -> tuple[str, ...]:
        if "image.jpg" not in self.members or self._coin(0.55):
            return ("depth.png",)
        return self._either_order("image.jpg", "depth.png")

    def _nearer_side(self) -> Iterator[Turn]:
        sides = SIDES.get(len(self.things), ())
        if self.ends is None or not sides:
            return
        for farther, left_out in ((False, 0.1), (True, 0.45)):
            if self._coin(left_out):
                continue
            side = sides[self.things.index(self.ends[farther])]
            most = "farthest" if farther else word(self.rng, "room nearest")
            more = word(self.rng, "room farther" if farther else "room nearer")
            facts = {"side": side, "more": more, "most": most}
            facts["bare"] = more.removesuffix(" to the camera")
            if len(sides) == 2:
                facts["a"], facts["b"] = self._either_order(sides[0], sides[1], 0.7)
            sort = f"room side of {number_word(len(sides))}"
            form = "to the viewer" if more in ("closer", "nearer") else "plain"
            question, reply = en.say(self.rng, sort, form=form, **facts)
            style = self.rng.random()
            if style < 0.5:
                reply = f"The {side} one." if self._coin() else f"the {side} one"
            elif style < 0.65:
                reply = side
            yield Turn(question, reply, "nearer", self._depth_media(), sides, (side,))

    def _nearer_name(self) -> Iterator[Turn]:
        pairs = [(a, b) for a, b in permutations(self.things, 2) if a.clearly_nearer(b)]
        if not self.unique or not pairs:
            return
        for _ in range(2):
            near, far = pick(self.rng, pairs)
            names = self._either_order(near.name, far.name)
            facts = {"a": names[0], "b": names[1], "near": near.name, "far": far.name}
            if self._coin(0.3):
                nearer = self._coin()
                asked = word(self.rng, "nearer" if nearer else "room farther than")
                yes = "yes" if nearer == (names[0] == near.name) else "no"
                facts |= agreement(names[0]) | {"near_is": agreement(near.name)["is"]}
                texts = en.say(self.rng, "room nearer than", word=asked, yes=yes, **facts)
                yield Turn(*texts, "nearer", self._depth_media(), ("yes", "no"), (yes,))
                continue
            farther = self._coin(0.35)
            right = far if farther else near
            asked = word(self.rng, "room farther" if farther else "room nearer")
            bare = asked.removesuffix(" to the camera")
            facts |= {"word": asked, "bare": bare, "name": right.name, **agreement(right.name)}
            texts = en.say(self.rng, "room nearer thing", **facts)
            yield Turn(*texts, "nearer", self._depth_media(), names, right.accept)

    def _nearer_or_farther(self) -> Iterator[Turn]:
        if self.ends is None or len(self.things) != 2 or self._coin():
            return
        at = int(self._coin())
        words = word(self.rng, "nearer"), word(self.rng, "farther than")
        farther = self.things[at] is self.ends[1]
        one, two = self._either_order(*words)
        facts = {"side": SIDES[2][at], "other": SIDES[2][1 - at], "one": one, "two": two}
        texts = en.say(self.rng, "nearer or farther than", word=words[farther], **facts)
        accept = en.accepted("farther" if farther else "nearer")
        yield Turn(*texts, "nearer", self._depth_media(), (one, two), accept)

    def _nearer_colour(self) -> Iterator[Turn]:
        """Is the red or the blue thing nearer? This needs both the picture and the depth map."""
        hues = [thing.colour for thing in self.things if thing.colour is not None]
        if self.ends is None or "image.jpg" not in self.members or len(self.things) != 2:
            return
        if len(hues) < 2 or hues[0] == hues[1] or self._coin(0.3):
            return
        names = self._either_order(hues[0], hues[1])
        farther = self._coin(0.35)
        asked = "farther away" if farther else word(self.rng, "nearer")
        colour = str(self.ends[farther].colour)
        media = self._either_order("image.jpg", "depth.png")
        facts = {"word": asked, "a": names[0], "b": names[1], "colour": colour}
        texts = en.say(self.rng, "room nearer colour", **facts)
        yield Turn(*texts, "nearer", media, names, en.accepted(colour))

    def _distance(self) -> Iterator[Turn]:
        if not self.metric:
            return
        thing = pick(self.rng, self.things)
        named = self.unique and self._coin(0.6)
        if not named and (self.cluttered or self._coin()):
            return
        near = thing.depth if named else min(thing.near for thing in self.things)
        step = 0.5 if near < 5 else 1.0
        metres = max(round(near / step) * step, 0.5)
        unit = "metre" if metres == 1 else "metres"
        words = "half a metre" if metres == 0.5 else f"{metres:g} {unit}"
        units = (f" {unit}", f" {unit.replace('re', 'er')}", " m", "m")
        accept = (words, *(f"{metres:g}{unit}" for unit in units))
        if named:
            facts = {"name": thing.name, "distance": words, **agreement(thing.name)}
            texts = en.say(self.rng, "room distance of", **facts)
        else:
            form = "one" if len(self.things) == 1 else "several"
            texts = en.say(self.rng, "room distance", form=form, distance=words)
        yield Turn(*texts, "distance", self._depth_media(), (), accept)

    def _nearest(self) -> Iterator[Turn]:
        """What is the nearest thing? The answer names it freely."""
        if self.ends is None or not self.named or not self.unique or self._coin():
            return
        farther = self._coin(0.35)
        right = self.ends[farther]
        most = "farthest" if farther else word(self.rng, "room nearest")
        facts = {"most": most, "name": right.name, "one": article(right.name)}
        texts = en.say(self.rng, "room nearest", **facts, **agreement(right.name))
        yield Turn(*texts, "nearest_name", self._depth_media(), (), right.accept)

    def _count(self) -> Iterator[Turn]:
        n = len(self.things)
        word_of_n = number_word(n)
        facts = {"word": word_of_n, "n": str(n), "is": "is" if n == 1 else "are"}
        form = "on a floor" if self.floor else "in the air"
        for member in self.members:
            if not self._coin(0.4):
                facts |= {"medium": KIND_WORDS[kind_of(member)], "plural": "" if n == 1 else "s"}
                texts = en.say(self.rng, "room count", form=form, **facts)
                yield Turn(*texts, "count", (member,), counts(4), (word_of_n, str(n)))

    def _name(self) -> Iterator[Turn]:
        if len(self.things) > 2:
            return
        names = tuple(dict.fromkeys(name for thing in self.things for name in thing.accept))
        member = pick(self.rng, self.members)
        everything = listing([thing.name for thing in self.things])
        single = len(self.things) == 1
        noun = "thing" if self.named else "shape"
        form = f"one {noun}" if single else f"several {noun}s"
        medium = KIND_WORDS[kind_of(member)]
        texts = en.say(self.rng, "room name", form=form, medium=medium, all=everything)
        accept = names if single else (everything, *names)
        yield Turn(*texts, "name" if self.named else "shape", (member,), (), accept)

    def _position(self) -> Iterator[Turn]:
        if len(self.things) != 2 or not self.unique:
            return
        media = (pick(self.rng, self.members),)
        at = int(self._coin())
        thing, other, side = self.things[at], self.things[1 - at].name, SIDES[2][at]
        a, b = self._either_order(thing.name, other)
        facts = {"side": side, "name": thing.name, "other": other, "a": a, "b": b}
        facts |= agreement(thing.name)
        if self._coin(0.6):
            texts = en.say(self.rng, "room thing on the side", one=article(thing.name), **facts)
            yield Turn(*texts, "position", media, (a, b), thing.accept)
        else:
            texts = en.say(self.rng, "room side of a thing", **facts)
            yield Turn(*texts, "position", media, ("left", "right"), (side,))

    def _colour(self) -> Iterator[Turn]:
        coloured = [thing for thing in self.things if thing.colour is not None]
        if "image.jpg" not in self.members or not coloured or not self.unique:
            return
        thing = pick(self.rng, coloured)
        colour = str(thing.colour)
        name = "thing" if len(self.things) == 1 and self._coin() else thing.name
        texts = en.say(self.rng, "room colour", name=name, colour=colour, **agreement(name))
        yield Turn(*texts, "colour", ("image.jpg",), (), en.accepted(colour))

    def _kind(self) -> Iterator[Turn]:
        member = pick(self.rng, self.members)
        medium = KIND_WORDS[kind_of(member)]
        texts = en.say(self.rng, "room kind", medium=medium)
        yield Turn(*texts, "kind", (member,), ("depth map", "normal map", "picture"), (medium,))

"""Picture samples: one thing, several of a kind, mixed scenes, pictures beside each other, places.

The answers are balanced: a count, a colour, a side or yes and no is drawn evenly before the picture
is composed to make it true. Small things that no question asks about may lie around in a scene.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from mico_training.data.language.english import (
    Rng,
    agreement,
    article,
    countable,
    counts,
    listed,
    number_word,
    pick,
    plural,
    sentence,
    shuffled,
)
from mico_training.data.sources.written import Sample, Split, Turn
from mico_world import language as en
from mico_world.pictures import compose
from mico_world.things import colours
from mico_world.things.catalogue import Catalogue, Thing
from mico_world.things.photographs import groups

IMAGE = "image.jpg"
MEDIA = (IMAGE,)
APART = 0.2  # least distance of two centres for a question about "left of" or "above"
LEAST_SIZE = 0.22  # longest side of a thing that is asked about; of the picture's mean side
LARGER = 1.7  # the larger of two things has so many times the area of the other one
LARGER_ASKED = 0.12  # share of mixed pictures with a question about it
MOST = 5  # things that are asked about in a scene
SIDES = {"x": ("left", "right"), "y": ("above", "below")}
EDGES = {"x": ("left", "right"), "y": ("top", "bottom")}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_CLUTTERED = 0.3  # share of scenes with one to three things that no question asks about
_SHAPES = ((1.0, 0.28), (0.75, 0.3), (0.667, 0.17), (0.5625, 0.15), (0.5, 0.1))


def canvas(rng: Rng) -> tuple[int, int]:
    ratios, shares = zip(*_SHAPES, strict=True)
    short = round(compose.SIDE * float(rng.choice(ratios, p=shares)))
    return (short, compose.SIDE) if rng.random() < 0.7 else (compose.SIDE, short)


def truth_of(placed: Sequence[compose.Placed], asked: int) -> list[dict[str, Any]]:
    """What is true of each thing; those after the first ``asked`` are clutter."""
    numbers = ("x", "y", "width", "height")
    return [
        {"identity": p.thing.identity, "name": p.name, "colour": p.colour}
        | {key: round(getattr(p, key), 3) for key in numbers}
        | {"depth": round(p.depth, 3) or None, "clutter": index >= asked}
        for index, p in enumerate(placed)
    ]


def _sample(
    rng: Rng,
    split: Split,
    scene: compose.Scene,
    asked: Sequence[compose.Placed],
    turns: Sequence[Turn],
    concept: str | None = None,
) -> Sample:
    files = {IMAGE: compose.jpeg(rng, scene.pixels)}
    said = {IMAGE: captions(rng, asked)} if asked else {}
    concepts = {IMAGE: concept} if concept else {}
    truth = {"things": truth_of(scene.placed, len(asked))}
    return Sample("", split, files, said, tuple(turns), concepts, truth)


def make_single(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One thing, mostly large, anywhere: questions about its name, presence, colour and place."""
    thing = things.sample(rng, split)
    size = float(rng.uniform(LEAST_SIZE, 0.55) if rng.random() < 0.4 else rng.uniform(0.55, 0.97))
    scene, asked = _scatter(rng, split, things, [thing], [None], size=size)
    one = asked[0]
    turns = [name_turn(rng, thing), *_presence(rng, split, things, scene, asked)]
    if one.colour is not None:
        turns.append(colour_turn(rng, one, alone=True))
    turns += [half_turn(rng, one, a) for a in SIDES if abs(getattr(one, a) - 0.5) > 0.12]
    if one.width < 0.6 and one.height < 0.6:
        turns.append(where_turn(rng, one))
    turns.append(_describe(rng, asked))
    return _sample(rng, split, scene, asked, turns, concept=thing.name)


def make_colour(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to four things, each in a random colour, and questions about the colours."""
    n = int(rng.choice(4, p=(0.1, 0.4, 0.3, 0.2))) + 1
    drawn = [str(c) for c in rng.choice(colours.COLOURS, n, replace=False)]
    if n > 1 and rng.random() < 0.4:
        drawn[1] = drawn[0]
    scene, asked = _scatter(rng, split, things, things.distinct(rng, split, n), drawn)
    turns = [colour_turn(rng, p, alone=n == 1) for p in asked]
    turns += _colours(rng, asked)
    one = pick(rng, asked)
    colour = str(one.colour)
    if rng.random() < 0.5:
        turns.append(present_turn(rng, f"{colour} {one.name}", present=True))
    else:
        other = str(rng.choice([c for c in colours.COLOURS if c != colour]))
        turns.append(present_turn(rng, f"{other} {one.name}", present=False))
    return _sample(rng, split, scene, asked, [*turns, _describe(rng, asked)])


def make_count(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to five things of a kind, half the time among one to three other things."""
    n = int(rng.integers(1, MOST + 1))
    drawn = (things.sample(rng, split) for _ in range(100))
    kind = next(thing for thing in drawn if countable(thing.name))
    others = int(rng.integers(1, min(3, MOST + 1 - n) + 1)) if rng.random() < 0.5 and n < 5 else 0
    rest = things.distinct(rng, split, others, unlike=[kind])
    same_look = rng.random() < 0.5
    pool = things.of_name(split, kind.name)
    kinds = [kind if same_look else pick(rng, pool) for _ in range(n)]
    one_colour = str(rng.choice(colours.COLOURS)) if rng.random() < 0.4 else None
    wanted = [one_colour if same_look else None] * n + [None] * others
    alike = n if same_look else 0
    scene, asked = _scatter(rng, split, things, [*kinds, *rest], wanted, same_look=alike)
    turns = [count_turn(rng, kind.name, n)]
    if len(scene.placed) == len(asked) <= MOST:
        turns.append(count_turn(rng, None, len(asked)))
    turns += _presence(rng, split, things, scene, asked)
    for one in asked[n:]:
        turns.append(count_turn(rng, one.name, 1) if rng.random() < 0.3 else where_turn(rng, one))
    if one_colour and same_look and n == 1:
        turns.append(colour_turn(rng, asked[0], alone=not others))
    turns.append(_describe(rng, asked))
    return _sample(rng, split, scene, asked, turns)


def make_pair(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """Two things clearly apart along one axis or both, and questions about their places."""
    two = things.distinct(rng, split, 2)
    axis = "x" if rng.random() < 0.65 else "y"
    shape = canvas(rng)
    looks = [compose.dress(rng, t, None, tint_share=0.35) for t in two]
    while True:
        sizes = rng.uniform(LEAST_SIZE + 0.04, 0.62, 2)
        along, across = rng.uniform(sizes / 2, 1 - sizes / 2), rng.uniform(sizes / 2, 1 - sizes / 2)
        if abs(along[0] - along[1]) < max(0.5 * sizes.sum(), 0.26):
            continue
        if rng.random() < 0.5:  # side by side on one line; otherwise each anywhere across the axis
            across = rng.uniform(0.35, 0.65) + rng.uniform(-0.03, 0.03, 2)
        places = np.stack([along, across] if axis == "x" else [across, along], axis=1).tolist()
        zipped = zip(two, looks, places, sizes.tolist(), strict=True)
        items = [compose.Item(thing, *look, x, y, size) for thing, look, (x, y), size in zipped]
        scene = compose.render(rng, items, things=things, shape=shape, split=split)
        if all(p.visible >= compose.VISIBLE for p in scene.placed):
            break
    return _of_pair(rng, split, things, scene)


def make_beside(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """Two to four pictures of one thing each beside each other, as people paste photographs."""
    n, rows = ((2, 1), (3, 1), (2, 2), (4, 2))[int(rng.choice(4, p=(0.62, 0.14, 0.1, 0.14)))]
    columns = n // rows
    gap = int(rng.choice([0, 0, 2, 6, 12]))
    width = (compose.SIDE - gap * (columns - 1)) // columns
    ratio = float(rng.choice([1.0, 1.0, 0.75, 1.25]))
    height = min(round(width * ratio), (compose.SIDE - gap * (rows - 1)) // rows)
    if columns == 1:
        width = min(compose.SIDE, round(height * float(rng.choice([1.0, 1.34, 1.78]))))
    panels = []
    for thing in things.distinct(rng, split, n):
        look = compose.dress(rng, thing, None, tint_share=0.3)
        size = float(rng.uniform(0.55, 0.98))
        x, y = (float(v) for v in rng.uniform(0.42, 0.58, 2))
        item = compose.Item(thing, *look, x, y, size)
        panels.append(
            compose.render(rng, [item], things=things, shape=(height, width), split=split)
        )
    scene = compose.beside(panels, rows, gap, int(rng.choice([255, 255, 0, 128])))
    return _of_pair(rng, split, things, scene) if n == 2 else _mixed(rng, split, things, scene)


def make_scene(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to five things of different names, mostly two to four."""
    n = int(rng.choice(MOST, p=(0.08, 0.3, 0.3, 0.22, 0.1))) + 1
    chosen = things.distinct(rng, split, n)
    scene, asked = _scatter(rng, split, things, chosen, [None] * n)
    return _mixed(rng, split, things, scene, asked)


def make_place(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """A place without things: what is asked about is not there."""
    shape = canvas(rng)
    pixels = compose.camera(rng, compose.background_for(rng, shape, things, (), split=split))
    scene = compose.Scene(pixels, ())
    absent = [_absent(rng, split, things, ()) for _ in range(3)]
    turns = [present_turn(rng, name, present=False) for name in absent[:2]]
    if countable(absent[2]):
        turns.append(none_turn(rng, absent[2]))
    return _sample(rng, split, scene, (), turns)


def _of_pair(rng: Rng, split: Split, things: Catalogue, scene: compose.Scene) -> Sample:
    a, b = scene.placed
    makers = (side_turn, which_side_turn, what_is_beside_turn)
    turns = [pick(rng, makers)(rng, a, b, axis) for axis in _axes(a, b)]
    turns += [at_turn(rng, one, place) for one, place in _places(scene.placed)]
    return _mixed(rng, split, things, scene, scene.placed, turns)


def _mixed(
    rng: Rng,
    split: Split,
    things: Catalogue,
    scene: compose.Scene,
    asked: Sequence[compose.Placed] = (),
    turns: Sequence[Turn] = (),
) -> Sample:
    asked = asked or scene.placed
    found = [*turns, *_presence(rng, split, things, scene, asked)]
    if len(scene.placed) == len(asked) and rng.random() < (0.35 if len(asked) == 2 else 1.0):
        found.append(count_turn(rng, None, len(asked)))
    elif rng.random() < 0.2:
        found.append(count_turn(rng, pick(rng, asked).name, 1))
    coloured = [p for p in asked if p.colour]
    found += [colour_turn(rng, p, alone=len(scene.placed) == 1) for p in coloured[:2]]
    found += _colours(rng, asked)
    found += _larger(rng, asked) if rng.random() < LARGER_ASKED else []
    one = pick(rng, asked)
    found.append(where_turn(rng, one))
    found += [half_turn(rng, one, a) for a in SIDES if abs(getattr(one, a) - 0.5) > 0.15][:1]
    if not turns and len(asked) > 1:
        a, b = (asked[int(i)] for i in rng.permutation(len(asked))[:2])
        found += [side_turn(rng, a, b, axis) for axis in _axes(a, b)]
        found += [at_turn(rng, one, place) for one, place in _places(asked)]
    if len(asked) > 1:
        found.append(all_turn(rng, asked))
    return _sample(rng, split, scene, asked, [*found, _describe(rng, asked)])


def _axes(a: compose.Placed, b: compose.Placed) -> list[str]:
    """The axes along which the centres are at least ``APART`` from each other."""
    return [axis for axis in SIDES if abs(getattr(a, axis) - getattr(b, axis)) >= APART]


def _places(asked: Sequence[compose.Placed]) -> list[tuple[compose.Placed, str]]:
    """The things that alone are at an edge or in the middle, with that place."""
    found = []
    for axis, (low, high) in EDGES.items():
        order = sorted(asked, key=lambda p: getattr(p, axis))
        at = [getattr(p, axis) for p in order]
        if at[1] - at[0] >= APART and at[0] < 0.45:
            found.append((order[0], low))
        if at[-1] - at[-2] >= APART and at[-1] > 0.55:
            found.append((order[-1], high))
        if axis == "x" and len(at) == 3 and min(np.diff(at)) >= 0.15 and 0.35 < at[1] < 0.65:
            found.append((order[1], "middle"))
    return found


def _scatter(
    rng: Rng,
    split: Split,
    things: Catalogue,
    chosen: Sequence[Thing],
    wanted: Sequence[str | None],
    same_look: int = 0,
    size: float | None = None,
) -> tuple[compose.Scene, tuple[compose.Placed, ...]]:
    """A scene of the ``chosen`` things, perhaps among smaller ones, and the chosen ones in it."""
    n = len(chosen)
    height, width = shape = canvas(rng)
    cluttered = (size is None or size > 0.4) and rng.random() < _CLUTTERED
    more = int(rng.integers(1, 4)) if cluttered else 0
    around = things.distinct(rng, split, more, unlike=chosen)
    largest = {1: 0.95, 2: 0.62, 3: 0.52, 4: 0.44, 5: 0.38}.get(n, 0.3)
    base = size or float(rng.uniform(max(LEAST_SIZE, 0.5 * largest), largest))
    looks: list[tuple[str | None, Any]] = []
    for i, (thing, colour) in enumerate(zip(chosen, wanted, strict=True)):
        looks.append(looks[0] if 0 < i < same_look else compose.dress(rng, thing, colour, 0.35))
    looks += [compose.dress(rng, thing, None, 0.2) for thing in around]
    row = bool(n > 1 and rng.random() < 0.2)
    close = bool(rng.random() < 0.35)
    mean_side = (height * width) ** 0.5 / min(height, width)
    for attempt in count():
        shrunk = 0.9**attempt * mean_side
        sizes = [base * (1.0 if size else float(rng.uniform(0.8, 1.2))) for _ in range(n)]
        sizes = [min(0.97, shrunk * max(LEAST_SIZE, s)) for s in sizes]
        sizes += [shrunk * float(rng.uniform(0.12, 0.2)) for _ in range(more)]
        places = compose.layout(rng, sizes, 0.33 if close and not attempt else 0.46)
        if row and not attempt:  # a row or a column
            across = float(rng.uniform(0.3, 0.7))
            line = [((int(i) + 0.5) / n, across) for i in rng.permutation(n)]
            places[:n] = line if rng.random() < 0.7 else [(y, x) for x, y in line]
        zipped = zip((*chosen, *around), looks, places, sizes, strict=True)
        items = [compose.Item(thing, *look, x, y, s) for thing, look, (x, y), s in zipped]
        items = [replace(i, depth=1e-6 * (k >= n)) for k, i in enumerate(items)]  # clutter behind
        scene = compose.render(rng, items, things=things, shape=shape, split=split)
        if all(p.visible >= compose.VISIBLE for p in scene.placed):
            break
    placed = tuple(replace(p, depth=0.0) for p in scene.placed)
    return replace(scene, placed=placed), placed[:n]


def _presence(
    rng: Rng, split: Split, things: Catalogue, scene: compose.Scene, asked: Sequence[compose.Placed]
) -> list[Turn]:
    """Is there a dog? One thing that is there or is not, half the time each."""
    if rng.random() < 0.5:
        return [present_turn(rng, pick(rng, asked).name, present=True)]
    absent = _absent(rng, split, things, scene.placed)
    if countable(absent) and rng.random() < 0.15:
        return [none_turn(rng, absent)]
    return [present_turn(rng, absent, present=False)]


def _absent(rng: Rng, split: Split, things: Catalogue, placed: Sequence[compose.Placed]) -> str:
    """The name of a thing that is neither placed nor likely in a photographed background."""
    while True:
        (thing,) = things.distinct(rng, split, 1, unlike=[p.thing for p in placed])
        if not groups().shows & {word for name in thing.accept for word in name.split()}:
            return thing.name


def _describe(rng: Rng, asked: Sequence[compose.Placed]) -> Turn:
    caption = captions(rng, asked)[0]
    words = (w for p in asked for w in (*p.thing.accept, plural(p.name)))
    accept = tuple(dict.fromkeys(words))
    return Turn(*en.say(rng, "describe", caption=caption), "describe", MEDIA, accept=accept)


def _colours(rng: Rng, asked: Sequence[compose.Placed]) -> list[Turn]:
    named = Counter(p.name for p in asked)
    two = [p for p in asked if p.colour and named[p.name] == 1]
    turns: list[Turn] = []
    if len(two) < 2:
        return turns
    a, b = (two[int(i)] for i in rng.permutation(len(two))[:2])
    alike = next(((p, q) for p in two for q in two if p is not q and p.colour == q.colour), None)
    if alike and rng.random() < 0.7:
        a, b = alike
    facts = {"a": a.name, "b": b.name, "colour_a": str(a.colour), "colour_b": str(b.colour)}
    facts |= {"is_a": agreement(a.name)["is"], "is_b": agreement(b.name)["is"]}
    same = a.colour == b.colour
    if same or alike or rng.random() < 0.3:
        because = (
            f"both are {a.colour}"
            if same
            else en.fill("the {a} {is_a} {colour_a} and the {b} {is_b} {colour_b}", **facts)
        )
        yes = "yes" if same else "no"
        question, reply = en.say(rng, "same colour", yes=yes, because=because, **facts)
        accept = (yes, *((because,) if not reply.lower().startswith(yes) else ()))
        turns.append(Turn(question, reply, "compare", MEDIA, ("yes", "no"), accept))
    elif rng.random() < 0.5:
        accept = en.accepted(str(a.colour))
        turns.append(Turn(*en.say(rng, "two colours", **facts), "colour", MEDIA, accept=accept))
    colour = str(a.colour)
    if sum(p.colour in (colour, None) for p in asked) == 1:
        facts = {"name": a.name, "colour": colour, **agreement(a.name)}
        texts = en.say(rng, "coloured thing", **facts)
        turns.append(Turn(*texts, "colour_name", MEDIA, accept=a.thing.accept))
    return turns


def name_turn(rng: Rng, thing: Thing, member: str = IMAGE, turn: str = "name") -> Turn:
    reply = en.answer(rng, turn, one=article(thing.name), **agreement(thing.name))
    return Turn(en.ask(rng, turn), reply, "name", (member,), accept=thing.accept)


def all_turn(rng: Rng, asked: Sequence[compose.Placed]) -> Turn:
    """What two things do you see? From left to right."""
    ordered = sorted(asked, key=lambda p: p.x)
    everything = listed([article(p.name) for p in ordered])
    number = f"{number_word(len(asked))} " if rng.random() < 0.5 else ""
    texts = en.say(rng, "all things", number=number, all=everything, **agreement(asked[0].name))
    return Turn(*texts, "list", MEDIA, accept=tuple(w for p in asked for w in p.thing.accept))


def count_turn(rng: Rng, noun: str | None, n: int) -> Turn:
    many = en.word(rng, "things") if noun is None else plural(noun)
    one = many.removesuffix("s") if noun is None else noun
    word, counted = number_word(n), one if n == 1 else many
    facts = {"many": many, "word": word, "counted": counted, "is": "is" if n == 1 else "are"}
    texts = en.say(rng, "count", **facts)
    return Turn(*texts, "count", MEDIA, counts(MOST), (word, str(n)))


def none_turn(rng: Rng, noun: str) -> Turn:
    """How many dogs are there, where there is none."""
    texts = en.say(rng, "none", many=plural(noun), name=noun, **agreement(noun))
    return Turn(*texts, "present", MEDIA, accept=("none", "zero", "no", "not"))


def colour_turn(rng: Rng, placed: compose.Placed, *, alone: bool) -> Turn:
    facts = {"name": placed.name, **agreement(placed.name)}
    only = alone and rng.random() < 0.3
    question = en.ask(rng, "colour of the only thing" if only else "colour", **facts)
    colour = str(placed.colour)
    spelled = "gray" if colour == "grey" and "color" in question else colour
    reply = en.answer(rng, "colour", colour=spelled, **facts)
    return Turn(question, reply, "colour", MEDIA, colours.COLOURS, en.accepted(colour))


def _larger(rng: Rng, asked: Sequence[compose.Placed]) -> list[Turn]:
    """Which of two things takes up clearly more of the picture?"""
    sizes = [(one, one.width * one.height) for one in asked]
    pairs = [(a, b) for a, large in sizes for b, small in sizes if large > LARGER * small]
    if not pairs:
        return []
    right, other = pick(rng, pairs)
    a, b = names = shuffled(rng, right.name, other.name)
    texts = en.say(rng, "larger", a=a, b=b, name=right.name, **agreement(right.name))
    return [Turn(*texts, "larger", MEDIA, names, right.thing.accept)]


def relation(a: compose.Placed, b: compose.Placed, axis: str) -> str:
    low, high = SIDES[axis]
    return low if getattr(a, axis) < getattr(b, axis) else high


def side_turn(rng: Rng, a: compose.Placed, b: compose.Placed, axis: str) -> Turn:
    side = relation(a, b, axis)
    sides = shuffled(rng, *SIDES[axis])
    where = [en.word(rng, f"where {s}") for s in sides]
    template = en.draw_question(rng, "side of")
    short = [en.word(rng, f"place {s}") for s in sides] if axis == "x" else sides
    facts = {"a": a.name, "b": b.name, "one": where[0], "two": where[1]}
    facts |= {"short_one": short[0], "short_two": short[1], **agreement(a.name)}
    reply = en.answer(rng, "side of", side=side, where=where[sides.index(side)], **facts)
    return Turn(en.fill(template, **facts), reply, "position", MEDIA, sides, en.accepted(side))


def which_side_turn(rng: Rng, a: compose.Placed, b: compose.Placed, axis: str) -> Turn:
    side = pick(rng, SIDES[axis])
    right = a if relation(a, b, axis) == side else b
    names = shuffled(rng, a.name, b.name)
    place = en.word(rng, f"place {side}")
    template = en.draw_question(rng, "which side")
    further = en.word(rng, f"further {side}")
    question = en.fill(template, place=place, further=further, a=names[0], b=names[1])
    reply = en.answer(rng, "which side", name=right.name, place=place, **agreement(right.name))
    return Turn(question, reply, "position", MEDIA, names, right.thing.accept)


def what_is_beside_turn(rng: Rng, a: compose.Placed, b: compose.Placed, axis: str) -> Turn:
    """What is to the left of the dog? The answer names a thing freely."""
    side = pick(rng, SIDES[axis])
    right, other = (a, b) if relation(a, b, axis) == side else (b, a)
    question = en.ask(rng, "what is beside", where=en.word(rng, f"where {side}"), other=other.name)
    place = en.word(rng, f"place {side}")
    facts = {"one": article(right.name), "place": place, **agreement(right.name)}
    reply = en.answer(rng, "what is beside", **facts)
    return Turn(question, reply, "position_name", MEDIA, accept=right.thing.accept)


def at_turn(rng: Rng, placed: compose.Placed, place: str) -> Turn:
    """What is on the left? The answer names a thing freely."""
    facts = {"one": article(placed.name), "place": en.word(rng, f"at {place}")}
    texts = en.say(rng, "what is at", **facts, **agreement(placed.name))
    return Turn(*texts, "position_name", MEDIA, accept=placed.thing.accept)


def where_turn(rng: Rng, placed: compose.Placed) -> Turn:
    """Where is the dog? At an edge or a corner of the picture, or in the middle."""
    offsets = {axis: getattr(placed, axis) - 0.5 for axis in EDGES}
    sides = {axis: EDGES[axis][int(by > 0)] for axis, by in offsets.items() if abs(by) > 0.13}
    if len(sides) == 2:
        where, accept = f"at the {sides['y']} {sides['x']}", en.accepted(sides["x"])
    else:
        side = next(iter(sides.values()), "middle")
        where, accept = en.word(rng, f"at {side}"), en.accepted(side)
    facts = {"name": placed.name, "where": where, **agreement(placed.name)}
    return Turn(*en.say(rng, "where", **facts), "position", MEDIA, accept=accept)


def half_turn(rng: Rng, a: compose.Placed, axis: str) -> Turn:
    """Where is the star, left or right? The thing must lie clearly in one half of the picture."""
    low, high = EDGES[axis]
    side = low if getattr(a, axis) < 0.5 else high
    one, two = shuffled(rng, low, high)
    facts = {"a": a.name, "one": one, "two": two, "side": side, **agreement(a.name)}
    texts = en.say(rng, f"half {axis}", **facts)
    return Turn(*texts, "position", MEDIA, (one, two), en.accepted(side))


def present_turn(rng: Rng, named: str, *, present: bool) -> Turn:
    facts = {"one": article(named), "name": named, **agreement(named)}
    texts = en.say(rng, "present" if present else "absent", **facts)
    return Turn(*texts, "present", MEDIA, ("yes", "no"), ("yes" if present else "no",))


def captions(rng: Rng, placed: Sequence[compose.Placed]) -> tuple[str, ...]:
    """True sentences about the scene, for pretraining: they name counts, colours and places."""
    groups = []
    for name in dict.fromkeys(p.name for p in placed):
        same = [p for p in placed if p.name == name]
        noun = same[0].phrase if len({p.colour for p in same}) == 1 else name
        many = f"{number_word(len(same))} {plural(noun)}"
        groups.append(many if same[1:] else article(noun))
    if len(placed) == 1:
        (one,), thing = placed, groups[0]
        out = [thing, f"a picture of {thing}"]
        if one.width < 0.6 and not 0.4 <= one.x <= 0.6:
            out.append(f"{thing} on the {'left' if one.x < 0.4 else 'right'}")
    elif len(groups) == 1:
        out = [groups[0], f"a picture of {groups[0]}", f"there are {groups[0]}"]
    elif len(placed) == 2:
        a, b = placed
        first, second = article(a.phrase), article(b.phrase)
        out = []
        for side in (relation(a, b, axis) for axis in _axes(a, b)):
            out.append(f"{first} {en.word(rng, f'where {side}')} {second}")
            out.append(f"{second} {en.word(rng, f'where {OPPOSITE[side]}')} {first}")
        at = {p: place for p, place in _places(placed) if place in EDGES["x"]}
        if len(at) == 2:
            out.append(f"{first} on the {at[a]} and {second} on the {at[b]}")
        out = out or [f"{first} and {second}", f"{second} and {first}"]
    else:
        placed_at = {one: f" {en.word(rng, f'at {place}')}" for one, place in _places(placed)}
        plain = listed(groups)
        if len(groups) < len(placed):
            out = [plain, f"{number_word(len(placed))} things: {plain}"]
        else:
            each = [article(p.phrase) + placed_at.get(p, "") for p in placed]
            out = [listed(each), listed(each), plain]
    return tuple(map(sentence, shuffled(rng, *out)))

"""Picture samples: one thing, several of a kind, two things side by side, a mixed scene.

The answers are balanced: a count, a colour, a side or yes and no is drawn evenly before the picture
is composed to make it true.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mico_training.world import colours
from mico_training.world import language as en
from mico_training.world.compose import SIDE, Item, Placed, Scene, dress, jpeg, layout, render
from mico_training.world.language import Rng
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue, Thing

IMAGE = "image.jpg"
MEDIA = (IMAGE,)
APART = 0.2  # least distance of two centres for a question about "left of" or "above"
SIDES = {"x": ("left", "right"), "y": ("above", "below")}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def canvas(rng: Rng) -> tuple[int, int]:
    shapes = ((SIDE, SIDE), (SIDE * 3 // 4, SIDE), (SIDE, SIDE * 3 // 4))
    return shapes[int(rng.choice(3, p=[0.76, 0.16, 0.08]))]


def truth_of(placed: Sequence[Placed]) -> list[dict[str, Any]]:
    numbers = ("x", "y", "width", "height", "depth")
    return [
        {"identity": p.thing.identity, "name": p.name, "colour": p.colour}
        | {key: round(getattr(p, key), 3) for key in numbers}
        for p in placed
    ]


def _sample(
    rng: Rng, split: Split, scene: Scene, turns: Sequence[Turn], concept: str | None = None
) -> Sample:
    files = {IMAGE: jpeg(rng, scene.pixels)}
    said = {IMAGE: captions(rng, scene.placed)}
    concepts = {IMAGE: concept} if concept else {}
    truth = {"things": truth_of(scene.placed)}
    return Sample("", split, files, said, tuple(turns), concepts, truth)


def make_single(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One thing, mostly large, anywhere: questions about its name, presence, colour and place."""
    thing = things.sample(rng, split)
    shape = canvas(rng)
    colour, rgba = dress(rng, thing, None, tint_share=0.25)
    size = float(rng.uniform(0.28, 0.6) if rng.random() < 0.4 else rng.uniform(0.6, 0.98))
    x, y = (float(v) for v in rng.uniform(size / 2, 1 - size / 2, 2))
    item = Item(thing, colour, rgba, x, y, size)
    scene = render(rng, [item], things=things, shape=shape)
    one = scene.placed[0]
    turns = [name_turn(rng, thing), _present(rng, split, things, scene)]
    if colour is not None and (thing.colour is None or rng.random() < 0.5):
        turns.append(colour_turn(rng, one, alone=True))
    turns += [half_turn(rng, one, a) for a in SIDES if abs(getattr(one, a) - 0.5) > 0.12]
    turns.append(_describe(rng, scene))
    return _sample(rng, split, scene, turns, concept=thing.name)


def make_colour(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to three things, each in a random colour, and questions about the colours."""
    n = int(rng.integers(1, 4))
    drawn = [str(c) for c in rng.choice(colours.COLOURS, n, replace=False)]
    scene = _scatter(rng, things, things.distinct(rng, split, n), drawn)
    turns = [colour_turn(rng, p, alone=n == 1) for p in scene.placed]
    asked = en.pick(rng, scene.placed)
    true = bool(rng.random() < 0.5)
    other = str(rng.choice([c for c in colours.COLOURS if c != asked.colour]))
    named = f"{asked.colour if true else other} {asked.name}"
    turns += [present_turn(rng, named, present=true), _describe(rng, scene)]
    return _sample(rng, split, scene, turns)


def make_count(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to four things of a kind, one time in three among one or two other things."""
    n = int(rng.integers(1, 5))
    drawn = (things.sample(rng, split) for _ in range(100))
    kind = next(thing for thing in drawn if en.countable(thing.name))
    distractors = int(rng.integers(1, 3)) if rng.random() < 0.33 else 0
    others = things.distinct(rng, split, distractors, unlike=[kind])
    same_look = rng.random() < 0.6
    pool = things.of_name(split, kind.name)
    kinds = [kind if same_look else en.pick(rng, pool) for _ in range(n)]
    one_colour = str(rng.choice(colours.COLOURS)) if rng.random() < 0.5 else None
    wanted = [one_colour if same_look else None] * n + [None] * distractors
    scene = _scatter(rng, things, [*kinds, *others], wanted, same_look=n if same_look else 0)
    turns = [count_turn(rng, kind.name, n)]
    if not distractors:
        turns.append(count_turn(rng, None, n))
    turns.append(_present(rng, split, things, scene))
    if n == 1 and one_colour and scene.placed[0].colour == one_colour:
        turns.append(colour_turn(rng, scene.placed[0], alone=not distractors))
    turns.append(_describe(rng, scene))
    return _sample(rng, split, scene, turns)


def make_pair(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """Two things clearly apart along one axis or both, and questions about their places."""
    two = things.distinct(rng, split, 2)
    axis = "x" if rng.random() < 0.5 else "y"
    shape = canvas(rng)
    looks = [dress(rng, t, None, tint_share=0.4) for t in two]
    sizes = rng.uniform(0.22, 0.44, 2)
    along, across = np.zeros(2), rng.uniform(sizes / 2, 1 - sizes / 2)
    while abs(along[0] - along[1]) < max(0.55 * sizes.sum(), 0.26):
        along = rng.uniform(sizes / 2, 1 - sizes / 2)
    if rng.random() < 0.5:  # side by side on one line; otherwise each anywhere across the axis
        across = rng.uniform(0.35, 0.65) + rng.uniform(-0.03, 0.03, 2)
    places = np.stack([along, across] if axis == "x" else [across, along], axis=1).tolist()
    zipped = zip(two, looks, places, sizes.tolist(), strict=True)
    items = [Item(thing, *look, x, y, size) for thing, look, (x, y), size in zipped]
    scene = render(rng, items, things=things, shape=shape)
    a, b = scene.placed
    makers = (side_turn, which_side_turn, what_is_at_turn)
    turns = [make(rng, a, b, axis) for axis in _axes(a, b) for make in makers]
    return _sample(rng, split, scene, [*turns, *_more(rng, split, things, scene)])


def make_scene(rng: Rng, split: Split, things: Catalogue) -> Sample:
    n = int(rng.integers(1, 5))
    scene = _scatter(rng, things, things.distinct(rng, split, n), [None] * n)
    turns = [count_turn(rng, None, n), *_more(rng, split, things, scene)]
    if n >= 2:
        a, b = (scene.placed[int(i)] for i in rng.permutation(n)[:2])
        turns += [side_turn(rng, a, b, axis) for axis in _axes(a, b)]
    return _sample(rng, split, scene, turns)


def _axes(a: Placed, b: Placed) -> list[str]:
    """The axes along which the centres are at least ``APART`` from each other."""
    return [axis for axis in SIDES if abs(getattr(a, axis) - getattr(b, axis)) >= APART]


def _scatter(
    rng: Rng,
    things: Catalogue,
    chosen: list[Thing],
    wanted: Sequence[str | None],
    same_look: int = 0,
) -> Scene:
    n = len(chosen)
    shape = canvas(rng)
    largest = {1: 0.8, 2: 0.48, 3: 0.42, 4: 0.38, 5: 0.34}.get(n, 0.3)
    base = float(rng.uniform(0.55 * largest, largest))
    sizes = [min(largest, base * float(rng.uniform(0.8, 1.2))) for _ in range(n)]
    items: list[Item] = []
    for i, (thing, colour) in enumerate(zip(chosen, wanted, strict=True)):
        alike = 0 < i < same_look
        look = (items[0].colour, items[0].rgba) if alike else dress(rng, thing, colour, 0.35)
        items.append(Item(thing, *look, 0.5, 0.5, sizes[i]))
    if rng.random() < 0.8 or n < 2:
        places = layout(rng, sizes)
    else:  # a row or a column
        across = float(rng.uniform(0.3, 0.7))
        places = [((int(i) + 0.5) / n, across) for i in rng.permutation(n)]
        places = places if rng.random() < 0.7 else [(y, x) for x, y in places]
    items = [replace(item, x=x, y=y) for item, (x, y) in zip(items, places, strict=True)]
    return render(rng, items, things=things, shape=shape)


def _present(rng: Rng, split: Split, things: Catalogue, scene: Scene) -> Turn:
    if rng.random() < 0.5:
        return present_turn(rng, en.pick(rng, scene.placed).name, present=True)
    absent = things.distinct(rng, split, 1, unlike=[p.thing for p in scene.placed])[0]
    return present_turn(rng, absent.name, present=False)


def _describe(rng: Rng, scene: Scene) -> Turn:
    caption = captions(rng, scene.placed)[0]
    words = (w for p in scene.placed for w in (*p.thing.accept, en.plural(p.name)))
    accept = tuple(dict.fromkeys(words))
    return Turn(*en.say(rng, "describe", caption=caption), "describe", MEDIA, accept=accept)


def _more(rng: Rng, split: Split, things: Catalogue, scene: Scene) -> list[Turn]:
    turns = [_present(rng, split, things, scene)]
    coloured = [p for p in scene.placed if p.colour and p.colour != p.thing.colour]
    if coloured:
        turns.append(colour_turn(rng, en.pick(rng, coloured), alone=len(scene.placed) == 1))
    one = en.pick(rng, scene.placed)
    for axis in SIDES:
        if abs(getattr(one, axis) - 0.5) > 0.15 and rng.random() < 0.5:
            turns.append(half_turn(rng, one, axis))
    turns.append(_describe(rng, scene))
    return turns


def name_turn(rng: Rng, thing: Thing, member: str = IMAGE, turn: str = "name") -> Turn:
    reply = en.answer(rng, turn, one=en.article(thing.name), **en.agreement(thing.name))
    return Turn(en.ask(rng, turn), reply, "name", (member,), accept=thing.accept)


def count_turn(rng: Rng, noun: str | None, n: int) -> Turn:
    many = en.word(rng, "things") if noun is None else en.plural(noun)
    one = many.removesuffix("s") if noun is None else noun
    word, counted = en.number_word(n), one if n == 1 else many
    facts = {"many": many, "word": word, "counted": counted, "is": "is" if n == 1 else "are"}
    texts = en.say(rng, "count", **facts)
    return Turn(*texts, "count", MEDIA, en.one_to_four(), (word, str(n)))


def colour_turn(rng: Rng, placed: Placed, *, alone: bool) -> Turn:
    facts = {"name": placed.name, **en.agreement(placed.name)}
    only = alone and rng.random() < 0.3
    question = en.ask(rng, "colour of the only thing" if only else "colour", **facts)
    colour = str(placed.colour)
    spelled = "gray" if colour == "grey" and "color" in question else colour
    reply = en.answer(rng, "colour", colour=spelled, **facts)
    return Turn(question, reply, "colour", MEDIA, colours.COLOURS, en.accepted(colour))


def relation(a: Placed, b: Placed, axis: str) -> str:
    low, high = SIDES[axis]
    return low if getattr(a, axis) < getattr(b, axis) else high


def side_turn(rng: Rng, a: Placed, b: Placed, axis: str) -> Turn:
    side = relation(a, b, axis)
    sides = en.shuffled(rng, *SIDES[axis])
    where = [en.word(rng, f"where {s}") for s in sides]
    template = en.draw_question(rng, "side of")
    short = [en.word(rng, f"place {s}") for s in sides] if axis == "x" else sides
    facts = {"a": a.name, "b": b.name, "one": where[0], "two": where[1]}
    facts |= {"short_one": short[0], "short_two": short[1], **en.agreement(a.name)}
    reply = en.answer(rng, "side of", side=side, where=where[sides.index(side)], **facts)
    return Turn(en.fill(template, **facts), reply, "position", MEDIA, sides, en.accepted(side))


def which_side_turn(rng: Rng, a: Placed, b: Placed, axis: str) -> Turn:
    side = en.pick(rng, SIDES[axis])
    right = a if relation(a, b, axis) == side else b
    names = en.shuffled(rng, a.name, b.name)
    place = en.word(rng, f"place {side}")
    template = en.draw_question(rng, "which side")
    further = en.word(rng, f"further {side}")
    question = en.fill(template, place=place, further=further, a=names[0], b=names[1])
    reply = en.answer(rng, "which side", name=right.name, place=place, **en.agreement(right.name))
    return Turn(question, reply, "position", MEDIA, names, right.thing.accept)


def what_is_at_turn(rng: Rng, a: Placed, b: Placed, axis: str) -> Turn:
    """What is on the left? What is to the left of the dog? The answer names a thing freely."""
    side = en.pick(rng, SIDES[axis])
    right, other = (a, b) if relation(a, b, axis) == side else (b, a)
    place = en.word(rng, f"place {side}")
    if rng.random() < 0.5:
        where = en.word(rng, f"where {side}")
        question = en.ask(rng, "what is beside", where=where, other=other.name)
    else:
        turn = "what is on the side" if axis == "x" else "what is above or below"
        question = en.ask(rng, turn, place=place)
    facts = {"one": en.article(right.name), "place": place, **en.agreement(right.name)}
    reply = en.answer(rng, "what is beside", **facts)
    return Turn(question, reply, "position_name", MEDIA, accept=right.thing.accept)


def half_turn(rng: Rng, a: Placed, axis: str) -> Turn:
    """Where is the star, left or right? The thing must lie clearly in one half of the picture."""
    low, high = SIDES["x"] if axis == "x" else ("top", "bottom")
    side = low if getattr(a, axis) < 0.5 else high
    one, two = en.shuffled(rng, low, high)
    facts = {"a": a.name, "one": one, "two": two, "side": side, **en.agreement(a.name)}
    texts = en.say(rng, f"half {axis}", **facts)
    return Turn(*texts, "position", MEDIA, (one, two), en.accepted(side))


def present_turn(rng: Rng, named: str, *, present: bool) -> Turn:
    yes, found = ("yes", en.article(named)) if present else ("no", f"no {named}")
    facts = {"one": en.article(named), "yes": yes, "found": found, **en.agreement(named)}
    return Turn(*en.say(rng, "present", **facts), "present", MEDIA, ("yes", "no"), (yes,))


def captions(rng: Rng, placed: Sequence[Placed]) -> tuple[str, ...]:
    """True sentences about the scene, for pretraining: they name counts, colours and places."""
    groups = []
    for name in dict.fromkeys(p.name for p in placed):
        same = [p for p in placed if p.name == name]
        noun = same[0].phrase if len({p.colour for p in same}) == 1 else name
        many = f"{en.number_word(len(same))} {en.plural(noun)}"
        groups.append(many if same[1:] else en.article(noun))
    if len(placed) == 1:
        (one,), thing = placed, groups[0]
        out = [thing, f"a picture of {thing}"]
        if one.width < 0.6 and not 0.4 <= one.x <= 0.6:
            out.append(f"{thing} on the {'left' if one.x < 0.4 else 'right'}")
    elif len(groups) == 1:
        out = [groups[0], f"a picture of {groups[0]}", f"there are {groups[0]}"]
    elif len(placed) == 2:
        a, b = placed
        first, second = en.article(a.phrase), en.article(b.phrase)
        out = []
        for side in (relation(a, b, axis) for axis in _axes(a, b)):
            out.append(f"{first} {en.word(rng, f'where {side}')} {second}")
            out.append(f"{second} {en.word(rng, f'where {OPPOSITE[side]}')} {first}")
        out = out or [f"{first} and {second}", f"{second} and {first}"]
    else:
        all_things = en.listed(groups)
        return en.sentence(all_things), en.sentence(
            f"{en.number_word(len(placed))} things: {all_things}"
        )
    return tuple(map(en.sentence, en.shuffled(rng, *out)))

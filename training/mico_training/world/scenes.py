"""Picture samples: one thing, several of a kind, two things side by side, a mixed scene.

Each ``make_*`` returns a whole sample whose answers are balanced: counts, colours, sides and
yes/no are drawn first, the picture follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mico_training.world import colours, phrases
from mico_training.world.compose import SIDE, Item, Placed, Scene, dress, jpeg, layout, render
from mico_training.world.nouns import countable, is_plural, plural
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue, Thing

Rng = np.random.Generator
IMAGE = "image.jpg"
APART = 0.2  # least distance of centres for which "left of" or "above" is asked


def canvas(rng: Rng) -> tuple[int, int]:
    """Height and width: mostly square, sometimes 4:3 or 3:4."""
    shapes = ((SIDE, SIDE), (SIDE * 3 // 4, SIDE), (SIDE, SIDE * 3 // 4))
    return shapes[int(rng.choice(3, p=[0.76, 0.16, 0.08]))]


def truth_of(scene_placed: Sequence[Placed]) -> list[dict[str, Any]]:
    """Name, colour, centre, extent (fractions of the picture) and depth of each thing."""
    return [
        {
            "identity": p.thing.identity,
            "name": p.name,
            "colour": p.colour,
            "x": round(p.x, 3),
            "y": round(p.y, 3),
            "width": round(p.width, 3),
            "height": round(p.height, 3),
            "depth": round(p.depth, 3),
        }
        for p in scene_placed
    ]


def _sample(
    rng: Rng, split: Split, scene: Scene, turns: Sequence[Turn], concept: str | None = None
) -> Sample:
    return Sample(
        id="",
        split=split,
        files={IMAGE: jpeg(rng, scene.pixels)},
        captions={IMAGE: phrases.captions(rng, scene.placed)},
        turns=tuple(turns),
        concepts={IMAGE: concept} if concept else {},
        truth={"things": truth_of(scene.placed)},
    )


def make_single(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One thing, mostly large, anywhere: naming, its colour, where it is, is it there."""
    thing = things.sample(rng, split)
    height, width = canvas(rng)
    colour, rgba = dress(rng, thing, None, tint_share=0.25)
    size = float(rng.uniform(0.28, 0.6) if rng.random() < 0.4 else rng.uniform(0.6, 0.98))
    x, y = (float(v) for v in rng.uniform(size / 2, 1 - size / 2, 2))
    scene = render(
        rng, [Item(thing, colour, rgba, x, y, size)], things=things, height=height, width=width
    )
    one = scene.placed[0]
    turns = [phrases.name_turn(rng, IMAGE, thing), _present(rng, split, things, scene)]
    if colour is not None and (thing.colour is None or rng.random() < 0.5):
        turns.append(phrases.colour_turn(rng, IMAGE, one, alone=True))
    for axis, centre in (("x", one.x), ("y", one.y)):
        if abs(centre - 0.5) > 0.12:
            turns.append(phrases.half_turn(rng, IMAGE, one, axis))
    turns.append(_describe(rng, scene))
    return _sample(rng, split, scene, turns, concept=thing.name)


def make_colour(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to three things, each in a colour drawn evenly: which colour?"""
    n = int(rng.integers(1, 4))
    drawn = [str(c) for c in rng.choice(colours.COLOURS, n, replace=False)]
    scene = _scatter(rng, things, things.distinct(rng, split, n), list(drawn))
    turns = [phrases.colour_turn(rng, IMAGE, p, alone=n == 1) for p in scene.placed]
    asked = scene.placed[int(rng.integers(n))]
    true = bool(rng.random() < 0.5)
    other = str(rng.choice([c for c in colours.COLOURS if c != asked.colour]))
    named = f"{asked.colour if true else other} {asked.name}"
    turns += [phrases.present_turn(rng, IMAGE, named, present=true), _describe(rng, scene)]
    return _sample(rng, split, scene, turns)


def make_count(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to four of a kind, evenly; a third of the time among one or two other things."""
    n = int(rng.integers(1, 5))
    kind = _countable(rng, split, things)
    distractors = int(rng.integers(1, 3)) if rng.random() < 0.33 else 0
    others = things.distinct(rng, split, distractors, unlike=[kind])
    same_look = rng.random() < 0.6
    pool = things.of_name(split, kind.name)
    kinds = [kind if same_look else pool[int(rng.integers(len(pool)))] for _ in range(n)]
    one_colour = str(rng.choice(colours.COLOURS)) if rng.random() < 0.5 else None
    wanted = [one_colour if same_look else None] * n + [None] * distractors
    scene = _scatter(rng, things, [*kinds, *others], wanted, same_look=n if same_look else 0)
    turns = [phrases.count_turn(rng, IMAGE, kind.name, n)]
    if not distractors:
        turns.append(phrases.count_turn(rng, IMAGE, None, n))
    turns.append(_present(rng, split, things, scene))
    if n == 1 and one_colour and scene.placed[0].colour == one_colour:
        turns.append(phrases.colour_turn(rng, IMAGE, scene.placed[0], alone=not distractors))
    turns.append(_describe(rng, scene))
    return _sample(rng, split, scene, turns)


def make_pair(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """Two things clearly apart along one axis or both: which is where?"""
    two = things.distinct(rng, split, 2)
    axis = "x" if rng.random() < 0.5 else "y"
    height, width = canvas(rng)
    looks = [dress(rng, t, None, tint_share=0.4) for t in two]
    sizes = [float(s) for s in rng.uniform(0.22, 0.48, 2)]
    low = sizes[0] / 2, 1 - sizes[1] / 2
    gap = max(0.55 * (sizes[0] + sizes[1]), 0.26)
    along_a = float(rng.uniform(low[0], max(low[0] + 0.01, low[1] - gap)))
    along_b = float(rng.uniform(min(along_a + gap, low[1] - 0.005), low[1]))
    if rng.random() < 0.5:  # level with each other, or anywhere across
        middle = float(rng.uniform(0.35, 0.65))
        across = [middle, middle + float(rng.uniform(-0.06, 0.06))]
    else:
        across = [float(rng.uniform(s / 2, 1 - s / 2)) for s in sizes]
    places = [(along_a, across[0]), (along_b, across[1])]
    if axis == "y":
        places = [(y, x) for x, y in places]
    items = [
        Item(t, c, r, x, y, s)
        for t, (c, r), (x, y), s in zip(two, looks, places, sizes, strict=True)
    ]
    order = [int(i) for i in rng.permutation(2)]
    scene = render(rng, items, things=things, height=height, width=width)
    a, b = (scene.placed[i] for i in order)
    turns: list[Turn] = []
    for each in ("x", "y"):
        if abs(a.x - b.x if each == "x" else a.y - b.y) >= APART:
            turns.append(phrases.side_turn(rng, IMAGE, a, b, each))
            turns.append(phrases.which_side_turn(rng, IMAGE, a, b, each))
            turns.append(phrases.what_is_at_turn(rng, IMAGE, a, b, each))
    turns += _more(rng, split, things, scene)
    return _sample(rng, split, scene, turns)


def make_scene(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """One to four different things anywhere, and a few questions of every kind."""
    n = int(rng.integers(1, 5))
    scene = _scatter(rng, things, things.distinct(rng, split, n), [None] * n)
    turns = [phrases.count_turn(rng, IMAGE, None, n), *_more(rng, split, things, scene)]
    if n >= 2:
        a, b = (scene.placed[int(i)] for i in rng.permutation(n)[:2])
        for axis in ("x", "y"):
            if abs(a.x - b.x if axis == "x" else a.y - b.y) >= APART:
                turns.append(phrases.side_turn(rng, IMAGE, a, b, axis))
    return _sample(rng, split, scene, turns)


def _scatter(
    rng: Rng,
    things: Catalogue,
    chosen: Sequence[Thing],
    wanted: Sequence[str | None],
    *,
    same_look: int = 0,
) -> Scene:
    """The things anywhere without much overlap; the first ``same_look`` dressed alike."""
    n = len(chosen)
    height, width = canvas(rng)
    largest = {1: 0.8, 2: 0.48, 3: 0.42, 4: 0.38, 5: 0.34}.get(n, 0.3)
    base = float(rng.uniform(0.55 * largest, largest))
    sizes = [min(largest, base * float(rng.uniform(0.8, 1.2))) for _ in range(n)]
    items: list[Item] = []
    for i, (thing, colour) in enumerate(zip(chosen, wanted, strict=True)):
        if 0 < i < same_look:
            look = items[0].colour, items[0].rgba
        else:
            look = dress(rng, thing, colour, tint_share=0.35)
        items.append(Item(thing, look[0], look[1], 0.5, 0.5, sizes[i]))
    places = layout(rng, sizes) if rng.random() < 0.8 or n < 2 else _in_a_row(rng, sizes)
    items = [
        Item(i.thing, i.colour, i.rgba, x, y, i.size)
        for i, (x, y) in zip(items, places, strict=True)
    ]
    return render(rng, items, things=things, height=height, width=width)


def _in_a_row(rng: Rng, sizes: Sequence[float]) -> list[tuple[float, float]]:
    """Side by side or one above the other, evenly spaced, in a drawn order."""
    n = len(sizes)
    across = float(rng.uniform(0.3, 0.7))
    spots = [((int(i) + 0.5) / n, across) for i in rng.permutation(n)]
    return spots if rng.random() < 0.7 else [(y, x) for x, y in spots]


def _countable(rng: Rng, split: Split, things: Catalogue) -> Thing:
    """A thing of which one can say "three"."""
    for _ in range(100):
        thing = things.sample(rng, split)
        if countable(thing.name) and not is_plural(thing.name):
            return thing
    raise ValueError(f"split {split!r} has no countable thing")


def _present(rng: Rng, split: Split, things: Catalogue, scene: Scene) -> Turn:
    """A yes/no question, half the time of a thing that is not there."""
    if rng.random() < 0.5:
        placed = scene.placed[int(rng.integers(len(scene.placed)))]
        return phrases.present_turn(rng, IMAGE, placed.name, present=True)
    absent = things.distinct(rng, split, 1, unlike=[p.thing for p in scene.placed])[0]
    return phrases.present_turn(rng, IMAGE, absent.name, present=False)


def _describe(rng: Rng, scene: Scene) -> Turn:
    caption = phrases.captions(rng, scene.placed)[0]
    words = [w for p in scene.placed for w in (*p.thing.accept, plural(p.name))]
    accept = tuple(dict.fromkeys(words))
    return phrases.describe_turn(rng, IMAGE, caption, accept)


def _more(rng: Rng, split: Split, things: Catalogue, scene: Scene) -> list[Turn]:
    """Turns that fit any scene: presence, colour, half of the picture, description."""
    turns = [_present(rng, split, things, scene)]
    coloured = [p for p in scene.placed if p.colour and p.colour != p.thing.colour]
    if coloured:
        asked = coloured[int(rng.integers(len(coloured)))]
        turns.append(phrases.colour_turn(rng, IMAGE, asked, alone=len(scene.placed) == 1))
    one = scene.placed[int(rng.integers(len(scene.placed)))]
    for axis, centre in (("x", one.x), ("y", one.y)):
        if abs(centre - 0.5) > 0.15 and rng.random() < 0.5:
            turns.append(phrases.half_turn(rng, IMAGE, one, axis))
    turns.append(_describe(rng, scene))
    return turns

"""The things of a view as its truth tells them, and captions made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mico_training.world import nouns
from mico_training.world.nouns import article, plural
from mico_training.world.sample import kind_of

NEARER_BY = 1.12  # the farther of two things is at least this times as far, or no one is asked
KIND_WORDS = {"depth": "depth map", "normal": "normal map", "image": "picture"}
SIDES = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}


@dataclass(frozen=True)
class Thing:
    """One visible thing: ``x`` and ``y`` of its visible centre in [0, 1] from the top left, depths
    in metres (``near``: its nearest visible point, ``depth``: the median), visible pixels."""

    name: str
    colour: str | None
    x: float
    y: float
    near: float
    depth: float
    pixels: int


def clearly_nearer(a: Thing, b: Thing) -> bool:
    """Whether ``a`` is nearer by the nearest point and by the median, both by the margin."""
    return a.near * NEARER_BY <= b.near and a.depth * NEARER_BY <= b.depth


def listing(names: Sequence[str]) -> str:
    """ "a chair, a lamp and a box"; two of a name become "two chairs"."""
    if len(names) > 1 and len(set(names)) == 1:
        return f"{nouns.NUMBER_WORDS[len(names)]} {plural(names[0])}"
    words = [article(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def depth_ends(things: Sequence[Thing]) -> tuple[Thing, Thing] | None:
    """The nearest and the farthest thing, when the order of all in depth is clear."""
    by_depth = sorted(things, key=lambda thing: thing.near)
    clear = len(by_depth) > 1 and all(clearly_nearer(a, b) for a, b in pairwise(by_depth))
    return (by_depth[0], by_depth[-1]) if clear else None


def captions(
    rng: np.random.Generator, things: Sequence[Thing], members: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Two sentences for each member; a depth map's say what is nearer, where that is clear."""
    names = [thing.name for thing in things]
    plain = listing(names)
    unique = len(set(names)) == len(names)
    ends = depth_ends(things)
    found: dict[str, tuple[str, ...]] = {}
    for member in members:
        kind = kind_of(member)
        sentences = [f"a {KIND_WORDS[kind]} of {plain}", plain]
        if kind == "image" and unique:
            hued = [
                f"{thing.colour} {thing.name}" if thing.colour else thing.name for thing in things
            ]
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

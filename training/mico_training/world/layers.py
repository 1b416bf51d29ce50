"""Composed scenes with depth: each thing at a distance, before a wall or on a ground plane.

In half of the scenes a nearer thing is larger and lower, as perspective makes it. In the others
size and place tell nothing, so that depth must be read from the depth map.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from mico_training.world import compose
from mico_training.world import language as en
from mico_training.world.compose import Item, Placed, Scene, depth_png, dress, jpeg, render
from mico_training.world.language import Rng
from mico_training.world.pictures import IMAGE, OPPOSITE, captions, truth_of
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue

DepthMap = NDArray[np.float32]
DEPTH, NORMAL = "depth.png", "normal.png"
_RATIO = 1.25  # the farther of two things is at least this much farther away


def make_layers(rng: Rng, split: Split, things: Catalogue) -> Sample:
    n = 2 if rng.random() < 0.8 else 3
    chosen = things.distinct(rng, split, n)
    near = float(rng.uniform(0.6, 3.0))
    depths = [near * float(rng.uniform(_RATIO, 1.8)) ** i for i in range(n)]
    depths = [depths[int(i)] for i in rng.permutation(n)]
    wall = max(depths) * float(rng.uniform(1.15, 2.0))
    perspective = rng.random() < 0.5
    ground = rng.random() < 0.6
    slots = [(int(i) + 0.5) / n for i in rng.permutation(n)]
    items = []
    for thing, depth, slot in zip(chosen, depths, slots, strict=True):
        colour, rgba = dress(rng, thing, None, tint_share=0.3)
        size = float(rng.uniform(0.26, 0.46) if n == 2 else rng.uniform(0.22, 0.32))
        x, y = slot + float(rng.uniform(-0.05, 0.05)), float(rng.uniform(size / 2, 1 - size / 2))
        if perspective:
            size = float(np.clip(0.5 * near / depth * rng.uniform(0.9, 1.1), 0.16, 0.5))
            y = 0.5 + 0.42 * near / depth - size / 2 + 0.05
        items.append(Item(thing, colour, rgba, x, y, size, depth))
    scene = render(rng, items, things=things)
    horizon = 0.55 if perspective else float(rng.uniform(0.35, 0.6))
    height = 0.42 * near if perspective else near * float(rng.uniform(0.2, 0.5))
    depth_map = depth_of(scene.placed, wall, (horizon, height) if ground else None)
    spotted = depth_map
    if rng.random() >= 0.5:  # a sensor's faults: noise that grows with distance, and holes (0)
        spotted = depth_map * (1 + rng.normal(0, 0.004, depth_map.shape).astype(np.float32))
        holes = rng.random(tuple(s // 8 for s in spotted.shape)) < float(rng.uniform(0, 0.03))
        spotted[np.kron(holes, np.ones((8, 8), bool))] = 0.0
    a, b = (scene.placed[int(i)] for i in rng.permutation(n)[:2])
    turns = [nearer_turn(rng, (IMAGE, DEPTH), a, b)]
    if rng.random() < 0.5:
        turns.append(nearer_turn(rng, (IMAGE, DEPTH), b, a))
    if n == 2:
        turns.append(nearer_turn(rng, (DEPTH,), a, b, by_side=True))
        turns.append(than_turn(rng, (DEPTH,) if rng.random() < 0.7 else (IMAGE, DEPTH), a, b))
    named = " and ".join(en.article(p.phrase) for p in scene.placed)
    files = {
        IMAGE: jpeg(rng, scene.pixels),
        DEPTH: depth_png(spotted, compress_level=1),
        NORMAL: compose.encoded(normals_of(depth_map), "PNG", compress_level=1),
    }
    said = {
        IMAGE: captions(rng, scene.placed),
        DEPTH: _depth_captions(scene),
        NORMAL: (en.sentence(f"the surfaces of {named}"),),
    }
    truth = {"things": truth_of(scene.placed), "wall": round(wall, 3)}
    return Sample("", split, files, said, tuple(turns), truth=truth)


def _depth_captions(scene: Scene) -> tuple[str, ...]:
    closest = min(scene.placed, key=lambda p: p.depth)
    named = " and ".join(en.article(p.name) for p in scene.placed)
    out = [f"{named}; the {closest.name} {en.agreement(closest.name)['is']} nearest"]
    if len(scene.placed) == 2:
        side = "left" if closest.x == min(p.x for p in scene.placed) else "right"
        out.insert(0, f"the thing on the {side} is nearer than the one on the {OPPOSITE[side]}")
    return tuple(map(en.sentence, out))


def depth_of(placed: Sequence[Placed], wall: float, ground: tuple[float, float] | None) -> DepthMap:
    """The depth map (H, W) in metres of slightly bulging things before a wall.

    ``ground`` adds a ground plane below the horizon, its first number (a fraction of the height).
    At a row d below the horizon (again a fraction) the plane is ``ground[1] / d`` metres away.
    """
    height, width = placed[0].mask.shape
    depth = np.full((height, width), wall, np.float32)
    if ground is not None:
        below = np.arange(height, dtype=np.float32)[:, None] / height - ground[0]
        floor = np.where(below > 0, ground[1] / np.maximum(below, 1e-3), np.inf)
        depth = np.minimum(depth, np.maximum(floor, 0.3)).astype(np.float32)
    for one in sorted(placed, key=lambda p: -p.depth):
        soft = Image.fromarray(one.mask).convert("L").filter(ImageFilter.BoxBlur(6))
        bulge = np.asarray(soft, dtype=np.float32)[one.mask] / 255.0 - 0.5
        depth[one.mask] = one.depth * (1.0 - 0.08 * bulge)
    return depth


def normals_of(depth: DepthMap) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 normals of a depth map seen by a camera of 60 degrees."""
    height, width = depth.shape
    step = 2 * np.tan(np.radians(30.0)) / max(height, width) * depth  # metres a pixel
    down, right = np.gradient(depth)
    # The limits are for outlines: the jump of depth there is no slope of a surface.
    nx, ny = (np.clip(rise / step, -4.0, 4.0) for rise in (right, -down))
    normal = np.stack([nx, ny, np.ones_like(depth)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return np.round((normal + 1) * 127.5).astype(np.uint8)


def nearer_turn(
    rng: Rng, media: tuple[str, ...], a: Placed, b: Placed, *, by_side: bool = False
) -> Turn:
    """Which is nearer (or farther away), the dog or the cat? With ``by_side`` the question is about
    the left and the right thing, so that the depth map alone answers it."""
    nearer = bool(rng.random() < 0.65)
    asked = en.word(rng, "nearer" if nearer else "farther")
    right = a if (a.depth < b.depth) == nearer else b
    name, accept, options = right.name, right.thing.accept, (a.name, b.name)
    if by_side:
        name, options = "left" if right.x == min(a.x, b.x) else "right", ("left", "right")
        accept = (name,)
    one, two = en.shuffled(rng, *options)
    facts = {"nearer": asked, "to": "to" if nearer else "from", "a": one, "b": two, "name": name}
    facts |= en.agreement(right.name)
    sort = "nearer side" if by_side else "nearer thing"
    return Turn(*en.say(rng, sort, **facts), "nearer", media, (one, two), accept)


def than_turn(rng: Rng, media: tuple[str, ...], a: Placed, b: Placed) -> Turn:
    side = en.pick(rng, ("left", "right"))
    left, right = (a, b) if a.x < b.x else (b, a)
    near = left.depth < right.depth if side == "left" else right.depth < left.depth
    words = en.word(rng, "nearer"), en.word(rng, "farther than")
    one, two = en.shuffled(rng, *words)
    facts = {"side": side, "other": OPPOSITE[side], "one": one, "two": two}
    facts["word"] = words[0 if near else 1]
    texts = en.say(rng, "nearer or farther than", **facts)
    return Turn(*texts, "nearer", media, (one, two), en.accepted("nearer" if near else "farther"))

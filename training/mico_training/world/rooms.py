"""Rooms: 1 to 4 things before a camera, with exact depth, normals and questions about them.

Two in three views are ray-cast: furniture models or plain solids on a floor before a wall. The
others are layered: floating shapes before a background. Depth ranges from 0.4 to 12 m and may
have holes, sensor noise or few levels, since depth maps of other makers have them too. The truth
is taken from the clean pixels; views with hidden, tiny or equally near things are drawn again.
"""

from __future__ import annotations

import io
from dataclasses import asdict
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_training.world import colours, raycast
from mico_training.world.raycast import Floats
from mico_training.world.room_scenes import Scene, layered_scene, room_scene
from mico_training.world.room_things import Thing, captions, clearly_nearer
from mico_training.world.room_turns import Asker
from mico_training.world.sample import Sample, Split

LAYERED_SHARE = 0.35
MODEL_SHARE = 0.75  # of the ray-cast views; the others hold solids
_COUNTS = (0.24, 0.42, 0.21, 0.13)  # shares of views with 1, 2, 3, 4 things


def make(rng: np.random.Generator, split: Split, *, use_models: bool = True) -> Sample:
    """One sample of ``split``. Without ``use_models`` no package is needed: solids and layers only.

    Raises RuntimeError when 200 drawn views in a row are unfit, which is a defect.
    """
    layered = rng.random() < LAYERED_SHARE
    modelled = use_models and rng.random() < MODEL_SHARE
    count = int(rng.choice(4, p=_COUNTS)) + 1
    for _ in range(200):
        scene = (
            layered_scene(rng, split, count) if layered else room_scene(rng, split, count, modelled)
        )
        things = visible_things(scene) if scene is not None else None
        if scene is not None and things is not None:
            return _sample(rng, split, scene, things, layered)
    raise RuntimeError(f"no fit view of {count} things in 200 draws, layered: {layered}")


def visible_things(scene: Scene) -> list[Thing] | None:
    """The scene's things from left to right, or None when one is hidden, tiny, or no depth order
    of two neighbours in depth is clear."""
    things: list[Thing] = []
    size = len(scene.depth)
    for index, name in enumerate(scene.names):
        seen = scene.owner == index
        pixels = int(seen.sum())
        if pixels < 0.012 * size * size or pixels > 0.6 * size * size:
            return None
        rows, columns = np.nonzero(seen)
        depths = scene.depth[seen]
        if depths.min() <= 0:  # beyond the sensor's reach
            return None
        things.append(
            Thing(
                name=name,
                colour=_colour_of(scene.albedo[seen]),
                x=float(columns.mean() + 0.5) / size,
                y=float(rows.mean() + 0.5) / size,
                near=float(np.quantile(depths, 0.03)),
                depth=float(np.median(depths)),
                pixels=pixels,
            )
        )
    things.sort(key=lambda thing: thing.x)
    if any(b.x - a.x < 0.1 for a, b in pairwise(things)):
        return None
    by_depth = sorted(things, key=lambda thing: thing.near)
    clear = all(clearly_nearer(a, b) for a, b in pairwise(by_depth))
    return things if clear else None


def _colour_of(albedo: NDArray[np.uint8]) -> str | None:
    """The colour that at least four in five of the pixels (N, 3) have, or None."""
    share = colours.shares(albedo)
    best = max(share, key=lambda name: share[name])
    return best if share[best] >= 0.8 else None


def _sample(
    rng: np.random.Generator, split: Split, scene: Scene, things: list[Thing], layered: bool
) -> Sample:
    files: dict[str, bytes] = {}
    keep = rng.random(3)
    if keep[0] < 0.75:
        files["image.jpg"] = _encoded(Image.fromarray(scene.rgb), "JPEG")
    depth, spoilt = _spoilt(rng, scene.depth)
    if keep[1] < 0.93 or not files:
        millimetres = np.clip(np.rint(depth * 1000), 0, 65535).astype(np.uint16)
        files["depth.png"] = _encoded(Image.fromarray(millimetres), "PNG")
    if scene.curved and keep[2] < 0.5:
        picture = raycast.normal_picture(scene.normal)
        files["normal.png"] = _encoded(Image.fromarray(picture), "PNG")
    asker = Asker(rng, things, list(files), floor=scene.floor, named=not layered)
    turns = asker.ask()
    concepts = dict.fromkeys(files, things[0].name) if len(things) == 1 and not layered else {}
    return Sample(
        id=f"room-{int(rng.integers(2**62)):016x}",
        split=split,
        files=files,
        captions=captions(rng, things, list(files)),
        turns=turns,
        concepts=concepts,
        truth={
            "things": [asdict(thing) for thing in things],
            "layered": layered,
            "field_of_view": round(float(np.degrees(2 * np.arctan(scene.tan_half))), 1),
            "spoilt": spoilt,
        },
    )


def _spoilt(rng: np.random.Generator, depth: Floats) -> tuple[Floats, list[str]]:
    """Depth as real makers give it: noise, few levels, holes; and the words for what was done."""
    done: list[str] = []
    depth = depth.copy()
    seen = depth > 0
    if rng.random() < 0.2:
        noise = rng.normal(size=depth.shape) * rng.uniform(0.002, 0.012)
        depth[seen] *= (1 + noise[seen]).astype(np.float32)
        done.append("noise")
    if rng.random() < 0.2 and seen.any():
        low, high = float(depth[seen].min()) * 0.9, float(depth[seen].max())
        depth[seen] = low + np.rint((depth[seen] - low) / (high - low) * 255) / 255 * (high - low)
        done.append("256 levels")
    if rng.random() < 0.2:
        edges = np.abs(np.gradient(depth)).max(axis=0) > 0.04 * depth
        depth[(rng.random(depth.shape) < 0.02) | (edges & (rng.random(depth.shape) < 0.6))] = 0
        done.append("holes")
    return depth, done


def _encoded(picture: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 92} if form == "JPEG" else {"compress_level": 4}
    picture.save(buffer, form, **options)
    return buffer.getvalue()

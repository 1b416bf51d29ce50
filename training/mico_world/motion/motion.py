"""Video samples: things that move over a photograph or stand still, before a camera that may move.

Each way is equally likely. A single frame does not tell the way: the place of a path does not
depend on its direction. Legend: T frames.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mico_training.data.language.english import Rng, pick
from mico_training.data.sources.written import Sample, Split
from mico_world.motion.paths import MOVES, STEP, WAYS, Path, Track, camera_path, path_of, shaken
from mico_world.motion.turns import VIDEO, captions, turns_of
from mico_world.pictures import compose
from mico_world.things.catalogue import Catalogue, Thing
from mico_world.things.photographs import Photographs

Pixels = NDArray[np.uint8]
_SIDES = (320, 352, 384, 448)
_MOST_FRAMES = 40
_CROP, _CROP_SHARE = "picture", 0.08  # the name of a piece of a photograph
_CROPS: dict[Split, str] = {"train": "crop/1", "validation": "crop/25"}  # as split_of has it
_HIDDEN, _OVERLAP = 0.45, 0.12
"""On average, at most so much of a thing is outside of the picture, or behind another thing."""


def _track(rng: Rng, thing: Thing, way: str, camera: Path, follows: bool, rivals: int) -> Track:
    colour, rgba = compose.dress(rng, thing, None, tint_share=0.0 if thing.name == _CROP else 0.25)
    size = float(rng.uniform(0.14, 0.5 if rivals else 0.6))
    if way in ("nearer", "away"):
        size = min(size, 0.4)
    reach = 1.35 if rng.random() < 0.2 else 1.0  # a reach above 1 may leave the picture
    travel = float(rng.uniform(0.25, 0.95)) * max(0.4, reach - size)
    path = path_of(rng, way, len(camera.x), size, travel, float(rng.uniform(1.5, 3.0)))
    if follows:
        share = float(rng.uniform(0.75, 1.05))
        x, y = (share * (line - 0.5) + rng.uniform(0.35, 0.65) for line in (camera.x, camera.y))
        path = replace(path, x=x, y=y)
    return Track(thing, colour, compose.turned(rng, rgba, compose.SIDE), way, path.seen_by(camera))


def _fault(tracks: Sequence[Track], shape: tuple[int, int]) -> float:
    """How far the tracks are from a clip in which each thing can be seen; 0 is good."""
    boxes = np.stack([track.boxes(shape) for track in tracks])
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    area = boxes[..., 2:].prod(-1)
    inside = (np.minimum(high, 1) - np.maximum(low, 0)).clip(0).prod(-1) / area
    fault = float((1 - inside.mean(1) - _HIDDEN).clip(0).sum())
    fault += float((0.7 - inside[:, inside.shape[1] // 2]).clip(0).sum())
    for i in range(len(boxes)):
        for j in range(i):
            shared = np.minimum(high[i], high[j]) - np.maximum(low[i], low[j])
            hidden = shared.clip(0).prod(-1) / np.minimum(area[i], area[j])
            fault += max(0.0, float(hidden.mean()) - _OVERLAP)
    return fault


def _crop(rng: Rng, split: Split, photographs: Photographs) -> Thing:
    height, width = (int(n) for n in rng.integers(compose.SIDE // 3, compose.SIDE, 2))
    image = photographs.view(rng, split, "scene", (height, width))
    if rng.random() < 0.5:
        alpha = Image.new("L", image.size)
        ImageDraw.Draw(alpha).ellipse((0, 0, width - 1, height - 1), fill=255)
        image.putalpha(alpha)
    rgba = np.asarray(image.convert("RGBA"))
    return Thing(_CROPS[split], _CROP, ("photograph", "photo", "image"), None, lambda: rgba)


def frames_of(
    tracks: Sequence[Track], camera: Path, canvas: Pixels, shape: tuple[int, int]
) -> Pixels:
    """The frames (T, H, W, 3). ``canvas`` is all that the camera sees in the whole clip."""
    height, width = shape
    world = Image.fromarray(canvas)
    left, top = (camera.x - camera.size / 2).min(), (camera.y - camera.size / 2).min()
    right, low = (camera.x + camera.size / 2).max(), (camera.y + camera.size / 2).max()
    scale_x, scale_y = canvas.shape[1] / (right - left), canvas.shape[0] / (low - top)
    placed = [track.boxes(shape) * (width, height, width, height) for track in tracks]
    frames = np.empty((len(camera.x), height, width, 3), np.uint8)
    view: tuple[float, ...] = ()
    for t in range(len(frames)):
        half, x, y = camera.size[t] / 2, camera.x[t] - left, camera.y[t] - top
        box = (x - half) * scale_x, (y - half) * scale_y, (x + half) * scale_x, (y + half) * scale_y
        if box != view:
            view, limits = box, (*world.size, *world.size)
            inside = tuple(min(max(v, 0.0), n) for v, n in zip(box, limits, strict=True))
            seen = world.resize((width, height), Image.Resampling.BILINEAR, inside, 2.0)
        frame = seen.copy()
        for track, boxes in zip(tracks, placed, strict=True):
            cx, cy, w, h = boxes[t]
            size = max(2, round(w)), max(2, round(h))
            image = track.image.resize(size, Image.Resampling.BILINEAR)
            frame.paste(image, (round(cx - size[0] / 2), round(cy - size[1] / 2)), image)
        frames[t] = np.asarray(frame)
    return frames


def _worn(rng: Rng, frames: Pixels) -> Pixels:
    """Some clips have noise or a brightness that flickers or changes."""
    n = len(frames)
    if rng.random() < 0.25:
        gains = (
            1 + np.cumsum(rng.normal(0, 0.012, n)) + rng.normal(0, float(rng.uniform(0, 0.04)), n)
        )
        steps = np.arange(256)
        for frame, gain in zip(frames, gains, strict=True):
            frame[:] = np.clip(steps * gain, 0, 255).astype(np.uint8)[frame]
    if rng.random() < 0.25:
        height, width = frames.shape[1:3]
        strength = float(rng.uniform(2, 9))
        grain = rng.normal(0, strength, (height + 64, width + 64, 1)).astype(np.int16)
        for frame, (y, x) in zip(frames, rng.integers(64, size=(n, 2)), strict=True):
            frame[:] = np.clip(frame + grain[y : y + height, x : x + width], 0, 255)
    return frames


def encode_video(frames: Pixels, fps: int, crf: int = 23) -> bytes:
    """(T, H, W, 3) uint8 -> MP4 (H.264, one thread: equal input gives equal bytes).

    ``crf`` is x264's constant rate factor: 23 is good, 40 has visible blocks.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": str(crf), "threads": "1"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _length(rng: Rng) -> tuple[int, int]:
    """Frames, and frames a second: 0.5 to 8 s at 2 to 30 a second."""
    while True:
        fps = round(2 * 15 ** float(rng.random()))
        n = round(fps * 0.5 * 16 ** float(rng.random()))
        if 4 <= n <= _MOST_FRAMES:
            return n, fps


def _cast(rng: Rng) -> tuple[str, tuple[str, ...], bool]:
    """The camera's way, the things' ways, and whether the camera follows the first thing."""
    if rng.random() < 0.6:
        n = int(rng.choice([1, 2, 3], p=[0.5, 0.33, 0.17]))
        others = (pick(rng, MOVES) if rng.random() < 0.5 else "still" for _ in range(n - 1))
        return "still", (pick(rng, WAYS), *others), False
    camera = pick(rng, MOVES)
    if rng.random() < 0.25 and camera in STEP:
        return camera, (camera,), True
    n = int(rng.choice([0, 1, 2], p=[0.3, 0.45, 0.25]))
    ways = (pick(rng, MOVES) if rng.random() < 0.35 else "still" for _ in range(n))
    return camera, tuple(ways), False


def make_motion(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """A clip of up to three things that go different ways, before a camera that stands or moves."""
    n, fps = _length(rng)
    way, ways, follows = _cast(rng)
    side = int(rng.choice(_SIDES))
    shape = [(side, side), (side * 3 // 8 * 2, side), (side, side * 3 // 8 * 2)][
        int(rng.choice(3, p=[0.5, 0.4, 0.1]))
    ]
    # A slow shutter sees two of every three moments.
    blurred = n <= 20 and rng.random() < 0.15
    moments = 3 * n if blurred else n
    steady = camera_path(rng, way, moments)
    camera = shaken(rng, steady) if rng.random() < 0.3 and not blurred else steady
    chosen = things.distinct(rng, split, len(ways))
    photographs = things.photographs
    if chosen and photographs and rng.random() < _CROP_SHARE:
        chosen[0] = _crop(rng, split, photographs)
    tracks: list[Track] = []
    fault = np.inf
    for _ in range(25 if chosen else 0):
        pairs = zip(chosen, ways, strict=True)
        drawn = [_track(rng, t, w, camera, follows, len(ways) - 1) for t, w in pairs]
        if (found := _fault(drawn, shape)) < fault:
            tracks, fault = drawn, found
        if fault == 0:
            break
    span = [np.ptp([p - camera.size / 2, p + camera.size / 2]) for p in (camera.y, camera.x)]
    whole = round(shape[0] * span[0]), round(shape[1] * span[1])
    items = [compose.Item(t.thing, t.colour, np.asarray(t.image), 0, 0, 0) for t in tracks]
    if way == "still":
        canvas = compose.background_for(rng, whole, things, items, split=split)
    elif photographs:
        canvas = compose.photographic(rng, whole, photographs, split)
    else:  # a plain background would not show that the camera moves
        canvas = compose.background(rng, whole, [], "noise")
    frames = frames_of(tracks, camera, canvas, shape)
    if blurred:
        frames = (frames[::3] // 2 + frames[1::3] // 2).astype(np.uint8)
    crf = int(rng.integers(18, 30) if rng.random() < 0.7 else rng.integers(30, 43))
    files = {VIDEO: encode_video(_worn(rng, frames), fps, crf)}
    said = {VIDEO: captions(rng, tracks, way)}
    truth = [_truth(track, shape) for track in tracks]
    facts = {"fps": fps, "frames": n, "camera": way, "things": truth}
    concepts = {VIDEO: chosen[0].name} if len(chosen) == 1 else {}
    turns = turns_of(rng, split, things, tracks, way)
    return Sample("", split, files, said, tuple(turns), concepts, facts)


def _truth(track: Track, shape: tuple[int, int]) -> dict[str, Any]:
    """A thing's facts: where it is in the middle of the clip, at its start and at its end."""
    boxes = track.boxes(shape).round(3).tolist()
    middle = boxes[len(boxes) // 2]
    named = {"identity": track.thing.identity, "name": track.thing.name, "colour": track.colour}
    placed = dict(zip(("x", "y", "width", "height"), middle, strict=True))
    return {**named, "way": track.way, **placed, "start": boxes[0], "end": boxes[-1]}

"""Video samples: things that move over a photograph or stand still, before a camera that may move.

Each way is equally likely. A single frame does not tell the way: the place of a path does not
depend on its direction. Things and the camera move in the world; a thing's place in a frame is its
place in the world seen by the camera. So "the dog moves left" is about the dog and what is behind
it, also when the camera follows the dog.

Places and sizes are fractions of the picture: x to the right, y down, a thing's size (its longest
side) of the picture's short side. Legend: T frames.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mico_training.world import language as en
from mico_training.world.compose import SIDE, Item, background, background_for, dress, turned
from mico_training.world.language import Rng
from mico_training.world.pictures import name_turn
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue, Thing

Pixels = NDArray[np.uint8]
Line = NDArray[np.float64]
VIDEO = "video.mp4"
WAYS = ("left", "right", "up", "down", "nearer", "away", "still")
MOVES = WAYS[:-1]
# The direction in x and y.
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
REVERSED = dict(zip(WAYS, ("right", "left", "down", "up", "away", "nearer", "still"), strict=True))
CROP = "picture"  # the name of a piece of a photograph
_SIDES = (320, 352, 384, 448)
_MOST_FRAMES = 40
_MOVING_ASKED = 0.5
_PHOTOGRAPHS, _CROPS = 0.7, 0.08
_HIDDEN, _OVERLAP = 0.45, 0.12
"""At most so much of a thing is outside of the picture, or before another thing, on average."""


@dataclass(frozen=True)
class Path:
    """Centre and size in each frame, three arrays (T,). The camera's size is that of its view."""

    x: Line
    y: Line
    size: Line

    def seen_by(self, camera: "Path") -> "Path":
        x, y = ((p - c) / camera.size + 0.5 for p, c in ((self.x, camera.x), (self.y, camera.y)))
        return Path(x, y, self.size / camera.size)


@dataclass(frozen=True)
class Track:
    """A thing that moves: its cut-out, its way in the world, and its path in the picture."""

    thing: Thing
    colour: str | None
    image: Image.Image
    way: str
    path: Path

    def boxes(self, shape: tuple[int, int]) -> Line:
        """Its boxes (T, 4) in a picture of this height and width: centre, width and height."""
        scale = self.path.size * min(shape) / max(self.image.size)
        width, height = (scale * n / m for n, m in zip(self.image.size, shape[::-1], strict=True))
        return np.stack([self.path.x, self.path.y, width, height], 1)


def _pace(rng: Rng, n: int) -> Line:
    """How far along its path something is, from 0 to 1: evenly, gently, or with stops."""
    t, sort = np.linspace(0, 1, n), rng.random()
    if sort < 0.4:
        return t
    if sort < 0.7:
        return t * t * (3 - 2 * t)
    knots = rng.uniform(0, 1, (2, int(rng.integers(1, 4))))
    when, where = np.sort(np.pad(knots, ((0, 0), (1, 1)), constant_values=((0, 1),)))
    return np.interp(t, when, where)


def path_of(rng: Rng, way: str, n: int, size: float, travel: float, ratio: float) -> Path:
    """A path whose middle is anywhere. A thing that goes sideways bobs, bends and drifts a little;
    one that comes nearer or goes away changes its size by ``ratio``."""
    along = _pace(rng, n) - 0.5
    sizes = np.full(n, size)
    if way in ("nearer", "away"):
        sizes = size * ratio ** (along if way == "nearer" else -along)
        travel = float(rng.uniform(0, 0.1))
    wave = np.sin(2 * np.pi * (rng.uniform(0.5, 4) * np.linspace(0, 1, n) + rng.random()))
    bend = (4 * along**2 - 0.4) * rng.uniform(-0.3, 0.3) * (rng.random() < 0.4)
    bob = wave * min(0.04, 0.2 * travel) / max(travel, 0.01) * (rng.random() < 0.3)
    across = (along * rng.uniform(-0.35, 0.35) + bend + bob) * travel * (way != "still")
    x, y = (
        rng.uniform(size / 2, 1 - size / 2) + (step * travel * along if step else across)
        for step in _STEP.get(way, (0.0, 0.0))
    )
    return Path(x, y, sizes)


def camera_path(rng: Rng, way: str, n: int) -> Path:
    """A camera whose view is the unit square in the middle of the clip."""
    travel, ratio = float(rng.uniform(0.12, 0.7)), float(rng.uniform(1.25, 2.2))
    # A camera that goes nearer sees less.
    path = path_of(rng, REVERSED[way] if way in ("nearer", "away") else way, n, 1.0, travel, ratio)
    return replace(path, x=path.x - np.median(path.x) + 0.5, y=path.y - np.median(path.y) + 0.5)


def _shaken(rng: Rng, path: Path) -> Path:
    """The path of a camera in a hand."""
    steps = rng.normal(0, float(rng.uniform(0.0005, 0.004)), (2, len(path.x)))
    x, y = (np.convolve(step.cumsum() * 0.5 + step, (0.25, 0.5, 0.25), "same") for step in steps)
    return replace(path, x=path.x + x - x.mean(), y=path.y + y - y.mean())


def _track(rng: Rng, thing: Thing, way: str, camera: Path, follows: bool, rivals: int) -> Track:
    colour, rgba = dress(rng, thing, None, tint_share=0.0 if thing.name == CROP else 0.25)
    size = float(rng.uniform(0.14, 0.5 if rivals else 0.6))
    if way in ("nearer", "away"):
        size = min(size, 0.4)
    reach = 1.35 if rng.random() < 0.2 else 1.0  # a reach above 1 may leave the picture
    travel = float(rng.uniform(0.18, 0.95)) * max(0.3, reach - size)
    path = path_of(rng, way, len(camera.x), size, travel, float(rng.uniform(1.5, 3.0)))
    if follows:
        share = float(rng.uniform(0.75, 1.05))
        x, y = (share * (line - 0.5) + rng.uniform(0.35, 0.65) for line in (camera.x, camera.y))
        path = replace(path, x=x, y=y)
    return Track(thing, colour, turned(rng, rgba, SIDE), way, path.seen_by(camera))


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


def _crop(rng: Rng, of: str, photograph: Pixels) -> Thing:
    """A rectangle or an ellipse of a photograph, as a thing of its own."""
    height, width = photograph.shape[:2]
    h, w = (int(n * rng.uniform(0.25, 0.5)) for n in (height, width))
    top, left = int(rng.integers(height - h)), int(rng.integers(width - w))
    image = Image.fromarray(photograph[top : top + h, left : left + w])
    alpha = Image.new("L", image.size, 255)
    if rng.random() < 0.5:
        alpha.paste(0, (0, 0, w, h))
        ImageDraw.Draw(alpha).ellipse((0, 0, w - 1, h - 1), fill=255)
    image.putalpha(alpha)
    image.thumbnail((SIDE, SIDE))
    rgba = np.asarray(image)
    return Thing(of, CROP, ("photograph", "photo", "image"), None, lambda: rgba)


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
        others = (en.pick(rng, MOVES) if rng.random() < 0.5 else "still" for _ in range(n - 1))
        return "still", (en.pick(rng, WAYS), *others), False
    camera = en.pick(rng, MOVES)
    if rng.random() < 0.25 and camera in _STEP:
        return camera, (camera,), True
    n = int(rng.choice([0, 1, 2], p=[0.3, 0.45, 0.25]))
    ways = (en.pick(rng, MOVES) if rng.random() < 0.35 else "still" for _ in range(n))
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
    camera = _shaken(rng, steady) if rng.random() < 0.3 and not blurred else steady
    chosen = things.distinct(rng, split, len(ways))
    if chosen and rng.random() < _CROPS and (found := photograph(rng, split)):
        chosen[0] = _crop(rng, *found)
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
    items = [Item(t.thing, t.colour, np.asarray(t.image), 0, 0, 0) for t in tracks]
    canvas = backdrop(rng, split, whole, things, items, texture=way != "still")
    frames = frames_of(tracks, camera, canvas, shape)
    if blurred:
        frames = (frames[::3] // 2 + frames[1::3] // 2).astype(np.uint8)
    crf = int(rng.integers(18, 30) if rng.random() < 0.7 else rng.integers(30, 43))
    files = {VIDEO: encode_video(_worn(rng, frames), fps, crf)}
    said = {VIDEO: captions(rng, tracks, way)}
    truth = [_truth(track, shape) for track in tracks]
    facts = {"fps": fps, "frames": n, "camera": way, "things": truth}
    concepts = {VIDEO: chosen[0].name} if len(chosen) == 1 else {}
    turns = _turns(rng, split, things, tracks, way)
    return Sample("", split, files, said, tuple(turns), concepts, facts)


def _truth(track: Track, shape: tuple[int, int]) -> dict[str, Any]:
    """A thing's facts: where it is in the middle of the clip, at its start and at its end."""
    boxes = track.boxes(shape).round(3).tolist()
    middle = boxes[len(boxes) // 2]
    named = {"identity": track.thing.identity, "name": track.thing.name, "colour": track.colour}
    placed = dict(zip(("x", "y", "width", "height"), middle, strict=True))
    return {**named, "way": track.way, **placed, "start": boxes[0], "end": boxes[-1]}


def photograph(rng: Rng, split: Split) -> tuple[str, Pixels] | None:
    return None


def _part(rng: Rng, photograph: Pixels, shape: tuple[int, int]) -> Pixels:
    """A random part of a photograph, half of the time its mirror image, in this height and width.
    It is half as large as the largest part of this form at least."""
    height, width = photograph.shape[:2]
    scale = min(height / shape[0], width / shape[1]) * float(rng.uniform(0.5, 1.0))
    h, w = shape[0] * scale, shape[1] * scale
    top, left = float(rng.uniform(0, height - h)), float(rng.uniform(0, width - w))
    image = Image.fromarray(photograph)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR, box, 2.0))


def backdrop(
    rng: Rng,
    split: Split,
    shape: tuple[int, int],
    things: Catalogue,
    items: Sequence[Item],
    *,
    texture: bool,
) -> Pixels:
    """What is behind the things; a ``texture`` shows that the camera moves."""
    if (texture or rng.random() < _PHOTOGRAPHS) and (found := photograph(rng, split)):
        return _part(rng, found[1], shape)
    if texture:
        return background(rng, shape, [], "noise")
    return background_for(rng, shape, things, items)


def ways_to_say(way: str) -> tuple[str, ...]:
    return en.phrases().words[f"moves {way}"]


def _clause(rng: Rng, track: Track, subject: str) -> str:
    s = en.agreement(track.thing.name)["s"]
    if track.way == "still":
        return f"{subject} stand{s} still"
    if track.way == "nearer":
        return f"{subject} come{s} nearer"
    return f"{subject} move{s} {en.pick(rng, ways_to_say(track.way)[:2])}"


def _everything(way: str) -> str:
    """What all that stands still seems to do before a camera that goes this way: "moves left"."""
    opposite = REVERSED[way] if way in _STEP else way
    return f"{'comes' if way == 'nearer' else 'moves'} {ways_to_say(opposite)[0]}"


def captions(rng: Rng, tracks: Sequence[Track], camera: str) -> tuple[str, ...]:
    moves = f"the camera {en.word(rng, f'camera {camera}')}"
    if not tracks:
        seen = _everything(camera)
        return en.sentence(f"{moves}, so everything {seen}"), en.sentence(f"everything {seen}")
    after = "" if camera == "still" else f", while {moves}"
    named = [f"{t.colour} {t.thing.name}" if t.colour else t.thing.name for t in tracks]
    clauses = [_clause(rng, t, en.article(n)) for t, n in zip(tracks, named, strict=True)]
    other = (
        clauses[::-1]
        if len(tracks) > 1
        else [_clause(rng, tracks[0], en.article(tracks[0].thing.name))]
    )
    return tuple(en.sentence(en.listed(said) + after) for said in (clauses, other))


def _ask(
    rng: Rng,
    sort: str,
    skill: str,
    accept: Sequence[str],
    choices: Sequence[str] = (),
    **facts: str,
) -> Turn:
    texts = en.say(rng, sort, **facts)
    return Turn(*texts, skill, (VIDEO,), tuple(choices), tuple(accept))


def _way_turns(rng: Rng, track: Track, camera: str, *, alone: bool) -> list[Turn]:
    """Which way does the dog move? Left or right?"""
    way, name = track.way, track.thing.name
    facts = {"a": name, **en.agreement(name), "clause": _clause(rng, track, f"the {name}")}
    only = " of the only thing" if alone and rng.random() < 0.4 else ""
    accept = en.accepted(f"moves {way}")
    question = en.ask(rng, f"way{only}", **facts)
    if way == "still":
        sort = "no way" if camera == "still" else "no way but the camera's"
        return [Turn(question, en.answer(rng, sort, **facts), "motion", (VIDEO,), WAYS, accept)]
    reply = en.answer(rng, "way", way=ways_to_say(way)[0], **facts)
    turns = [Turn(question, reply, "motion", (VIDEO,), WAYS, accept)]
    ways = en.shuffled(rng, way, REVERSED[way])
    variant = int(rng.integers(2))
    facts["one"], facts["two"] = (ways_to_say(w)[variant] for w in ways)
    facts["way"] = facts["one"] if ways[0] == way else facts["two"]
    facts["move"] = "come" if facts["one"].startswith(("nearer", "towards")) else "move"
    question = en.ask(rng, f"one way or the other{only}", **facts)
    reply = en.answer(rng, "one way or the other", **facts)
    return [*turns, Turn(question, reply, "motion", (VIDEO,), ways, accept)]


def _camera_turns(rng: Rng, way: str, *, all_still: bool) -> list[Turn]:
    """Is the camera moving? Which way? Two cameras in five move: "yes" and "no" are as likely."""
    facts = {"camera": en.word(rng, f"camera {way}"), "yes": "no" if way == "still" else "yes"}
    turns = []
    if way != "still" or rng.random() < 0.65:
        turns = [_ask(rng, "camera moves", "camera", (facts["yes"],), ("yes", "no"), **facts)]
    if way == "still":
        return turns
    accept = en.accepted(f"camera {way}")
    turns.append(_ask(rng, "camera's way", "camera", accept, WAYS, **facts))
    ways = en.shuffled(rng, way, REVERSED[way])
    one, two = (en.phrases().words[f"camera {w}"][0].replace("s ", " ", 1) for w in ways)
    facts |= {"one": one, "two": two}
    turns.append(_ask(rng, "camera one way or the other", "camera", accept, ways, **facts))
    seen = REVERSED[way] if way in _STEP else way
    facts |= {"way": ways_to_say(seen)[0], "everything": _everything(way)}
    accept = en.accepted(f"moves {seen}")
    if all_still:
        turns.append(_ask(rng, "everything's way", "motion", accept, WAYS, **facts))
    return turns


def _turns(
    rng: Rng, split: Split, things: Catalogue, tracks: Sequence[Track], camera: str
) -> list[Turn]:
    moving = [t for t in tracks if t.way != "still"]
    turns = _camera_turns(rng, camera, all_still=not moving)
    names = [t.thing.name for t in tracks]
    for track in [tracks[int(i)] for i in rng.permutation(len(tracks))[:2]]:
        turns += _way_turns(rng, track, camera, alone=len(tracks) == 1 and camera == "still")
    if tracks:
        # So many moving things are asked about that "yes" and "no" are equally likely.
        asked = en.pick(rng, tracks)
        name = asked.thing.name
        if asked.way == "still" or rng.random() < _MOVING_ASKED:
            yes = "no" if asked.way == "still" else "yes"
            facts = {"a": name, "yes": yes, "clause": _clause(rng, asked, f"the {name}")}
            facts |= en.agreement(name)
            turns.append(_ask(rng, "moves", "moves", (yes,), ("yes", "no"), **facts))
    if len(moving) == 1 and len(tracks) > 1:
        (mover,) = moving
        other = en.pick(rng, [t for t in tracks if t is not mover])
        two = en.shuffled(rng, mover.thing.name, other.thing.name)
        facts = {"a": two[0], "b": two[1], "name": mover.thing.name}
        facts["clause"] = _clause(rng, mover, f"the {mover.thing.name}")
        turns.append(_ask(rng, "which moves", "motion_name", mover.thing.accept, two, **facts))
    if len(moving) < 3:
        movers = en.listed([f"the {t.thing.name}" for t in moving])
        still = "nothing" if camera == "still" else "only the camera"
        accept = _accepted(moving) or still.split()[-1:]
        s = en.agreement(moving[0].thing.name)["s"] if len(moving) == 1 else "" if moving else "s"
        turns.append(_ask(rng, "what moves", "motion_name", accept, one=movers or still, s=s))
    absent = things.distinct(rng, split, 1, unlike=[t.thing for t in tracks])[0].name
    there = bool(tracks) and rng.random() < 0.5
    named = en.pick(rng, names) if there else absent
    facts = {"one": en.article(named), "yes": "yes" if there else "no", **en.agreement(named)}
    facts["found"] = facts["one"] if there else f"no {named}"
    yes_no = ("yes", "no")
    turns.append(_ask(rng, "present in a clip", "present", (facts["yes"],), yes_no, **facts))
    if len(tracks) == 1:
        turns.append(name_turn(rng, tracks[0].thing, VIDEO, "name in a clip"))
    elif tracks:
        listed = en.listed([en.article(name) for name in names])
        turns.append(_ask(rng, "name in a clip", "name", _accepted(tracks), one=listed))
    said = captions(rng, tracks, camera)[0]
    accept = _accepted(tracks) or en.accepted(f"camera {camera}")
    question = en.ask(rng, "describe a clip")
    return [*turns, Turn(question, said, "describe", (VIDEO,), accept=tuple(accept))]


def _accepted(tracks: Sequence[Track]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(w for t in tracks for w in t.thing.accept))

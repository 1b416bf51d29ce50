"""Video samples: one or two things that move across a background or stand still.

Each way is equally likely. A single frame does not tell the way: the place of the path does not
depend on its direction.
"""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_training.world import language as en
from mico_training.world.compose import SIDE, Item, background_for, dress, turned
from mico_training.world.language import Rng
from mico_training.world.pictures import name_turn
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue, Thing

Pixels = NDArray[np.uint8]
VIDEO = "video.mp4"
WAYS = ("left", "right", "up", "down", "nearer", "away", "still")
# The direction in x and y.
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_REVERSED = dict(zip(WAYS, ("right", "left", "down", "up", "away", "nearer", "still"), strict=True))


@dataclass(frozen=True)
class Track:
    """A moving cut-out: its centre and size (fractions) in each frame, three arrays (T,)."""

    thing: Thing
    colour: str | None
    image: Image.Image
    way: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    size: NDArray[np.float64]


def plan(rng: Rng, thing: Thing, way: str, n_frames: int, lane: tuple[float, float]) -> Track:
    colour, rgba = dress(rng, thing, None, tint_share=0.35)
    room = lane[1] - lane[0]
    size = float(rng.uniform(0.18, 0.44)) * min(1.0, 1.6 * room)
    t = np.linspace(0, 1, n_frames)
    if rng.random() < 0.3:  # slow start, slow end
        t = t * t * (3 - 2 * t)
    reach = 1.15 if rng.random() < 0.2 else 1.0  # a reach above 1 may leave the picture
    travel = float(rng.uniform(0.35, 0.95)) * (reach - size)
    sizes = np.full(n_frames, size)
    if way in ("nearer", "away"):
        ratio = float(rng.uniform(1.7, 3.0))
        large = float(rng.uniform(0.35, 0.62)) * min(1.0, 1.3 * room)
        sizes = large * ratio ** (t - 1 if way == "nearer" else -t)
        size = large
    dx, dy = _STEP.get(way, (0.0, 0.0))

    def along(step: float) -> NDArray[np.float64]:
        middle = 0.5 + float(rng.uniform(-1, 1)) * max(0.0, (1.0 - travel - size) / 2)
        return middle + step * travel * (t - 0.5)

    def across() -> NDArray[np.float64]:
        low, high = lane[0] + size / 2 * room, lane[1] - size / 2 * room
        drift = float(rng.uniform(-0.05, 0.05)) * (way != "still")
        return float(rng.uniform(low, high)) + drift * (t - 0.5)

    x, y = (along(step) if step else across() for step in (dx, dy))
    return Track(thing, colour, turned(rng, rgba, SIDE), way, x, y, sizes)


def frames_of(tracks: list[Track], background: Pixels) -> Pixels:
    height, width = background.shape[:2]
    short = min(height, width)
    frames = np.empty((len(tracks[0].x), height, width, 3), np.uint8)
    base = Image.fromarray(background)
    for t in range(len(frames)):
        canvas = base.copy()
        for track in tracks:
            scale = max(8, round(track.size[t] * short)) / max(track.image.size)
            w, h = (max(2, round(length * scale)) for length in track.image.size)
            image = track.image.resize((w, h), Image.Resampling.BILINEAR)
            left = round(track.x[t] * width - image.width / 2)
            top = round(track.y[t] * height - image.height / 2)
            canvas.paste(image, (left, top), image)
        frames[t] = np.asarray(canvas)
    return frames


def encode_video(frames: Pixels, fps: int) -> bytes:
    """(T, H, W, 3) uint8 -> MP4 (H.264, one thread: equal input gives equal bytes)."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "23", "threads": "1"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def make_motion(rng: Rng, split: Split, things: Catalogue) -> Sample:
    """A clip of a thing that goes one of seven ways; 40 % have a second thing, still or moving."""
    n_frames, fps = int(rng.integers(8, 25)), int(rng.integers(8, 13))
    way = en.pick(rng, WAYS)
    two = rng.random() < 0.4
    chosen = things.distinct(rng, split, 2 if two else 1)
    lanes = [(0.0, 0.5), (0.5, 1.0)]
    first, second = lanes if rng.random() < 0.5 else lanes[::-1]
    tracks = [plan(rng, chosen[0], way, n_frames, first if two else (0.0, 1.0))]
    if two:
        other = "still" if way != "still" and rng.random() < 0.6 else en.pick(rng, WAYS[:4])
        if other != "still" and (other in ("up", "down")) != (way in ("up", "down")):
            other = "still" if way != "still" else other
        tracks.append(plan(rng, chosen[1], other, n_frames, second))
    side = int(rng.choice([224, 240, 256]))
    shape = (side, side) if rng.random() < 0.75 else (192, 256)
    items = [Item(t.thing, t.colour, np.asarray(t.image), 0, 0, 0) for t in tracks]
    frames = frames_of(tracks, background_for(rng, shape, things, items))
    truth = [
        {"identity": t.thing.identity, "name": t.thing.name, "colour": t.colour, "way": t.way}
        for t in tracks
    ]
    files, said = {VIDEO: encode_video(frames, fps)}, {VIDEO: captions(rng, tracks)}
    facts = {"fps": fps, "frames": n_frames, "things": truth}
    concepts = {} if two else {VIDEO: chosen[0].name}
    return Sample("", split, files, said, tuple(_turns(rng, tracks)), concepts, facts)


def _clause(rng: Rng, track: Track, subject: str) -> str:
    s = en.agreement(track.thing.name)["s"]
    if track.way == "still":
        return f"{subject} stand{s} still"
    if track.way == "nearer":
        return f"{subject} come{s} nearer"
    return f"{subject} move{s} {en.pick(rng, _ways_to_say(track.way)[:2])}"


def _ways_to_say(way: str) -> tuple[str, ...]:
    return en.phrases().words[f"moves {way}"]


def captions(rng: Rng, tracks: list[Track]) -> tuple[str, ...]:
    named = [f"{t.colour} {t.thing.name}" if t.colour else t.thing.name for t in tracks]
    clauses = [_clause(rng, t, en.article(n)) for t, n in zip(tracks, named, strict=True)]
    if len(tracks) == 1:
        plain = _clause(rng, tracks[0], en.article(tracks[0].thing.name))
        return en.sentence(clauses[0]), en.sentence(plain)
    return tuple(en.sentence(f"{one} and {two}") for one, two in (clauses, clauses[::-1]))


def _way_turn(rng: Rng, track: Track, *, alone: bool) -> Turn:
    way, name = track.way, track.thing.name
    facts = {"a": name, **en.agreement(name)}
    question = en.ask(rng, "way", **facts)
    if alone and rng.random() < 0.35:
        question = en.ask(rng, "way of the only thing")
    if way == "still":
        reply = en.answer(rng, "no way", **facts)
    else:
        clause = _clause(rng, track, f"the {name}")
        reply = en.answer(rng, "way", way=_ways_to_say(way)[0], clause=clause)
    return Turn(question, reply, "motion", (VIDEO,), WAYS, en.accepted(f"moves {way}"))


def _turns(rng: Rng, tracks: list[Track]) -> list[Turn]:
    asked, name = tracks[0], tracks[0].thing.name
    turns = [_way_turn(rng, asked, alone=len(tracks) == 1)]
    if asked.way != "still":
        ways = en.shuffled(rng, asked.way, _REVERSED[asked.way])
        variant = int(rng.integers(2))
        one, two = (_ways_to_say(w)[variant] for w in ways)
        move = "come" if one.startswith(("nearer", "towards")) else "move"
        facts = {"a": name, "one": one, "two": two, "move": move, **en.agreement(name)}
        question = en.ask(rng, "one way or the other", **facts)
        clause = _clause(rng, asked, f"the {name}")
        said = one if ways[0] == asked.way else two
        reply = en.answer(rng, "one way or the other", way=said, clause=clause)
        accept = en.accepted(f"moves {asked.way}")
        turns.append(Turn(question, reply, "motion", (VIDEO,), ways, accept))
    # One thing in seven stands still. A question about one moving thing in six makes "yes" and "no"
    # equally likely.
    if asked.way == "still" or rng.random() < 1 / 6:
        yes = "no" if asked.way == "still" else "yes"
        question = en.ask(rng, "moves", a=name, **en.agreement(name))
        reply = en.answer(rng, "moves", yes=yes, clause=_clause(rng, asked, f"the {name}"))
        turns.append(Turn(question, reply, "moves", (VIDEO,), ("yes", "no"), (yes,)))
    moving = [t for t in tracks if t.way != "still"]
    if len(tracks) == 2 and len(moving) == 1:
        names = en.shuffled(rng, *(t.thing.name for t in tracks))
        (mover,) = moving
        name = mover.thing.name
        reply = en.answer(rng, "which moves", name=name, clause=_clause(rng, mover, f"the {name}"))
        question = en.ask(rng, "which moves", a=names[0], b=names[1])
        accept = mover.thing.accept
        turns.append(Turn(question, reply, "motion_name", (VIDEO,), names, accept))
    if len(tracks) == 1:
        turns.append(name_turn(rng, asked.thing, VIDEO, "name in a clip"))
    accept = tuple(dict.fromkeys(w for t in tracks for w in t.thing.accept))
    question = en.ask(rng, "describe a clip")
    turns.append(Turn(question, captions(rng, tracks)[0], "describe", (VIDEO,), accept=accept))
    return turns

"""Video samples: one or two things that move across a background or stand still.

Motions are drawn evenly; the way cannot be told from a single frame, since the path's place is
drawn apart from its direction, and a share of clips is played backwards.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_training.world import phrases
from mico_training.world.compose import SIDE, Item, background_for, dress, turned
from mico_training.world.nouns import article, be, is_plural, sentence
from mico_training.world.sample import Sample, Split, Turn
from mico_training.world.things import Catalogue, Thing

Rng = np.random.Generator
Pixels = NDArray[np.uint8]
VIDEO = "video.mp4"
WAYS = ("left", "right", "up", "down", "nearer", "away", "still")
# Step in x, y, and in log size, from the first to the last frame, per unit of travel.
_STEP = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "nearer": (0.0, 0.0), "away": (0.0, 0.0), "still": (0.0, 0.0),
}  # fmt: skip
_REVERSED = {
    "left": "right", "right": "left", "up": "down", "down": "up", "nearer": "away",
    "away": "nearer", "still": "still",
}  # fmt: skip
_SAID = {
    "left": ("to the left", "left", "leftwards"),
    "right": ("to the right", "right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "nearer": ("nearer", "towards the camera", "closer"),
    "away": ("away", "away from the camera", "farther away"),
    "still": ("it does not move", "it stands still"),
}
_ACCEPT = {
    "left": ("left", "leftwards"),
    "right": ("right", "rightwards"),
    "up": ("up", "upwards", "upward"),
    "down": ("down", "downwards", "downward"),
    "nearer": ("nearer", "closer", "towards", "toward"),
    "away": ("away", "farther", "further"),
    "still": ("still", "not", "nowhere"),
}
WHICH_WAY = (
    "Which way does the {a} move?",
    "In which direction does the {a} move?",
    "Where does the {a} move?",
    "Which direction is the {a} moving in?",
    "How does the {a} move in this clip?",
    "What way is the {a} going?",
    "Which way is the {a} moving?",
    "Where is the {a} going?",
    "In this video, which way does the {a} go?",
    "Tell me which way the {a} moves.",
    "What is the direction of the {a}'s motion?",
)
WHICH_WAY_THING = (
    "Which way does the thing move?",
    "In which direction does the object move?",
    "Which way is it moving?",
    "Which way does it go?",
    "What is the direction of motion?",
    "Where does the object go?",
    "Which way does the thing in the video move?",
)
EITHER = (
    "Does the {a} move {one} or {two}?",
    "Is the {a} moving {one} or {two}?",
    "Which way does the {a} move, {one} or {two}?",
    "Is the {a} going {one} or {two}?",
    "In the clip, does the {a} move {one} or {two}?",
    "Does the {a} go {one} or {two}?",
)
DOES_MOVE = (
    "Does the {a} move?",
    "Is the {a} moving?",
    "Is the {a} in motion?",
    "Does the {a} change its place?",
)
WHICH_MOVES = (
    "Which thing moves, the {a} or the {b}?",
    "Which is moving, the {a} or the {b}?",
    "What moves in this clip, the {a} or the {b}?",
    "Is it the {a} or the {b} that moves?",
)
NAME = (
    "What is in this video?",
    "What do you see in this clip?",
    "What thing is in the video?",
    "What moves in this video?",
    "Which object is shown in the clip?",
    "What does the video show?",
)
DESCRIBE = (
    "Describe the video.",
    "What happens in this clip?",
    "Describe what happens.",
    "What is going on?",
)


@dataclass(frozen=True)
class Track:
    """A moving cut-out: centre and size (fractions) for each frame, (T,) each."""

    thing: Thing
    colour: str | None
    image: Image.Image
    way: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    size: NDArray[np.float64]


def plan(
    rng: Rng, thing: Thing, way: str, n_frames: int, *, lane: tuple[float, float] = (0.0, 1.0)
) -> Track:
    """A track for ``thing`` going ``way``; ``lane`` is its share of the axis it stays on."""
    colour, rgba = dress(rng, thing, None, tint_share=0.35)
    room = lane[1] - lane[0]
    size = float(rng.uniform(0.18, 0.44)) * min(1.0, 1.6 * room)
    t = np.linspace(0, 1, n_frames)
    if rng.random() < 0.3:  # slow start, slow end
        t = t * t * (3 - 2 * t)
    reach = 1.15 if rng.random() < 0.2 else 1.0  # some run partly out of the picture
    travel = float(rng.uniform(0.35, 0.95)) * (reach - size)
    sizes = np.full(n_frames, size)
    if way in ("nearer", "away"):
        ratio = float(rng.uniform(1.7, 3.0))
        large = float(rng.uniform(0.35, 0.62)) * min(1.0, 1.3 * room)
        sizes = large * ratio ** (t - 1 if way == "nearer" else -t)
        size = large
    dx, dy = _STEP[way]

    def along(step: float) -> NDArray[np.float64]:
        middle = 0.5 + float(rng.uniform(-1, 1)) * max(0.0, (1.0 - travel - size) / 2)
        return middle + step * travel * (t - 0.5)

    def across() -> NDArray[np.float64]:
        low, high = lane[0] + size / 2 * room, lane[1] - size / 2 * room
        drift = float(rng.uniform(-0.05, 0.05)) * (way != "still")
        return float(rng.uniform(low, high)) + drift * (t - 0.5)

    x = along(dx) if dx else across()
    y = along(dy) if dy else across()
    image = turned(rng, rgba, SIDE)
    return Track(thing, colour, image, way, x, y, sizes)


def frames_of(tracks: list[Track], background: Pixels) -> Pixels:
    """(T, H, W, 3): the tracks painted over the background."""
    height, width = background.shape[:2]
    short = min(height, width)
    frames = np.empty((len(tracks[0].x), height, width, 3), np.uint8)
    base = Image.fromarray(background)
    scaled: dict[tuple[int, int], Image.Image] = {}
    for t in range(len(frames)):
        canvas = base.copy()
        for k, track in enumerate(tracks):
            side = max(8, round(track.size[t] * short))
            if (k, side) not in scaled:
                scale = side / max(track.image.size)
                shape = (
                    max(2, round(track.image.width * scale)),
                    max(2, round(track.image.height * scale)),
                )
                scaled[k, side] = track.image.resize(shape, Image.Resampling.BILINEAR)
            image = scaled[k, side]
            place = (
                round(track.x[t] * width - image.width / 2),
                round(track.y[t] * height - image.height / 2),
            )
            canvas.paste(image, place, image)
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
    """A clip with one thing going one of seven ways; 40 % with a second thing, still or moving."""
    n_frames, fps = int(rng.integers(8, 25)), int(rng.integers(8, 13))
    way = phrases.pick(rng, WAYS)
    two = rng.random() < 0.4
    chosen = things.distinct(rng, split, 2 if two else 1)
    first_lane, second_lane = (
        ((0.0, 0.5), (0.5, 1.0)) if rng.random() < 0.5 else ((0.5, 1.0), (0.0, 0.5))
    )
    tracks = [plan(rng, chosen[0], way, n_frames, lane=first_lane if two else (0.0, 1.0))]
    if two:
        other = "still" if way != "still" and rng.random() < 0.6 else phrases.pick(rng, WAYS[:4])
        if other != "still" and (other in ("up", "down")) != (way in ("up", "down")):
            other = "still" if way != "still" else other
        tracks.append(plan(rng, chosen[1], other, n_frames, lane=second_lane))
    side = int(rng.choice([224, 240, 256]))
    height, width = (side, side) if rng.random() < 0.75 else (192, 256)
    items = [Item(t.thing, t.colour, np.asarray(t.image), 0, 0, 0) for t in tracks]
    frames = frames_of(tracks, background_for(rng, height, width, things, items))
    if rng.random() < 0.3:
        frames = frames[::-1]
        tracks = [
            Track(t.thing, t.colour, t.image, _REVERSED[t.way], t.x[::-1], t.y[::-1], t.size[::-1])
            for t in tracks
        ]
    return Sample(
        id="",
        split=split,
        files={VIDEO: encode_video(frames, fps)},
        captions={VIDEO: captions(rng, tracks)},
        turns=tuple(_turns(rng, tracks)),
        concepts={VIDEO: chosen[0].name} if not two else {},
        truth={
            "fps": fps,
            "frames": n_frames,
            "things": [
                {
                    "identity": t.thing.identity,
                    "name": t.thing.name,
                    "colour": t.colour,
                    "way": t.way,
                }
                for t in tracks
            ],
        },
    )


def _named(track: Track) -> str:
    return f"{track.colour} {track.thing.name}" if track.colour else track.thing.name


def _clause(rng: Rng, track: Track, subject: str) -> str:
    """ "the ball moves to the left"."""
    many = is_plural(track.thing.name)
    if track.way == "still":
        return f"{subject} {'stand' if many else 'stands'} still"
    if track.way == "nearer":
        return f"{subject} {'come' if many else 'comes'} nearer"
    said = phrases.pick(rng, _SAID[track.way][:2])
    return f"{subject} {'move' if many else 'moves'} {said}"


def captions(rng: Rng, tracks: list[Track]) -> tuple[str, ...]:
    """What happens, for pretraining."""
    clauses = [_clause(rng, t, article(_named(t))) for t in tracks]
    if len(tracks) == 1:
        return (
            sentence(clauses[0]),
            sentence(_clause(rng, tracks[0], article(tracks[0].thing.name))),
        )
    return (sentence(f"{clauses[0]} and {clauses[1]}"), sentence(f"{clauses[1]} and {clauses[0]}"))


def _way_turn(rng: Rng, track: Track, *, alone: bool) -> Turn:
    """Which way? Open."""
    way, name = track.way, track.thing.name
    question = phrases.pick(rng, WHICH_WAY).format(a=name)
    if is_plural(name):
        question = question.replace("does the", "do the").replace("is the", "are the")
        question = question.replace(f"{name} moves", f"{name} move").replace(
            "What are the dir", "What is the dir"
        )
    if alone and rng.random() < 0.35:
        question = phrases.pick(rng, WHICH_WAY_THING)
    if way == "still":
        answer = phrases.reply(rng, "it does not move", f"the {name} {be(name)} standing still")
    else:
        answer = phrases.reply(rng, _SAID[way][0], _clause(rng, track, f"the {name}"))
    return Turn(question, answer, "motion", (VIDEO,), WAYS, _ACCEPT[way])


def _either_turn(rng: Rng, track: Track) -> Turn:
    """Does it move left or right? Closed, for a thing that moves along one axis."""
    way, name = track.way, track.thing.name
    ways = phrases.shuffled(rng, way, _REVERSED[way])
    variant = int(rng.integers(2))
    said = {w: _SAID[w][variant] for w in ways}
    question = phrases.pick(rng, EITHER).format(a=name, one=said[ways[0]], two=said[ways[1]])
    question = question.replace("move towards", "come towards").replace(
        "move nearer", "come nearer"
    )
    if is_plural(name):
        question = question.replace("Does the", "Do the").replace("Is the", "Are the")
        question = question.replace("does the", "do the")
    answer = phrases.reply(rng, said[way], _clause(rng, track, f"the {name}"))
    return Turn(question, answer, "motion", (VIDEO,), ways, _ACCEPT[way])


def _moves_turn(rng: Rng, track: Track) -> Turn:
    """Does it move? Yes or no."""
    name, yes = track.thing.name, track.way != "still"
    question = phrases.pick(rng, DOES_MOVE).format(a=name)
    if is_plural(name):
        question = (
            question.replace("Does the", "Do the")
            .replace("Is the", "Are the")
            .replace("its", "their")
        )
    word = "yes" if yes else "no"
    answer = phrases.reply(rng, word, f"{word}, {_clause(rng, track, f'the {name}')}")
    return Turn(question, answer, "moves", (VIDEO,), ("yes", "no"), (word,))


def _turns(rng: Rng, tracks: list[Track]) -> list[Turn]:
    alone = len(tracks) == 1
    asked = tracks[0]
    turns = [_way_turn(rng, asked, alone=alone)]
    if asked.way != "still":
        turns.append(_either_turn(rng, asked))
    # Stillness is one way in seven: asked of one mover in six, yes and no come out even.
    if asked.way == "still" or rng.random() < 1 / 6:
        turns.append(_moves_turn(rng, asked))
    if not alone:
        still = [t for t in tracks if t.way == "still"]
        moving = [t for t in tracks if t.way != "still"]
        if len(still) == 1 and len(moving) == 1:
            a, b = phrases.shuffled(rng, tracks[0].thing.name, tracks[1].thing.name)
            name = moving[0].thing.name
            answer = phrases.reply(rng, f"the {name}", _clause(rng, moving[0], f"the {name}"))
            question = phrases.pick(rng, WHICH_MOVES).format(a=a, b=b)
            turns.append(
                Turn(question, answer, "motion_name", (VIDEO,), (a, b), moving[0].thing.accept)
            )
    if alone:
        one = article(asked.thing.name)
        answer = phrases.reply(rng, one, f"the video shows {one}")
        turns.append(
            Turn(
                phrases.pick(rng, NAME[:3] + NAME[4:]),
                answer,
                "name",
                (VIDEO,),
                accept=asked.thing.accept,
            )
        )
    accept = tuple(dict.fromkeys(w for t in tracks for w in t.thing.accept))
    turns.append(
        Turn(
            phrases.pick(rng, DESCRIBE),
            captions(rng, tracks)[0],
            "describe",
            (VIDEO,),
            accept=accept,
        )
    )
    return turns

"""Which medium, and which part of it, an answer rests on: leave one out, score the answer again.

Each part of each medium is replaced by a blank of its kind: grey, silence, a map without shape. The
answer's own tokens are scored after each such prompt, all of them in the same steps of the model.
A part's *effect* on a token is how much the token's log-probability falls without the part (Li et
al. 2016, "Understanding Neural Networks through Representation Erasure", equation 1). A clip that
shows nothing often leaves a model's first guess about motion; so a clip is also shown backwards,
and the larger effect of the two is the clip's. Effects tell what this answer rests on, not whether
it is right; two media that say the same hide each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mico_chat.engine.base import Engine, GenerationOptions, Prompt
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import (
    Audio,
    Depth,
    EncodedMedium,
    Image,
    MediaReport,
    Medium,
    Normal,
    Video,
    Words,
)
from mico_chat.wire import ExplainedMedium, ExplainedPart, ExplainedWord, Explanation, TokenLogprob

if TYPE_CHECKING:
    from mico_chat.encode import MediaEncoder

Floats = NDArray[np.float64]

TILES = 4
"""A still is cut into so many rows and columns."""
MOST_FRAMES = 16
STRETCHES = 8
"""A sound is cut into so many parts of equal length."""
GREY = 127
MOST_PARTS = 512
AT_ONCE = 16  # blanked media that are held at once
SCORED_AT_ONCE = 32  # prompts: about twice as many as the engines compute together
LEAST_EFFECT = 0.1
"""Nats that an answer or a word loses without a medium that it rests on; less is noise."""
LEAST_IF_SAME = 0.5
"""The same for an answer that the model would have given without any medium: it loses some tenths
of a nat even without a medium that has nothing to do with it."""


@dataclass(frozen=True)
class Part:
    """What is left out: of the medium at ``place`` all (no ``what``), or a part.

    ``blank`` is the medium without it; None: the words that were read or heard in it are left out.
    ``box``: left, top, right, bottom, as parts of the width and height. ``time``: its first and
    last second.
    """

    place: int
    what: str = ""
    blank: Medium | None = None
    box: tuple[float, float, float, float] | None = None
    time: tuple[float, float] | None = None


def parts_of(place: int, medium: Medium, words: Words) -> Iterator[Part]:
    """The whole medium first, then its parts."""
    yield Part(place, blank=blanked(medium))
    if words.written or words.spoken:
        yield Part(place, "words")
    match medium:
        case Image() | Normal() | Depth():
            yield from _tiles(place, medium)
        case Audio():
            yield from _stretches(place, medium)
        case Video():
            yield from _frames(place, medium)
            if len(medium.frames) > 1:
                yield Part(place, "order", replace(medium, frames=medium.frames[::-1].copy()))
            if medium.audio is not None and medium.audio.samples.any():
                silent = replace(medium, audio=_silent(medium.audio))
                yield Part(place, "sound track", silent)


def blanked(medium: Medium) -> Medium:
    """A medium of the same size that shows or says nothing."""
    match medium:
        case Image():
            return replace(medium, pixels=np.full_like(medium.pixels, GREY))
        case Normal():  # a wall that faces the viewer
            wall = np.array([GREY, GREY, 255], np.uint8)
            return replace(medium, pixels=np.broadcast_to(wall, medium.pixels.shape).copy())
        case Depth():
            flat = np.full_like(medium.values, 1.0 if medium.metric else 0.5)
            return replace(medium, values=flat)
        case Audio():
            return _silent(medium)
        case Video():
            sound = None if medium.audio is None else _silent(medium.audio)
            return replace(medium, frames=np.full_like(medium.frames, GREY), audio=sound)


def _silent(sound: Audio) -> Audio:
    return replace(sound, samples=np.zeros_like(sound.samples))


def _tiles(place: int, medium: Image | Normal | Depth) -> Iterator[Part]:
    name = "values" if isinstance(medium, Depth) else "pixels"
    whole, empty = getattr(medium, name), getattr(blanked(medium), name)
    rows, columns = (np.linspace(0, n, TILES + 1).round().astype(int) for n in whole.shape[:2])
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            if top == bottom or left == right:
                continue
            cut = whole.copy()
            cut[top:bottom, left:right] = empty[top:bottom, left:right]
            height, width = whole.shape[:2]
            box = (left / width, top / height, right / width, bottom / height)
            yield Part(place, "tile", replace(medium, **{name: cut}), box=box)


def _stretches(place: int, medium: Audio) -> Iterator[Part]:
    ends = np.linspace(0, len(medium.samples), STRETCHES + 1).round().astype(int)
    for start, end in pairwise(ends):
        if start == end:
            continue
        cut = medium.samples.copy()
        cut[start:end] = 0
        time = (start / medium.sample_rate, end / medium.sample_rate)
        yield Part(place, "stretch", replace(medium, samples=cut), time=time)


def _frames(place: int, medium: Video) -> Iterator[Part]:
    """Runs of frames, each frame alone where there are few."""
    n = len(medium.frames)
    ends = np.linspace(0, n, min(n, MOST_FRAMES) + 1).round().astype(int)
    for start, end in pairwise(ends):
        cut = medium.frames.copy()
        cut[start:end] = GREY
        time = (float(medium.times[start]), float(medium.times[end - 1]))
        yield Part(place, "frame", replace(medium, frames=cut), time=time)


def n_prompts(reports: Sequence[MediaReport]) -> int:
    """The prompts after which the answer is scored; a silent sound track takes one less."""
    whole_and_none = 2
    return whole_and_none + sum(map(_n_parts, reports))


def _n_parts(report: MediaReport) -> int:
    n = 1 + bool(report.written or report.spoken)
    match report.kind:
        case "video":
            frames = report.frames_used or 0
            return n + min(frames, MOST_FRAMES) + (frames > 1) + bool(report.audio_used)
        case "audio":
            return n + STRETCHES
    return n + TILES**2


Laid = Callable[[Sequence[Sequence[EncodedMedium]]], Awaitable[list[Prompt]]]
"""The conversation's prompt, with its answer, and with each of several lists of media."""


async def explain(
    engine: Engine,
    encoder: MediaEncoder,
    laid: Laid,
    media: Sequence[MediaFile | Medium],
    *,
    salt: str = "",
) -> Explanation:
    """What an answer, with which the prompts that are ``laid`` end, rests on of all ``media``.

    Raises:
        RequestError: there are too many media, or the engine cannot score an answer.
    """
    decoded = await encoder.decoded(media, salt=salt)
    whole = await encoder.encode(media, salt=salt)
    known = [one.words for one in whole]
    n_parts = sum(_n_parts(one.report) for one in whole)
    if n_parts > MOST_PARTS:
        raise RequestError.at("explain", f"{n_parts} parts of media, more than {MOST_PARTS}")
    parts: list[Part] = []
    variants: list[list[EncodedMedium]] = [list(whole)]
    nothing: list[EncodedMedium] = []
    coming = chain.from_iterable(parts_of(at, one, known[at]) for at, one in enumerate(decoded))
    # In a thread, and few at once: each is as large as its medium.
    while group := await asyncio.to_thread(lambda: list(islice(coming, AT_ONCE))):
        blanks = [part.blank for part in group if part.blank is not None]
        encoded = iter(await encoder.encode(blanks, salt=salt, beside=media, read=False))
        for part in group:
            if part.blank is None:
                one = replace(whole[part.place], words=Words())
            elif part.what:
                one = replace(next(encoded), words=known[part.place])
            else:
                one = next(encoded)
                nothing.append(one)
            variants.append([*whole[: part.place], one, *whole[part.place + 1 :]])
            parts.append(replace(part, blank=None))
    prompts = await laid([*variants, nothing])
    room = asyncio.Semaphore(SCORED_AT_ONCE)  # all together would hold up the event loop

    async def scored(prompt: Prompt) -> list[TokenLogprob]:
        async with room:
            return await score(engine, prompt)

    first, *others, last = await asyncio.gather(*map(scored, prompts))
    before = np.array([one.logprob for one in first])
    effects = [before - np.array([one.logprob for one in those]) for those in others]
    whole_effects = [_whole(place, parts, effects) for place in range(len(media))]
    same = all(one.top[0].token_id == one.token_id for one in last)
    least = LEAST_IF_SAME if same else LEAST_EFFECT
    return Explanation(
        words=_words(first, whole_effects, least),
        media=tuple(_media(parts, effects, whole_effects, least)),
        logprob=float(before.sum()),
        without_media=sum(one.logprob for one in last),
        same_without_media=same,
    )


async def score(engine: Engine, prompt: Prompt) -> list[TokenLogprob]:
    """The log-probability of each token of a prompt's answer, and the likeliest at its place.

    A token's text is what it adds to the answer.
    """
    found: list[TokenLogprob] = []
    options = GenerationOptions(max_tokens=1, logprobs=1)
    async with aclosing(engine.generate(prompt, options)) as deltas:
        async for delta in deltas:
            for one in delta.logprobs:
                found.append(one.model_copy(update={"token": delta.text}))
    return found


def _whole(place: int, parts: Sequence[Part], effects: Sequence[Floats]) -> Floats:
    """The effects (tokens,) of a medium as a whole."""
    own = [
        effect
        for part, effect in zip(parts, effects, strict=True)
        if part.place == place and part.what in ("", "order")
    ]
    return max(own, key=np.sum)


def _media(
    parts: Sequence[Part], effects: Sequence[Floats], whole: Sequence[Floats], least: float
) -> Iterator[ExplainedMedium]:
    sums = [float(effect.sum()) for effect in whole]
    above = sum(effect for effect in sums if effect > least)
    for place, effect in enumerate(sums):
        own = tuple(
            ExplainedPart(what=part.what, effect=float(one.sum()), box=part.box, time=part.time)
            for part, one in zip(parts, effects, strict=True)
            if part.place == place and part.what
        )
        share = effect / above if effect > least else 0.0
        yield ExplainedMedium(effect=effect, share=share, parts=own)


def _words(
    tokens: Sequence[TokenLogprob], whole: Sequence[Floats], least: float
) -> tuple[ExplainedWord, ...]:
    """Tokens joined to words: a token that begins with a space begins one."""
    starts = [at for at, one in enumerate(tokens) if not at or one.token[:1].isspace()]
    words = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        own = tuple(float(one[start:end].sum()) for one in whole)
        most = max(range(len(own)), key=own.__getitem__, default=None)
        words.append(
            ExplainedWord(
                text="".join(one.token for one in tokens[start:end]),
                logprob=sum(one.logprob for one in tokens[start:end]),
                effects=own,
                medium=most if most is not None and own[most] > least else None,
            )
        )
    return tuple(words)

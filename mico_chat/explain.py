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
from itertools import chain, islice, pairwise, product
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mico_chat.ask import NOTE, Tally
from mico_chat.engine.base import Engine, GenerationOptions, Prompt
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import TABLE
from mico_chat.media.medium import (
    Audio,
    Depth,
    MeasuredMedium,
    MediaReport,
    Medium,
    Pages,
    Video,
    Words,
)
from mico_chat.wire import ExplainedMedium, ExplainedPart, ExplainedWord, Explanation, TokenLogprob

if TYPE_CHECKING:
    from mico_chat.encode import MediaEncoder

M = TypeVar("M", bound=Medium)
Floats = NDArray[np.float64]

TILES = 4
"""A still is cut into so many rows and columns."""
MOST_FRAMES = 16
STRETCHES = 8
"""A sound is cut into so many parts of equal length."""
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
    last second. A ``page`` is left out with the words on it.
    """

    place: int
    what: str = ""
    blank: Medium | None = None
    box: tuple[float, float, float, float] | None = None
    time: tuple[float, float] | None = None
    page: int | None = None


def parts_of(
    place: int, medium: Medium, words: Words, pages: Sequence[int] | None = None
) -> Iterator[Part]:
    """The whole medium first, then its parts; of a document's pages those that are used."""
    empty = blanked(medium)
    yield Part(place, blank=empty)
    if words.written or words.spoken:
        yield Part(place, "words")
    if isinstance(medium, Pages):
        for n in pages if pages is not None else medium.report.pages or ():
            seen = (blanked(p) if n in (p.report.pages or ()) else p for p in medium.pages)
            blank = replace(medium, pages=tuple(seen))
            yield Part(place, f"{TABLE[medium.kind].piece} {n}", blank, page=n)
        return
    for where, part in _places(place, medium):
        cut = medium.own_arrays[0].copy()
        cut[where] = empty.own_arrays[0][where]
        changed: dict[str, Any] = {medium.arrays[0]: cut}
        yield replace(part, blank=replace(medium, **changed))
    if isinstance(medium, Video):
        if len(medium.frames) > 1:
            yield Part(place, "order", replace(medium, frames=medium.frames[::-1].copy()))
        if medium.audio is not None and medium.audio.samples.any():
            yield Part(place, "sound track", replace(medium, audio=blanked(medium.audio)))


def blanked(medium: M) -> M:
    """A medium of the same size that shows or says nothing."""
    if isinstance(medium, Pages):
        return replace(medium, pages=tuple(map(blanked, medium.pages)))
    whole = medium.own_arrays[0]
    flat = np.array(TABLE[medium.kind].blank, whole.dtype)
    if isinstance(medium, Depth) and not medium.metric:
        flat = flat / 2  # the middle of its range
    changed: dict[str, Any] = {medium.arrays[0]: np.broadcast_to(flat, whole.shape).copy()}
    if isinstance(medium, Video) and medium.audio is not None:
        changed["audio"] = blanked(medium.audio)
    return replace(medium, **changed)


def _places(place: int, medium: Medium) -> Iterator[tuple[Any, Part]]:
    """The tiles, runs of frames or stretches of a medium: as an index of its array, and in words.

    Each frame is alone where there are few.
    """
    shape = medium.own_arrays[0].shape
    if isinstance(medium, Video):
        for start, end in pairwise(_ends(shape[0], min(shape[0], MOST_FRAMES))):
            time = (float(medium.times[start]), float(medium.times[end - 1]))
            yield slice(start, end), Part(place, "frame", time=time)
    elif isinstance(medium, Audio):
        for start, end in pairwise(_ends(shape[0], STRETCHES)):
            if start < end:
                time = (start / medium.sample_rate, end / medium.sample_rate)
                yield slice(start, end), Part(place, "stretch", time=time)
    else:
        height, width = shape[:2]
        rows, columns = pairwise(_ends(height, TILES)), pairwise(_ends(width, TILES))
        for (top, bottom), (left, right) in product(rows, columns):
            if top < bottom and left < right:
                box = (left / width, top / height, right / width, bottom / height)
                yield np.s_[top:bottom, left:right], Part(place, "tile", box=box)


def _ends(n: int, parts: int) -> list[int]:
    """Where each of ``parts`` of about the same length begins, and the end of the last."""
    return [int(end) for end in np.linspace(0, n, parts + 1).round()]


def n_prompts(reports: Sequence[MediaReport]) -> int:
    """The prompts after which the answer is scored; a silent sound track takes one less."""
    whole_and_none = 2
    return whole_and_none + sum(map(_n_parts, reports))


def _n_parts(report: MediaReport) -> int:
    row, n = TABLE[report.kind], 1 + bool(report.written or report.spoken)
    if row.made_of:
        return n + (report.frames_used or 0)
    if row.layout == "frames":
        frames = report.frames_used or 0
        return n + min(frames, MOST_FRAMES) + (frames > 1) + bool(report.audio_used)
    return n + (STRETCHES if row.layout == "slices" else TILES**2)


MakePrompts = Callable[[Sequence[Sequence[MeasuredMedium]]], Awaitable[list[Prompt]]]
"""Makes the prompts of a conversation with its answer, one for each of several lists of media."""


async def explain(
    engine: Engine,
    encoder: MediaEncoder,
    make_prompts: MakePrompts,
    media: Sequence[MediaFile | Medium],
    *,
    tenant: str = "",
) -> Explanation:
    """Which of the ``media`` of a conversation its answer rests on.

    Raises:
        RequestError: there are too many media, or the engine cannot score an answer.
    """
    decoded = await encoder.decoded(media, tenant=tenant)
    whole = await encoder.encode(media, tenant=tenant)
    known = [one.words for one in whole]
    n_parts = sum(_n_parts(one.report) for one in whole)
    if n_parts > MOST_PARTS:
        raise RequestError.at("explain", f"{n_parts} parts of media, more than {MOST_PARTS}")
    tally = Tally("explain", 2 * n_parts + 2)
    NOTE.set(None)  # all that follows is counted here
    parts: list[Part] = []
    variants: list[list[MeasuredMedium]] = [list(whole)]
    nothing: list[MeasuredMedium] = []
    used = [one.report.pages for one in whole]
    coming = chain.from_iterable(
        parts_of(at, one, known[at], used[at]) for at, one in enumerate(decoded)
    )
    # In a thread, and few at once: each is as large as its medium.
    while group := await asyncio.to_thread(lambda: list(islice(coming, AT_ONCE))):
        blanks = [part.blank for part in group if part.blank is not None]
        encoded = iter(await encoder.encode(blanks, tenant=tenant, beside=media, read=False))
        for part in group:
            if part.blank is None:
                one = replace(whole[part.place], words=Words())
            elif part.what:
                words = known[part.place].without_page(part.page)
                one = replace(next(encoded), words=words)
            else:
                one = next(encoded)
                nothing.append(one)
            variants.append([*whole[: part.place], one, *whole[part.place + 1 :]])
            parts.append(replace(part, blank=None))
        tally.step(len(group))
    prompts = await make_prompts([*variants, nothing])
    tally.total = len(parts) + len(prompts)
    room = asyncio.Semaphore(SCORED_AT_ONCE)  # all together would hold up the event loop

    async def scored(prompt: Prompt) -> list[TokenLogprob]:
        async with room:
            return await score(engine, prompt)

    first, *others, last = await asyncio.gather(*(tally.counted(scored, one) for one in prompts))
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


async def score(engine: Engine, prompt: Prompt, top: int = 1) -> list[TokenLogprob]:
    """The log-probability of each token of a prompt's answer, and the likeliest at its place.

    A token's text is what it adds to the answer.
    """
    found: list[TokenLogprob] = []
    options = GenerationOptions(max_tokens=1, logprobs=top)
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

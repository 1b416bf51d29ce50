"""How finely a medium is shown: what a request asks for, and what the model has room for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from math import sqrt
from typing import Any, Literal, get_args

from mico_chat.errors import RequestError
from mico_chat.media.kinds import Kind

Detail = Literal["auto", "low", "high"]
DETAILS: tuple[str, ...] = get_args(Detail)

LOW_TOKENS = 256
"""The most context tokens of a medium of low detail, if the model can show it in so few."""

MOST_FRAMES = 1024

Sampler = Callable[[int, float], list[int]]
"""Which frames a model's own processor takes of a clip of so many frames and seconds: their numbers
from 0, in rising order."""

_OURS = ("fps", "num_frames", "do_sample_frames")
"""Settings of clips, which are sampled here before a processor gets them."""


def frames_at(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``fps`` and ``num_frames`` of an object of a request; ``where`` names it in errors."""
    found = {name: given[name] for name in _OURS[:2] if given.get(name) is not None}
    for name, value in found.items():
        whole = int if name == "num_frames" else int | float
        if isinstance(value, bool) or not isinstance(value, whole) or not 0 < value <= MOST_FRAMES:
            reason = f"expected a number above 0, at most {MOST_FRAMES}, got {value!r}"
            raise RequestError.at(f"{where}.{name}", reason)
    return found


_NUMBERS = r"\d{1,9}(?:\s*(?:-|–|,|&|and|to)\s*\d{1,9})*"  # noqa: RUF001
_NAMED_PAGES = re.compile(
    rf"\b(?:pages?|pp?\.|seiten?|páginas?|pagin[ae]|страниц\w*)\s*(?:no\.?\s*)?({_NUMBERS})"
    rf"|第\s*(\d{{1,9}})\s*[页頁ページ]|\b(\d{{1,9}})(?:st|nd|rd|th)\s+page|\b(first|last)\s+page\b",
    re.IGNORECASE,
)
_MOST_NAMED = 64  # pages of a question


def named_pages(text: str) -> tuple[int, ...]:
    """The pages that a question names by number, from 1: "pages 3 to 5"; -1 is the last one."""
    found: dict[int, None] = {}
    for several, *others in _NAMED_PAGES.findall(text):
        one = "".join(others)
        if one:
            found[{"first": 1, "last": -1}.get(one.lower()) or int(one)] = None
        before, ranged = 0, False
        for number, mark in re.findall(r"(\d+)\s*(-|–|to)?", several):  # noqa: RUF001
            first = before + 1 if ranged else int(number)
            found |= dict.fromkeys(range(first, min(int(number), first + _MOST_NAMED) + 1))
            before, ranged = int(number), bool(mark)
    return tuple(n for n in found if n)[:_MOST_NAMED]


@dataclass(frozen=True)
class View:
    """How a medium is shown.

    A request sets the first four: ``detail``, the frames that are taken of a clip, by ``fps`` or
    ``num_frames`` (with both, the fewer), and settings of the model's own ``processor`` by its
    names. Its questions name ``pages`` (:func:`named_pages`); of a document ``most_pages`` fit,
    these first. The encoder adds the most ``tokens`` that the medium may take. The model's adapter
    adds the ``pixels`` to decode of all frames or pages together, and, for a clip of which the
    request says no frames, ``usual_fps`` and ``usual_frames``, or a ``sampler``.
    """

    detail: Detail = "auto"
    fps: float | None = None
    num_frames: int | None = None
    processor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    pages: tuple[int, ...] = ()
    most_pages: int | None = None
    tokens: int | None = None
    pixels: int | None = None
    usual_fps: float | None = None
    usual_frames: int | None = None
    sampler: Sampler | None = field(default=None, compare=False, repr=False)

    def over_all(self, kind: Kind, io: Mapping[str, Any], processor: Mapping[str, Any]) -> View:
        """The view of a medium with what its request says of all media, by the names of vLLM:
        ``media_io_kwargs`` and ``mm_processor_kwargs``. What it says of the medium itself counts.
        """
        clips = io.get("video") or {}
        if io.keys() - {"video"} or clips.keys() - {"fps", "num_frames"}:
            reason = "known are video.fps and video.num_frames; leave the others out"
            raise RequestError.at("media_io_kwargs", reason)
        asked = frames_at(clips, "media_io_kwargs.video")
        asked |= frames_at(processor, "mm_processor_kwargs")
        own = self.fps is not None or self.num_frames is not None
        sampled = processor.get("do_sample_frames", True) is True
        others = {k: v for k, v in processor.items() if k not in (_OURS if sampled else _OURS[:2])}
        return replace(self, **({} if own or kind != "video" else asked), processor=others)

    def in_turn(self, total: int) -> Iterator[int]:
        """The numbers of a document's pages: those first that the questions name."""
        named = (n if n > 0 else total + 1 + n for n in self.pages)
        first = dict.fromkeys(n for n in named if 0 < n <= total)
        return chain(first, (n for n in range(1, total + 1) if n not in first))

    def scale(self, area: int) -> float:
        """The factor, at most 1, by which pictures of an area shrink to ``pixels``."""
        return 1.0 if self.pixels is None else min(1.0, sqrt(self.pixels / area))

    def frames(self, seconds: float) -> float | None:
        """The frames that the request asks for of a clip of some seconds; None: it does not."""
        asked = [float(self.num_frames)] if self.num_frames is not None else []
        asked += [] if self.fps is None else [max(1.0, round(self.fps * seconds))]
        return min(asked, default=None)

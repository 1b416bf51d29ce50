"""How finely a medium is shown: what a request asks for, and what the model has room for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any, Literal, get_args

from mico_chat.errors import RequestError
from mico_chat.media.kinds import Kind

Detail = Literal["auto", "low", "high"]
DETAILS: tuple[str, ...] = get_args(Detail)

LOW_TOKENS = 256
"""The most context tokens of a medium of low detail, if the model can show it in so few."""

MOST_FRAMES = 1024

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


@dataclass(frozen=True)
class View:
    """How a medium is shown.

    A request sets the first four: ``detail``, the frames that are taken of a clip, by ``fps`` or
    ``num_frames`` (with both, the fewer), and settings of the model's own ``processor`` by its
    names. The encoder adds the most ``tokens`` that the medium may take. The model's adapter adds
    the ``pixels`` to decode of all frames or pages together, and, for a clip of which the request
    says no frames, ``usual_fps`` and ``usual_frames``.
    """

    detail: Detail = "auto"
    fps: float | None = None
    num_frames: int | None = None
    processor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tokens: int | None = None
    pixels: int | None = None
    usual_fps: float | None = None
    usual_frames: int | None = None

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

    def scale(self, area: int) -> float:
        """The factor, at most 1, by which pictures of an area shrink to ``pixels``."""
        return 1.0 if self.pixels is None else min(1.0, sqrt(self.pixels / area))

    def frames(self, seconds: float) -> float | None:
        """The frames that the request asks for of a clip of some seconds; None: it does not."""
        asked = [float(self.num_frames)] if self.num_frames is not None else []
        asked += [] if self.fps is None else [max(1.0, round(self.fps * seconds))]
        return min(asked, default=None)

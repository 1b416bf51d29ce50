"""What an annotator is: a plain class with a batch of clips in and a batch of annotations out.

A recipe names it, one that comes with the project (:data:`OURS`) or anybody's own::

    annotators:
      - use: speech
      - use: my_package.depths:Depths     # options are the class's arguments
        options: {model: large}
        batch_size: 16
        gpus: 1

One instance serves one process, and loads its model when it is made.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import ConfigError
from mico_chat.media import Audio, Video
from mico_corpus.cutting.footage import frames_of, sound_of
from mico_corpus.rows import Row

Role = Literal["caption", "speech", "text", "depth", "normal", "tag", "safety"]
Shown = Literal["image", "video", "audio"]
"""A text describes one of these of a clip: its middle frame, its frames, or its sound track."""
SILENCE = -70.0
"""A sound track below this, in dB of full scale, is silent: a model would invent what it says."""


@dataclass(frozen=True)
class Annotation:
    """One statement about one medium of a clip.

    ``text`` is a caption, what is said, what is written, or a tag's name. ``data`` is an encoded
    map: a PNG as :mod:`mico_chat.media.maps` reads it. ``medium`` is one of :data:`Shown`, or of
    :meth:`Clip.stills`. ``score`` is the annotator's own, higher is
    surer; of "safety" it is how unsafe the clip is, 0 to 1. NaN: it gives none. ``start`` and
    ``end`` are seconds of the clip, for speech and written text.
    """

    annotator: str
    version: str
    role: Role
    medium: str
    text: str = ""
    score: float = float("nan")
    data: bytes = field(default=b"", repr=False)
    start: float = float("nan")
    end: float = float("nan")


@dataclass(frozen=True)
class Clip:
    """A clip of the manifest, and what earlier annotators said of it.

    ``row`` is as :data:`mico_corpus.rows.CLIP`. Frames and sound are decoded when they are
    asked for; the last few clips' stay in memory, so that the annotators of one process share them.
    """

    row: Row
    annotations: tuple[Annotation, ...] = ()
    images: int = field(default=1, kw_only=True)

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def seconds(self) -> float:
        return float(self.row["end"] - self.row["start"])

    def frames(self, n: int = 8, side: int = 448) -> Video:
        """``n`` frames, the middles of equal parts of the clip; no side is longer than ``side``.

        Raises:
            MediaError: no frame can be decoded.
        """
        return frames_of(self.row, n, side)

    def middle(self, side: int = 448) -> Video:
        """The middle frame alone."""
        return self.frames(1, side)

    def stills(self, side: int = 448) -> dict[str, NDArray[np.uint8]]:
        """The pictures that are written beside the clip, by name: "image", "image2", .."""
        frames = self.frames(self.images, side).frames
        return {f"image{n}" if n > 1 else "image": one for n, one in enumerate(frames, start=1)}

    @cached_property
    def sound(self) -> Audio | None:
        """The sound track, 16 kHz mono; None if there is none, or only silence, or it cannot be
        decoded."""
        loudness = self.row.get("loudness")
        if loudness is not None and loudness < SILENCE:
            return None
        return sound_of(self.row)

    def said(self, role: Role, medium: str | None = None) -> tuple[Annotation, ...]:
        found = (a for a in self.annotations if a.role == role)
        return tuple(a for a in found if medium is None or a.medium == medium)

    def maps(self, role: Role) -> dict[str, Annotation]:
        """The first map of each picture, by the picture's name: those that are packed."""
        return {a.medium: a for a in reversed(self.said(role))}


class Annotator(Protocol):
    """``version`` names model, weights and settings: it changes whenever the answers may."""

    name: str
    version: str

    def __call__(self, clips: Sequence[Clip]) -> Sequence[Sequence[Annotation]]:
        """The annotations of each clip, none if there is nothing to say.

        Raises:
            MediaError: of a batch of one; a larger batch is then asked one by one.
        """
        ...


_HERE = __name__.rpartition(".")[0]
OURS: dict[str, str] = {
    "caption": f"{_HERE}.captions:Captions",
    "speech": f"{_HERE}.words:Speech",
    "text": f"{_HERE}.words:Text",
    "depth": f"{_HERE}.depth:Depths",
    "normal": f"{_HERE}.normals:Normals",
    "fuse": f"{_HERE}.fusion:Fusion",
    "tags": f"{_HERE}.tags:Tags",
    "safety": f"{_HERE}.safety:Safety",
}
"""It maps a name in a recipe to ``module:class``."""


def annotator_class(use: str) -> type[Any]:
    """The class that ``use`` names; a ConfigError lists what there is."""
    path = OURS.get(use, use)
    module, colon, name = path.partition(":")
    if not colon:
        known = ", ".join(sorted(OURS))
        raise ConfigError(
            f"annotators: use: {use!r} is none of {known}, and no 'package.module:Class'"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"annotators: use: {use!r} cannot be imported: {error}") from error
    return found  # type: ignore[no-any-return]


def check_options(use: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the class does not take, before hours of work and not after them."""
    taken = inspect.signature(annotator_class(use)).parameters.values()
    named = {one.name: one for one in taken if one.kind is not one.VAR_KEYWORD}
    if len(named) == len(taken) and (unknown := sorted(options.keys() - named)):
        raise ConfigError(
            f"{use}: it lacks the option {unknown[0]!r}; its options are {', '.join(named)}"
        )
    if missing := [n for n, one in named.items() if one.default is one.empty and n not in options]:
        raise ConfigError(f"{use}: the option {missing[0]!r} is needed")

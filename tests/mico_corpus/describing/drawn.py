"""Clips whose frames and sound are arrays: annotators are tested without a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media import Audio, Video
from mico_corpus.describing.base import Annotation, Clip, annotator_class


@dataclass(frozen=True)
class Drawn(Clip):
    """``pictures`` (T, H, W, 3) are shown for equal times; without them no frame can be decoded."""

    pictures: NDArray[np.uint8] | None = None
    samples: NDArray[np.float32] | None = None
    asked: list[tuple[int, int]] = field(default_factory=list)

    def frames(self, n: int = 8, side: int = 448) -> Video:
        self.asked.append((n, side))
        if self.pictures is None:
            raise MediaError(self.id, "no frame can be decoded")
        centres = (2 * np.arange(n) + 1) / (2 * n)
        places = (centres * len(self.pictures)).astype(int)
        return Video(self.pictures[places], centres * self.seconds)

    @property
    def sound(self) -> Audio | None:
        return None if self.samples is None else Audio(self.samples)


def drawn(
    pictures: NDArray[np.uint8] | None = None,
    samples: NDArray[np.float32] | None = None,
    *,
    id: str = "a",
    seconds: float = 6.0,
    said: Sequence[Annotation] = (),
    **row: Any,
) -> Drawn:
    row = {"id": id, "start": 10.0, "end": 10.0 + seconds, "text": ""} | row
    return Drawn(row, tuple(said), pictures, samples)


def plain(*greys: int, size: tuple[int, int] = (36, 48)) -> NDArray[np.uint8]:
    """Pictures of one grey each, (T, H, W, 3)."""
    return np.stack([np.full((*size, 3), grey, np.uint8) for grey in greys])


def made(use: str, **options: Any) -> Any:
    """An annotator as a recipe makes it."""
    return annotator_class(use)(**options)

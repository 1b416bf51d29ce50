"""Depth of a clip's pictures, estimated from the picture alone, and never as a min-max picture.

Metres stay metres (a 16-bit PNG of millimetres); a model that only knows what is nearer gives
inverse distances. The PNG says which, and which model estimated it
(:class:`mico_chat.media.maps.DepthMark`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForDepthEstimation

from mico_chat.evaluation.task import files_fingerprint
from mico_chat.reading.depths import SMALL, LargeDepth, SmallDepth, depth_png
from mico_corpus.describing.base import Annotation, Clip
from mico_corpus.describing.naming import version_of
from mico_corpus.describing.vision import VisionModel, pictures_of


class Depths:
    """Depth of the pictures, by the mini's small network or by a model of transformers'
    ``AutoModelForDepthEstimation``: its name, such as
    "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf", or a folder.

    ``metric``: whether it gives metres; by default its configuration says so. ``side``: the longest
    side of a picture and of its map.
    """

    name = "depth"

    def __init__(
        self,
        model: str = SMALL,
        metric: bool | None = None,
        side: int = 448,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        self._side = side
        self._model: SmallDepth | LargeDepth
        if model == SMALL:
            self._model = small = SmallDepth()
            weights = files_fingerprint(small.files)
            self.version = version_of(small.name, weights, unit=small.unit, side=side)
        else:
            loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
            auto = AutoModelForDepthEstimation
            vision = VisionModel(self.name, auto, model, at_once=at_once, **loading)
            self._model = LargeDepth(vision, metric)
            self.version = vision.version(unit=self._model.unit, side=side)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        shown = pictures_of(clips, self._side)
        found: list[list[Annotation]] = [[] for _ in clips]
        for number, values in self._model([pixels for *_, pixels in shown]):
            if (data := depth_png(values, self._model)) is not None:
                place, name, _ = shown[number]
                said = Annotation(self.name, self.version, "depth", name, data=data)
                found[place].append(said)
        return found

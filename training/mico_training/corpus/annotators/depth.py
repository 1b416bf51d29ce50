"""Depth of a clip's middle frame, estimated from the picture alone, and never as a min-max picture.

Metres stay metres (a 16-bit PNG of millimetres); a model that only knows what is nearer gives
inverse distances. The PNG says which, and which model estimated it
(:class:`mico_chat.media.maps.DepthMark`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from transformers import AutoModelForDepthEstimation

from mico_chat.errors import ConfigError
from mico_chat.media.maps import encode_depth
from mico_training.corpus.annotators.base import Annotation, Clip
from mico_training.corpus.annotators.vision import VisionModel

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf"
IN_METRES = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")
"""Types of models that give metres; those of Depth Anything say it in their configuration."""
RELATIVE = ("dpt",)
"""MiDaS: inverse distances without a unit."""


class Depths:
    """Depth of the middle frame, by a model of transformers' ``AutoModelForDepthEstimation``.

    ``metric``: whether it gives metres; by default its configuration says so. ``side``: the longest
    side of the frame and of the map.
    """

    name = "depth"

    def __init__(
        self,
        model: str = DEPTH_MODEL,
        metric: bool | None = None,
        side: int = 448,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        self._model = VisionModel(
            self.name,
            AutoModelForDepthEstimation,
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            at_once=at_once,
        )
        config = self._model.model.config
        self._unit: Literal["metre", "inverse"] = (
            "metre" if (gives_metres(config) if metric is None else metric) else "inverse"
        )
        self._side = side
        self.version = self._model.version(unit=self._unit, side=side)
        self._estimated = re.sub(r"[^\w./:@+-]", "_", self._model.name)[:96]

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        pictures = [clip.middle(self._side).frames[0] for clip in clips]
        found: list[list[Annotation]] = [[] for _ in clips]
        for places, outputs, sizes in self._model.outputs(pictures):
            # The second argument is the size of the pictures, whatever a processor calls it.
            maps = self._model.processor.post_process_depth_estimation(outputs, sizes)
            for place, one in zip(places, maps, strict=True):
                values = one["predicted_depth"].squeeze().float().cpu().numpy()
                if (np.isfinite(values) & (values > 0)).any():
                    data = encode_depth(values, self._unit, self._estimated)
                    found[place].append(
                        Annotation(self.name, self.version, "depth", "image", data=data)
                    )
        return found


def gives_metres(config: Any) -> bool:
    """Whether the depths of a model are metres, by its configuration."""
    said = getattr(config, "depth_estimation_type", None)  # Depth Anything has it
    if said is not None:
        return bool(said == "metric")
    if config.model_type in (*IN_METRES, *RELATIVE):
        return config.model_type in IN_METRES
    raise ConfigError(
        f"depth: a model of the type {config.model_type!r} does not say whether it gives metres: "
        "set metric to true or false"
    )

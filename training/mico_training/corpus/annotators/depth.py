"""Depth of a clip's middle frame, estimated from the picture alone, and never as a min-max picture.

Metres stay metres (a 16-bit PNG of millimetres); a model that only knows what is nearer gives
inverse distances. The PNG says which, and which model estimated it
(:class:`mico_chat.media.maps.DepthMark`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import AutoModelForDepthEstimation

from mico_chat.checkpoints.load import named_folder
from mico_chat.errors import ConfigError
from mico_chat.evaluation.task import files_fingerprint
from mico_chat.media.maps import encode_depth
from mico_chat.model.depth import WEIGHTS, load_depth_net
from mico_training.corpus.annotators.base import Annotation, Clip
from mico_training.corpus.annotators.naming import version_of
from mico_training.corpus.annotators.vision import VisionModel

SMALL = "mini"
"""The network that comes with the mini: for machines without a hub, and tests."""
IN_METRES = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")
"""Types of models that give metres; those of Depth Anything say it in their configuration."""
RELATIVE = ("dpt",)
"""MiDaS: inverse distances without a unit."""


class Depths:
    """Depth of the middle frame, by the mini's small network or by a model of transformers'
    ``AutoModelForDepthEstimation``: its name, such as
    "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf", or a folder.

    ``metric``: whether it gives metres; by default its configuration says so. ``side``: the longest
    side of the frame and of the map.
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
        self._estimator: Small | Large
        if model == SMALL:
            self._estimator = Small()
        else:
            self._estimator = Large(
                metric,
                model,
                revision=revision,
                device=device,
                dtype=dtype,
                at_once=at_once,
            )
        self.version = self._estimator.version(unit=self._estimator.unit, side=side)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        pictures = [clip.middle(self._side).frames[0] for clip in clips]
        found: list[list[Annotation]] = [[] for _ in clips]
        estimated = re.sub(r"[^\w./:@+-]", "_", self._estimator.name)[:96]
        for place, values in self._estimator(pictures):
            if (np.isfinite(values) & (values > 0)).any():
                data = encode_depth(values, self._estimator.unit, estimated)
                found[place].append(
                    Annotation(self.name, self.version, "depth", "image", data=data)
                )
        return found


Guesses = Iterator[tuple[int, NDArray[np.floating]]]
"""The place of each picture, and its map (H, W)."""


class Small:
    """The mini's network, on the CPU."""

    name = "mini-depth"
    unit: Literal["metre", "inverse"] = "inverse"

    def __init__(self) -> None:
        _, folder = named_folder(SMALL)
        self._net = load_depth_net(folder)
        self._weights = files_fingerprint([folder / "model.safetensors", folder / WEIGHTS])

    def version(self, **settings: Any) -> str:
        return version_of(self.name, self._weights, **settings)

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Guesses:
        return ((place, self._net.nearness(one)) for place, one in enumerate(pictures))


class Large:
    """A model of transformers'; its configuration says whether it gives metres, or ``metric``."""

    def __init__(self, metric: bool | None, model: str, **loading: Any) -> None:
        self._model = VisionModel(Depths.name, AutoModelForDepthEstimation, model, **loading)
        metres = gives_metres(self._model.model.config) if metric is None else metric
        self.unit: Literal["metre", "inverse"] = "metre" if metres else "inverse"
        self.name, self.version = self._model.name, self._model.version

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Guesses:
        for places, outputs, sizes in self._model.outputs(pictures):
            # The second argument is the size of the pictures, whatever a processor calls it.
            maps = self._model.processor.post_process_depth_estimation(outputs, sizes)
            for place, one in zip(places, maps, strict=True):
                yield place, one["predicted_depth"].squeeze().float().cpu().numpy()


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

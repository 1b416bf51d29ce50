"""Estimates the distances in a picture from the picture alone: a depth map that says so.

The map is a file like one that somebody gives (:func:`mico_chat.media.maps.encode_depth`), so that
the model, the reports and the page treat it as a depth map; its mark names the estimator.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from mico_chat.checkpoints.configs import named_folder
from mico_chat.checkpoints.folders import model_folder
from mico_chat.errors import ConfigError, MediaError, MicoError, ModelError
from mico_chat.late import late
from mico_chat.media.kinds import Kind
from mico_chat.media.maps import encode_depth
from mico_chat.media.medium import Image
from mico_chat.model.mini.depth import WEIGHTS, DepthNet, load_depth_net

# It brings transformers.
with late():
    from mico_chat.reading import vision

SMALL = "mini"
"""The network that comes with the mini: for machines without a hub."""
IN_METRES = ("depth_pro", "glpn", "tipsv2_dpt", "zoedepth")
"""Types of models that give metres; those of Depth Anything say it in their configuration."""
RELATIVE = ("dpt",)
"""MiDaS gives inverse distances without a unit."""

SIDE = 518
"""The longest side of an estimated map: that of the pictures on which Depth Anything was trained.
"""
MOST_LONGER = 10
"""A picture whose sides differ by a larger factor gets no estimate. Models scale the shorter side
up to hundreds of pixels, so that a picture of 1 x 5,000 would take all memory."""

Guesses = Iterator[tuple[int, NDArray[np.floating]]]
"""It gives the place of each picture, and its map (H, W)."""


class DepthModel(Protocol):
    """Maps (H, W) of pictures (H, W, 3): distances in metres, or inverse ones without a unit."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Literal["metre", "inverse"]: ...

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Guesses: ...


class SmallDepth:
    """The mini's network, on the CPU. Its weights are read for the first picture."""

    name = "mini-depth"
    unit: Literal["metre", "inverse"] = "inverse"

    def __init__(self) -> None:
        _, folder = named_folder(SMALL)
        self.files = [folder / "model.safetensors", folder / WEIGHTS]

    @functools.cached_property
    def _net(self) -> DepthNet:
        return load_depth_net(self.files[0].parent)

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Guesses:
        return ((place, self._net.nearness(one)) for place, one in enumerate(pictures))


class LargeDepth:
    """A loaded model of transformers' ``AutoModelForDepthEstimation``.

    Its configuration says whether it gives metres, or ``metric``.
    """

    def __init__(self, vision: Any, metric: bool | None = None) -> None:
        self.vision = vision
        self.name: str = vision.name
        metres = gives_metres(vision.model.config) if metric is None else metric
        self.unit: Literal["metre", "inverse"] = "metre" if metres else "inverse"

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> Guesses:
        for places, outputs, sizes in self.vision.outputs(pictures):
            # The second argument is the size of the pictures, whatever a processor calls it.
            maps = self.vision.processor.post_process_depth_estimation(outputs, sizes)
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
        "name another one, or, for an annotator: set metric to true or false"
    )


def depth_png(values: NDArray[np.floating], model: DepthModel) -> bytes | None:
    """The PNG of a map that a model gave, marked as estimated; None if it has no distance."""
    if not (np.isfinite(values) & (values > 0)).any():
        return None
    return encode_depth(values, model.unit, re.sub(r"[^\w./:@+-]", "_", model.name)[:96])


# --- for questions --------------------------------------------------------------------------------


class DepthEstimator:
    """Makes depth maps of pictures. Threads may share it: it computes one map at a time."""

    def __init__(self, model: DepthModel) -> None:
        self.name = model.name
        self._model = model
        self._lock = threading.Lock()

    def estimate(self, picture: Image) -> bytes:
        """The depth map of a picture, as a PNG."""
        height, width = picture.pixels.shape[:2]
        if max(height, width) > MOST_LONGER * min(height, width):
            reason = f"its longer side may be at most {MOST_LONGER} times the shorter one"
            raise MediaError(picture.name, f"no depth can be estimated: {reason}")
        scale = SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = np.asarray(Pillow.fromarray(picture.pixels).resize(size))
        with self._lock:
            ((_, values),) = self._model([pixels])
        data = depth_png(values, self._model)
        if data is None:
            raise MediaError(picture.name, f"no depth can be estimated: {self.name} sees none")
        return data


def offered(kinds: Collection[Kind]) -> str | None:
    """What estimates depth where nobody chose it, for a model that reads ``kinds``: the small
    network, if it is on this machine."""
    here = "depth" in kinds and all(file.is_file() for file in SmallDepth().files)
    return SMALL if here else None


@functools.cache
def depth_estimator(model: str, device: str | None = None) -> DepthEstimator:
    """The estimator of a name: :data:`SMALL`, or a hub name or folder of transformers' models.

    The models of one process share it. ``device`` is by default the first GPU, else the CPU.

    Raises:
        ConfigError, ModelError: there is no such model, it is of another type, or it fails.
    """
    if model == SMALL:
        return DepthEstimator(SmallDepth())
    asked = "depth (MICO_DEPTH_MODEL)"
    try:
        folder = model_folder(model)
        from transformers import AutoModelForDepthEstimation

        large = vision.VisionModel(asked, AutoModelForDepthEstimation, folder, device=device)
        found = DepthEstimator(LargeDepth(large))
    except MicoError as error:
        text = str(error).removeprefix("depth: ").removeprefix(f"{asked}: ")
        advice = "name a depth estimator of transformers, its folder, or mini"
        raise ModelError(f"{asked}: {text}; {advice}") from error
    _try(found)
    return found


def _try(estimator: DepthEstimator) -> None:
    """Estimate one picture, so that a model which cannot do it is refused at the start."""
    try:
        estimator.estimate(Image(np.full((SIDE, SIDE, 3), 127, np.uint8)))
    except MediaError:  # a grey picture has no depth
        return
    except Exception as error:  # a model may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = f"depth (MICO_DEPTH_MODEL): {estimator.name} cannot estimate depth: {reason}"
        advice = "name another depth estimator of transformers, or mini"
        raise ModelError(f"{found}; {advice}") from error

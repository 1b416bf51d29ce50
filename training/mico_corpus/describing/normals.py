"""Surface normals of a clip's pictures: by a model, or derived from metric depth."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from mico_chat.errors import ConfigError
from mico_chat.media import Depth, MediaFile, MediaLimits
from mico_chat.media.maps import decode_depth
from mico_corpus.describing.base import Annotation, Clip
from mico_corpus.describing.naming import version_of
from mico_corpus.describing.vision import VisionModel, pictures_of

Floats = NDArray[np.floating[Any]]


class Normals:
    """Normals of the pictures as colours: x, to the right, is red, y up green, z to the viewer
    blue, each (n + 1) / 2 * 255; black where nobody knows.

    ``model`` is one of transformers' ``AutoModelForNormalEstimation``. Its axes are taken as they
    are, or with ``opencv`` as x right, y down, z away from the viewer. Without a model, normals are
    derived from the depth that an annotator before this one estimated in metres, for a camera that
    sees ``fov`` degrees from left to right.
    """

    name = "normal"

    def __init__(
        self,
        model: str | None = None,
        opencv: bool = False,
        fov: float = 60.0,
        side: int = 448,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        if not 5 <= fov <= 170:
            raise ConfigError(f"normal: fov: expected 5 to 170 degrees, got {fov:g}")
        self._model: VisionModel | None = None
        self._opencv, self._fov, self._side = opencv, fov, side
        if model is None:
            self.version = version_of("from-depth", "1", fov=fov)
            return
        from transformers import AutoModelForNormalEstimation

        loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
        auto = AutoModelForNormalEstimation
        self._model = VisionModel(self.name, auto, model, at_once=at_once, **loading)
        self.version = self._model.version(opencv=opencv, side=side)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        found: list[list[Annotation]] = [[] for _ in clips]
        maps = self._derived(clips) if self._model is None else self._seen(clips)
        for place, name, normals in maps:
            data = normal_png(normals)
            found[place].append(Annotation(self.name, self.version, "normal", name, data=data))
        return found

    def _seen(self, clips: Sequence[Clip]) -> Iterator[tuple[int, str, Floats]]:
        assert self._model is not None
        shown = pictures_of(clips, self._side)
        axes = (1, -1, -1) if self._opencv else (1, 1, 1)
        for places, outputs, sizes in self._model.outputs([pixels for *_, pixels in shown]):
            maps = self._model.processor.post_process_normal_estimation(outputs, sizes)
            for number, one in zip(places, maps, strict=True):
                place, name, _ = shown[number]
                yield place, name, one["normals"].float().cpu().numpy().transpose(1, 2, 0) * axes

    def _derived(self, clips: Sequence[Clip]) -> Iterator[tuple[int, str, Floats]]:
        for place, clip in enumerate(clips):
            for depth in clip.maps("depth").values():
                read = decode_depth(MediaFile("depth", depth.data, clip.id), MediaLimits())
                if not read.metric:
                    raise ConfigError(
                        f"normal: {depth.annotator!r} gives relative depth, from which no normals "
                        "follow: name a model of metric depth, or one of normals"
                    )
                yield place, depth.medium, normals_of(read, self._fov)


def normals_of(depth: Depth, fov: float) -> Floats:
    """Normals (H, W, 3) of a metric depth map; NaN at its holes and beside them."""
    height, width = depth.values.shape
    if min(height, width) < 2:
        return np.zeros((height, width, 3))
    focal = width / (2 * np.tan(np.radians(fov) / 2))  # pixels
    z = depth.values.astype(np.float64)
    x = (np.arange(width) + 0.5 - width / 2) / focal * z
    y = -(np.arange(height) + 0.5 - height / 2)[:, None] / focal * z
    points = np.stack([x, y, -z], -1)  # x right, y up, z to the viewer
    return np.cross(np.gradient(points, axis=0), np.gradient(points, axis=1))


def normal_png(normals: Floats) -> bytes:
    """Normals (H, W, 3) of any length as a PNG; black where one is not finite or 0."""
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    known = np.isfinite(length) & (length > 0)
    units = np.divide(normals, length, out=np.zeros_like(normals), where=known)
    pixels = np.where(known, ((units + 1) * 127.5).round(), 0).astype(np.uint8)
    data = io.BytesIO()
    PIL.Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()

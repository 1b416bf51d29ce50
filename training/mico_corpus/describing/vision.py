"""The library's vision models with the version that annotations keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.engines.base import DTYPES
from mico_chat.engines.devices import check_device
from mico_chat.errors import ConfigError
from mico_chat.evaluation.chat import folder_fingerprint
from mico_chat.reading import vision
from mico_corpus.describing.base import Clip
from mico_corpus.describing.naming import version_of


def pictures_of(clips: Sequence[Clip], side: int) -> list[tuple[int, str, NDArray[np.uint8]]]:
    """The pictures of all clips: the place of the clip, the picture's name, its pixels."""
    named = ((place, clip.stills(side)) for place, clip in enumerate(clips))
    return [(place, name, one) for place, found in named for name, one in found.items()]


class VisionModel(vision.VisionModel):
    """A model of ``auto``, one of transformers' Auto classes, for the annotator of a name."""

    def __init__(
        self, annotator: str, auto: Any, model: str, *, dtype: str = "float32", **loading: Any
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"{annotator}: dtype: expected one of {DTYPES}, got {dtype!r}")
        if loading.get("device") is not None:
            check_device(loading["device"])
        super().__init__(annotator, auto, model, dtype=dtype, **loading)
        folder = Path(model)
        commit = getattr(self.config, "_commit_hash", None)  # of the hub; a folder has none
        self.weights = folder_fingerprint(folder) if folder.is_dir() else str(commit)[:12]
        self._settings = {"dtype": dtype}

    def version(self, **settings: Any) -> str:
        return version_of(self.name, self.weights, **self._settings, **settings)

"""Models of transformers that turn pictures into maps or labels, by hub name or folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoImageProcessor

from mico_chat.checkpoints.folders import hub_reason, model_name
from mico_chat.errors import ConfigError, ModelError
from mico_chat.evaluation.chat import folder_fingerprint
from mico_chat.load import DTYPES, check_device
from mico_training.corpus.annotators.naming import version_of

ON_A_GPU = 16
"""Pictures at once on a GPU; on a CPU one, which is as fast and has the same bits in any batch."""


class VisionModel:
    """A model of ``auto``, one of transformers' Auto classes, and its image processor.

    ``device`` is by default the first GPU, else the CPU. ``at_once``: pictures in a step.
    """

    def __init__(
        self,
        annotator: str,
        auto: Any,
        model: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"{annotator}: dtype: expected one of {DTYPES}, got {dtype!r}")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(self.device)
        where = {"revision": revision}
        try:
            config = AutoConfig.from_pretrained(model, **where)
            kind = auto._model_mapping.get(type(config), None)
            if kind is None:
                raise ConfigError(
                    f"{annotator}: {model} is of the type {config.model_type!r}, which "
                    f"{auto.__name__} does not load: name another model"
                )
            loaded = auto.from_pretrained(model, dtype=getattr(torch, dtype), **where)
            self.processor = AutoImageProcessor.from_pretrained(model, **where)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if Path(model).is_dir() else hub_reason(error)
            raise ModelError(f"{annotator}: {model} cannot be loaded: {reason}") from error
        self.model = loaded.to(self.device).eval()
        self.name = model_name(model)
        folder = Path(model)
        commit = getattr(config, "_commit_hash", None)  # of the hub; a folder has none
        self.weights = folder_fingerprint(folder) if folder.is_dir() else str(commit)[:12]
        self._settings = {"dtype": dtype}
        self._at_once = at_once or (1 if self.device.startswith("cpu") else ON_A_GPU)

    def version(self, **settings: Any) -> str:
        return version_of(self.name, self.weights, **self._settings, **settings)

    def outputs(
        self, pictures: Sequence[NDArray[np.uint8]]
    ) -> Iterator[tuple[list[int], Any, list[tuple[int, int]]]]:
        """Steps over pictures (H, W, 3): their places, the model's output, their sizes (H, W)."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for place, picture in enumerate(pictures):
            by_size.setdefault((picture.shape[0], picture.shape[1]), []).append(place)
        for size, alike in by_size.items():
            for start in range(0, len(alike), self._at_once):
                places = alike[start : start + self._at_once]
                shown = [PIL.Image.fromarray(pictures[place]) for place in places]
                inputs = self.processor(images=shown, return_tensors="pt")
                inputs = inputs.to(self.device, self.model.dtype)
                with torch.inference_mode():
                    found = self.model(**inputs)
                yield places, found, [size] * len(places)

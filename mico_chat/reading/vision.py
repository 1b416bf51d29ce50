"""Models of transformers that turn pictures into maps or labels, by hub name or folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoImageProcessor

from mico_chat.checkpoints.folders import model_name
from mico_chat.checkpoints.hub import hub_reason
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.auto import AutoConfig

ON_A_GPU = 16
"""Pictures at once on a GPU; on a CPU one, which is as fast and has the same bits in any batch."""


class VisionModel:
    """A model of ``auto``, one of transformers' Auto classes, and its image processor.

    Errors begin with ``asked``, who wants the model. ``device`` is by default the first GPU, else
    the CPU. ``at_once``: pictures in a step.
    """

    def __init__(
        self,
        asked: str,
        auto: Any,
        model: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        where = {"revision": revision}
        try:
            self.config: Any = AutoConfig.from_pretrained(model, **where)
            kind = auto._model_mapping.get(type(self.config), None)
            if kind is None:
                raise ConfigError(
                    f"{asked}: {model} is of the type {self.config.model_type!r}, which "
                    f"{auto.__name__} does not load: name another model"
                )
            loaded = auto.from_pretrained(model, dtype=getattr(torch, dtype), **where)
            self.processor = AutoImageProcessor.from_pretrained(model, **where)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0] if Path(model).is_dir() else hub_reason(error)
            raise ModelError(f"{asked}: {model} cannot be loaded: {reason}") from error
        self.model = loaded.to(self.device).eval()
        self.name = model_name(model)
        self._at_once = at_once or (1 if self.device.startswith("cpu") else ON_A_GPU)

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

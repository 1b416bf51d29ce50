"""Pictures of other sensors: thermal, X-ray; and pictures, depth and normal maps as they are.

One channel, of any range (a 16-bit sensor's counts, degrees), is stretched between the 1st and 99th
percentile of the training pictures and shown in all three channels of the encoder's own patch
embedding: pretrained filters find edges in heat as in light. 8-bit colour is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from mico_chat.model.preprocessing import Preprocessing
from mico_training.research.modalities.samples import Array, InputSpec, Sample


class PictureInput(InputSpec):
    """How a picture's values become pixels of the encoder."""

    kind: Literal["picture"] = "picture"
    preprocessing: Preprocessing
    low: float
    high: float

    @classmethod
    def fit(cls, samples: Sequence[Sample], preprocessing: Preprocessing) -> PictureInput:
        arrays = [_checked(sample) for sample in samples]
        low, high = 0.0, 255.0
        if any(array.ndim == 2 for array in arrays):
            # Evenly spread values are enough for a percentile, and fit memory.
            few = np.concatenate([a.ravel()[:: max(1, a.size // 4096)] for a in arrays])
            low, high = (float(v) for v in np.percentile(few, (1, 99)))
        return cls(preprocessing=preprocessing, low=low, high=high if high > low else low + 1.0)

    def arrays(self, sample: Sample) -> dict[str, Array]:
        picture = torch.from_numpy(_checked(sample))
        if picture.ndim == 2:
            scaled = ((picture - self.low) / (self.high - self.low)).clamp(0, 1)
            x = scaled.expand(3, -1, -1)
        else:
            x = (picture / 255).clamp(0, 1).permute(2, 0, 1)
        size = [self.preprocessing.image_size] * 2
        x = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (self.preprocessing.image_mean, self.preprocessing.image_std)
        )
        return {"pixel_values": ((x - mean) / std).numpy()}


def _checked(sample: Sample) -> Array:
    """A picture (H, W) or (H, W, 3) as float32; (H, W, 1) loses its last axis."""
    raw = np.asarray(sample.values)
    if raw.ndim == 3 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    array = sample.array("a picture", raw, 3 if raw.ndim == 3 else 2)
    if 0 in array.shape or (array.ndim == 3 and array.shape[-1] != 3):
        raise sample.error(f"the picture has the shape {array.shape}, expected (H, W) or (H, W, 3)")
    return array

"""Time series, inertial measurements, spectra: windows along one axis become tokens.

Legend: B samples, L steps (bands of a spectrum), C channels (pixels of a patch), P steps a token,
N = ceil(L / P) tokens, D encoder width. Windows do not overlap, as in PatchTST; a spectrum's
windows are SpectralFormer's groups of neighbouring bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_training.research.modalities.samples import Array, InputSpec, Sample, padded, spread


class SequenceInput(InputSpec):
    """Statistics of training sequences.

    ``mean`` and ``std`` are (1, C), or (L, C) where every step has its own (a spectrum's bands).
    """

    kind: Literal["sequence"] = "sequence"
    channels: int
    patch: int
    max_length: int
    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, samples: Sequence[Sample], patch: int, by_step: bool = False) -> SequenceInput:
        """Statistics of training samples, which must have the channels (bands) of the first."""
        arrays = [sample.array("a sequence", sample.values, 2) for sample in samples]
        for sample, array in zip(samples, arrays, strict=True):
            differ = array.shape != arrays[0].shape
            if differ if by_step else array.shape[1] != arrays[0].shape[1]:
                raise sample.error(
                    f"the shape is {array.shape}, but that of the first sample is {arrays[0].shape}"
                )
        if by_step:
            mean, std = spread(np.stack(arrays), 0)
        else:
            mean, std = (x[None] for x in spread(np.concatenate(arrays), 0))
        return cls(
            channels=arrays[0].shape[1],
            patch=patch,
            max_length=max(len(array) for array in arrays),
            mean=tuple(map(tuple, mean.tolist())),
            std=tuple(map(tuple, std.tolist())),
        )

    @property
    def n_tokens(self) -> int:
        return -(-self.max_length // self.patch)

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """Standardised ``values`` (L, C), of the training data's channels and length."""
        values = sample.array("a sequence", sample.values, 2)
        has = None
        if values.shape[1] != self.channels:
            has = f"{values.shape[1]} channels, but the model has {self.channels}"
        elif not 0 < len(values) <= self.max_length:
            has = f"{len(values)} steps, but the model takes 1 to {self.max_length}"
        elif len(self.mean) not in (1, len(values)):
            has = f"{len(values)} bands, but the model has {len(self.mean)}"
        if has is not None:
            raise sample.error(f"the sequence has {has}")
        return {"values": self.standardise(values)}

    def standardise(self, values: Array) -> Array:
        """Values (L, C) on the training scale."""
        scaled: Array = ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        return scaled

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        """``values`` (B, L, C), zeros behind the end, and ``mask`` (B, L)."""
        return dict(zip(("values", "mask"), padded(arrays, "values"), strict=True))


class SequenceTokenizer(nn.Module):
    """A linear projection of each window, plus a learned position."""

    def __init__(self, spec: SequenceInput, embed_dim: int, channels: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.project = nn.Linear(spec.patch * channels, embed_dim)
        self.position_embed = nn.Parameter(torch.empty(spec.n_tokens, embed_dim))
        nn.init.trunc_normal_(self.position_embed, std=0.02)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C), (B, L) -> tokens (B, N, D), mask (B, N)."""
        rest = -values.shape[1] % self.patch
        values = F.pad(values * mask[..., None], (0, 0, 0, rest))
        windows = values.unflatten(1, (-1, self.patch)).flatten(2)  # (B, N, P * C)
        tokens = self.project(windows) + self.position_embed[: windows.shape[1]]
        return tokens, F.pad(mask, (0, rest)).unflatten(1, (-1, self.patch)).any(-1)

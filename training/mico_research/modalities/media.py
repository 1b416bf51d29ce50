"""Clips and sounds: units (frames, mel slices) through the encoder one by one, then in order.

Legend: B samples, U units of all samples, n units of a sample, N the most of them, D width of a
unit's summary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mico_chat.errors import MediaError
from mico_chat.media import MediaFile, MediaLimits, Medium, decode
from mico_chat.model.context import MultimodalContext, side_by_side
from mico_chat.model.preprocessing import Preprocessing
from mico_research.modalities.samples import Array, InputSpec, Media, Sample

HEADS = 8


class MediaInput(InputSpec):
    """How a file becomes units: at most ``units`` frames of a clip, or slices of a sound."""

    kind: Literal["media"] = "media"
    modality: Media
    preprocessing: Preprocessing
    units: int

    @classmethod
    def of(cls, modality: str, preprocessing: Preprocessing, units: int) -> Self:
        own = preprocessing.model_copy(update={"max_slices": units})
        return cls.model_validate({"modality": modality, "preprocessing": own, "units": units})

    def medium(self, sample: Sample) -> Medium:
        """A file's clip or sound; a DataError if it cannot be read."""
        if not isinstance(sample.values, Path):
            raise sample.error(f"expected a file of {self.modality}")
        try:
            limits = MediaLimits(max_frames=self.units)
            return decode(MediaFile(self.modality, sample.values), limits)
        except MediaError as error:
            raise sample.error(str(error)) from error

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """``pixel_values`` (n, 3, H, W) of a file; a DataError if it cannot be read."""
        try:
            return {"pixel_values": self.preprocessing.units(self.medium(sample)).numpy()}
        except MediaError as error:
            raise sample.error(str(error)) from error

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        """``pixel_values`` (U, 3, H, W) or ``features`` (U, C, G, G), and ``units`` (B,)."""
        (name,) = arrays[0].keys() - {"labels"}
        units = [torch.from_numpy(one[name]) for one in arrays]
        return {name: torch.cat(units), "units": torch.tensor(list(map(len, units)))}


class UnitOrder(nn.Module):
    """Attention among the units of a sample, each with its place (E_C): order counts.

    A unit is its [CLS] beside the mean of its tokens.
    """

    def __init__(self, units: int, dim: int) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(units, dim))  # E_C
        heads = next(n for n in range(min(HEADS, dim), 0, -1) if dim % n == 0)
        self.layer = nn.TransformerEncoderLayer(
            dim, heads, dim, dropout=0.0, batch_first=True, norm_first=True
        )

    def take(self, context: MultimodalContext, modality: Media) -> None:
        """Start from the rows of a pretrained E_C."""
        table = context.context.weight.detach().unflatten(0, (context.rows.n, -1))
        rows = table[context.rows.by_name[modality], : len(self.place)]
        self.place.data[: len(rows)] = rows.repeat(1, self.place.shape[1] // rows.shape[1])

    def forward(self, summary: Tensor, units: Tensor) -> Tensor:
        """Summaries (U, D) of units -> one (B, D) for each sample."""
        row = torch.repeat_interleave(units)
        inside = side_by_side(summary, row, len(units))
        there = side_by_side(torch.ones_like(row, dtype=torch.bool), row, len(units))
        n = inside.shape[1]
        read = self.layer(inside + self.place[:n], src_key_padding_mask=~there)
        mean: Tensor = (read * there.unsqueeze(-1)).sum(1) / units.unsqueeze(1)
        return mean

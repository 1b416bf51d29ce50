"""MultimodalContext: embeddings that tell the media of one sample apart (paper 3.3).

Added to the encoder's tokens, whose own position table is the shared E_Pos:

    z_I = [z_1 .. z_L] + E_C^I            eq. (1), which frame or slice
    z   = [z_I + E_M^I, z_A + E_M^A, ..]  modality
    z'  = z + E_Sam                       eq. (3), which corpora a joint sample was drawn from
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoContextConfig


class Units(NamedTuple):
    """Of each of U units: its medium's kind, its place there, how many units that has; (U,)."""

    kind: Tensor
    place: Tensor
    total: Tensor

    @classmethod
    def of(cls, media_kind: Tensor, media_units: Tensor) -> Units:
        """Units of media with kinds (M,) and unit counts (M,), medium after medium."""
        kind, total, start = (
            torch.repeat_interleave(x, media_units)
            for x in (media_kind, media_units, torch.cumsum(media_units, 0) - media_units)
        )
        return cls(kind, torch.arange(len(kind), device=kind.device) - start, total)


class MultimodalContext(nn.Module):
    """E_M, E_C and E_Sam, learned absolute embeddings of the encoder's width D."""

    def __init__(self, config: MicoContextConfig, embed_dim: int) -> None:
        super().__init__()
        self.max_units = config.max_units
        self.modality = nn.Embedding(len(KINDS), embed_dim)  # E_M
        self.context = nn.Embedding(len(KINDS) * config.max_units, embed_dim)  # E_C
        self.sampling = nn.Embedding(config.n_corpus_pairs, embed_dim)  # E_Sam, 0: one corpus
        for table in (self.modality, self.context, self.sampling):
            # As E_Pos: PyTorch's 1.0 would drown the tokens.
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, media_kind: Tensor, media_units: Tensor) -> Tensor:
        """Tokens (U, T, D) of media with kinds (M,) and unit counts (M,), embeddings added.

        Units beyond ``max_units`` of one medium share the last row.
        """
        kind, place, _ = Units.of(media_kind, media_units)
        row = kind * self.max_units + place.clamp(max=self.max_units - 1)
        added: Tensor = self.context(row) + self.modality(kind)  # (U, D)
        return tokens + added.unsqueeze(1).to(tokens.dtype)

"""Subtitles: spoken words of a sample that stand beside its media, as in the released code (VAST).

The text branch reads them alone. Its hidden states, projected and with a modality embedding, are
more of the context that captions look at; its [CLS] takes part in the contrastive space.

Legend: B samples, S length of the subtitles, d text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

SUBTITLE_LENGTH = 70
"""Tokens of a subtitle, with padding and marks, as in the release."""


class Subtitles(NamedTuple):
    """Ids (B, S) of B samples and their mask (B, S), false where a sample has no subtitle."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int
    ) -> Subtitles:
        """``texts`` padded or cut to a fixed length; "" is no subtitle. Marks in them are text."""
        found = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=min(SUBTITLE_LENGTH, positions),
            split_special_tokens=True,
            return_tensors="pt",
        )
        there = torch.tensor([bool(text) for text in texts]).unsqueeze(1)
        return cls(cast(Tensor, found["input_ids"]), cast(Tensor, found["attention_mask"]) * there)

    @property
    def there(self) -> Tensor:
        """Which samples have one, (B,)."""
        return self.mask.bool().any(1)


class SubtitleProjection(nn.Module):
    """Hidden states (B, S, d) of subtitles to context tokens (B, S, d)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim, eps=eps))
        self.modality = nn.Parameter(0.02 * torch.randn(dim))  # E_M

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.proj(hidden)) + self.modality

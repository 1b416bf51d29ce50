"""What the released checkpoint (VAST's code) has in place of the paper's context, and beside it.

:class:`KindProjections` and :class:`ContrastiveHeads` are projections and heads for each kind, with
E_C and E_M after the projection. :class:`Subtitles` are spoken words of a sample that stand beside
its media: the text branch reads them alone. Its hidden states, projected and with a modality
embedding, are more of the context that captions look at; its [CLS] takes part in the contrastive
space.

Legend: B samples, S length of the subtitles, U units of all media, T tokens a unit, D encoder
width, d text width, P contrastive width, K projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mico_chat.model.config import MicoContextConfig, MicoTextConfig
from mico_chat.model.context import KindRows, Units

PROJECTIONS = ("vision", "audio", "depth")
# The release has none for normals; they too show how surfaces lie.
PROJECTION_OF = {"image": "vision", "audio": "audio", "video": "vision"}
PROJECTION_OF |= {"depth": "depth", "normal": "depth"}
SUBTITLE = "subtitle"
GROUPS = {
    "va": ("vision", "audio"),
    "id": ("vision", "depth"),
    "vs": ("vision", SUBTITLE),
    "vas": ("vision", "audio", SUBTITLE),
}
"""Groups with a contrastive head of their own, by the release's names for them."""


def projection_of(kind: Tensor, rows: KindRows) -> Tensor:
    """Kinds (U,) to places in :data:`PROJECTIONS` (U,)."""
    table = [PROJECTIONS.index(PROJECTION_OF[name]) for name in rows.names]
    return torch.tensor(table, device=kind.device)[rows(kind)]


class KindProjection(nn.Module):
    def __init__(
        self, config: MicoContextConfig, context_dim: int, dim: int, frames: int, eps: float
    ) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Sequential(nn.Linear(context_dim, dim), nn.LayerNorm(dim, eps=eps))
        self.frame = nn.Parameter(0.02 * torch.randn(frames, dim))  # E_C
        self.modality = nn.Parameter(0.02 * torch.randn(dim))  # E_M

    def forward(self, tokens: Tensor, place: Tensor, total: Tensor) -> Tensor:
        """(U, T, D), places and unit counts (U,) -> (U, T, d); the table is stretched over a
        medium."""
        rows = len(self.frame)  # in float32, as the release's nearest interpolation
        row = (place.float() * (rows / total.float())).long().clamp(max=rows - 1)
        context: Tensor = self.proj(tokens) + self.frame[row].unsqueeze(1) * self.config.context
        return context + self.modality * self.config.modality


class KindProjections(nn.ModuleDict):
    def __init__(self, config: MicoContextConfig, text: MicoTextConfig, context_dim: int) -> None:
        dim, eps, frames = text.hidden_size, text.head_norm_eps, text.frames or {}
        sizes = {name: (context_dim, dim, frames[name], eps) for name in PROJECTIONS}
        super().__init__({name: KindProjection(config, *size) for name, size in sizes.items()})
        self.dim, self.rows = dim, KindRows(config.kind_rows)

    def forward(self, tokens: Tensor, units: Units) -> Tensor:
        """(U, T, D) -> (U, T, d)."""
        projection = projection_of(units.kind, self.rows)
        out = tokens.new_zeros(*tokens.shape[:2], self.dim)
        for number, name in enumerate(PROJECTIONS):
            rows = (projection == number).nonzero().squeeze(1)
            if len(rows):
                made = self[name](tokens[rows], units.place[rows], units.total[rows])
                out = out.index_copy(0, rows, made)
        return out


class ContrastiveHeads(nn.Module):
    """[CLS] tokens of a sample's units to its point in the contrastive space."""

    def __init__(
        self, rows: KindRows, context_dim: int, projection_dim: int, subtitle_dim: int | None
    ) -> None:
        super().__init__()
        self.rows = rows
        widths = dict.fromkeys(PROJECTIONS, context_dim)
        if subtitle_dim is not None:
            widths[SUBTITLE] = subtitle_dim
        self.one = nn.ModuleDict(
            {name: nn.Linear(width, projection_dim, bias=False) for name, width in widths.items()}
        )
        self.both = nn.ModuleDict(
            {
                name: nn.Linear(sum(widths[one] for one in group), projection_dim)
                for name, group in GROUPS.items()
                if widths.keys() >= set(group)
            }
        )

    def forward(
        self,
        cls: Tensor,
        kind: Tensor,
        row: Tensor,
        n: int,
        said: Tensor | None = None,
        has_said: Tensor | None = None,
    ) -> Tensor:
        """[CLS] (U, D) of units with kinds and samples (U,) -> (n, P).

        The units of one projection are averaged. A sample of a group goes through the head of the
        group; other samples go through each projection's own head, and the points are averaged.
        ``said`` (n, d) are [CLS] of subtitles, which the samples ``has_said`` (n,) have.
        """
        k = len(PROJECTIONS)
        place = row * k + projection_of(kind, self.rows)
        counts = torch.bincount(place, minlength=n * k)
        sums = cls.new_zeros(n * k, cls.shape[1]).index_add(0, place, cls)
        means = (sums / counts.clamp(min=1).unsqueeze(1)).unflatten(0, (n, k))  # (n, K, D)
        there = counts.view(n, k) > 0
        parts = dict(zip(PROJECTIONS, means.unbind(1), strict=True))
        if said is not None and has_said is not None:
            parts[SUBTITLE] = said
            there = torch.cat([there, has_said.unsqueeze(1)], 1)
        alone = torch.stack([self.one[name](part) for name, part in parts.items()], 1)
        several = (F.normalize(alone, dim=-1) * there.unsqueeze(-1)).sum(1)
        single = (alone * there.unsqueeze(-1)).sum(1)
        out = torch.where(there.sum(1, keepdim=True) == 1, single, several)
        for name, group in GROUPS.items():
            if not parts.keys() >= set(group):
                continue
            numbers = [list(parts).index(one) for one in group]
            just_these = there[:, numbers].all(1) & (there.sum(1) == len(group))
            joint = self.both[name](torch.cat([parts[one] for one in group], 1))
            out = torch.where(just_these.unsqueeze(1), joint, out)
        return out


# --- subtitles ----------------------------------------------------------------------------------

SUBTITLE_LENGTH = 70
"""A subtitle has these tokens, with padding and marks, as in the release."""


def of_fixed_length(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor]:
    """B texts as ids (B, S) and their mask, padded or cut to S tokens. Marks in them are text."""
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    found = tokenizer(list(texts), split_special_tokens=True, return_tensors="pt", **options)
    return cast(Tensor, found["input_ids"]), cast(Tensor, found["attention_mask"])


class Subtitles(NamedTuple):
    """Ids (B, S) of B samples and their mask (B, S), false where a sample has no subtitle."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def given(cls, inputs: Mapping[str, Tensor]) -> Subtitles | None:
        """Those of a batch's inputs, if there are any."""
        ids, mask = inputs.get("subtitle_ids"), inputs.get("subtitle_mask")
        return None if ids is None or mask is None else cls(ids, mask)

    @classmethod
    def of(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int
    ) -> Subtitles:
        """``texts`` of a fixed length; "" is no subtitle."""
        ids, mask = of_fixed_length(texts, tokenizer, min(SUBTITLE_LENGTH, positions))
        return cls(ids, mask * torch.tensor([bool(text) for text in texts]).unsqueeze(1))

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

"""Embeddings that tell the media of one sample apart (paper 3.3), in two versions.

:class:`MultimodalContext` is the paper's. It adds to the encoder's tokens, whose own position
table is the shared E_Pos:

    z_I = [z_1 .. z_L] + E_C^I            eq. (1), which frame or slice
    z   = [z_I + E_M^I, z_A + E_M^A, ..]  modality

E_Sam (eq. 3) is in the text branch, where captions and media meet.

:class:`KindProjections` and :class:`ContrastiveHeads` are the released checkpoint's (VAST's code):
projections and heads for each kind, with E_C and E_M after the projection.

Legend: M media, U units of all media, T tokens a unit, D encoder width, d text width,
P contrastive width, K projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import MediaLayout, MicoContextConfig, layout_of


class Units(NamedTuple):
    """For each of U units: the kind of its medium, its place in it, the medium's unit count."""

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


class AlikeMedia(NamedTuple):
    """Media of a batch that share layout and unit count, and so go together.

    ``media`` are their B places in the batch, ``rows`` (B·units,) those of their units.
    """

    media: list[int]
    rows: Tensor
    kind: Tensor
    layout: MediaLayout
    units: int

    @classmethod
    def groups(cls, media_kind: Tensor, media_units: Tensor) -> Iterator[AlikeMedia]:
        starts = (torch.cumsum(media_units, 0) - media_units).tolist()
        found: dict[tuple[MediaLayout, int], list[int]] = {}
        for m, (kind, n) in enumerate(zip(media_kind.tolist(), media_units.tolist(), strict=True)):
            found.setdefault((layout_of(KINDS[kind]), n), []).append(m)
        for (layout, n), media in found.items():
            rows = torch.tensor([starts[m] + i for m in media for i in range(n)])
            yield cls(media, rows.to(media_kind.device), media_kind[media], layout, n)

    def of(self, units: Tensor) -> Tensor:
        """These media's part of the batch's units (U, ...); not a copy if it is all of them."""
        return units if len(self.rows) == len(units) else units[self.rows]


class MultimodalContext(nn.Module):
    """E_M and E_C, learned absolute embeddings of the encoder's width D."""

    def __init__(self, config: MicoContextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.modality = nn.Embedding(len(KINDS), embed_dim)  # E_M
        self.context = nn.Embedding(len(KINDS) * config.max_units, embed_dim)  # E_C
        for table in (self.modality, self.context):
            # As E_Pos: PyTorch's 1.0 would drown the tokens.
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, media_kind: Tensor, media_units: Tensor) -> Tensor:
        """Tokens (U, T, D) of media with kinds (M,) and unit counts (M,), embeddings added.

        Units beyond ``max_units`` of one medium share the last row.
        """
        kind, place, _ = Units.of(media_kind, media_units)
        most = self.config.max_units
        row = kind * most + place.clamp(max=most - 1)
        context, modality = self.config.context, self.config.modality  # whether each is added
        added: Tensor = self.context(row) * context + self.modality(kind) * modality  # (U, D)
        return tokens + added.unsqueeze(1).to(tokens.dtype)


# --- the released checkpoint's ------------------------------------------------------------------

PROJECTIONS = ("vision", "audio", "depth")
PROJECTION_OF: dict[Kind, str] = {
    "image": "vision",
    "audio": "audio",
    "video": "vision",
    "depth": "depth",
    "normal": "depth",  # the release has none for normals; they too show how surfaces lie
}
SUBTITLE = "subtitle"
GROUPS = {
    "va": ("vision", "audio"),
    "id": ("vision", "depth"),
    "vs": ("vision", SUBTITLE),
    "vas": ("vision", "audio", SUBTITLE),
}
"""Groups with a contrastive head of their own, by the release's names for them."""


def projection_of(kind: Tensor) -> Tensor:
    """Kinds (U,) to places in :data:`PROJECTIONS` (U,)."""
    table = [PROJECTIONS.index(PROJECTION_OF[kind]) for kind in KINDS]
    return torch.tensor(table, device=kind.device)[kind]


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
    def __init__(
        self,
        config: MicoContextConfig,
        frames: Mapping[str, int],
        context_dim: int,
        dim: int,
        eps: float,
    ) -> None:
        sizes = {name: (context_dim, dim, frames[name], eps) for name in PROJECTIONS}
        super().__init__({name: KindProjection(config, *size) for name, size in sizes.items()})
        self.dim = dim

    def forward(self, tokens: Tensor, units: Units) -> Tensor:
        """(U, T, D) -> (U, T, d)."""
        projection = projection_of(units.kind)
        out = tokens.new_zeros(*tokens.shape[:2], self.dim)
        for number, name in enumerate(PROJECTIONS):
            rows = (projection == number).nonzero().squeeze(1)
            if len(rows):
                made = self[name](tokens[rows], units.place[rows], units.total[rows])
                out = out.index_copy(0, rows, made)
        return out


class ContrastiveHeads(nn.Module):
    """[CLS] tokens of a sample's units to its point in the contrastive space."""

    def __init__(self, context_dim: int, projection_dim: int, subtitle_dim: int | None) -> None:
        super().__init__()
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
        place = row * k + projection_of(kind)
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

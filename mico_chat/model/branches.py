"""Projections of each kind's own, as the released MiCo checkpoint has them.

The paper's model has one projection of context tokens for all kinds, and tells them apart in the
encoder's width (:mod:`mico_chat.model.context`). The released one, made with VAST's code, projects
pictures and frames, sounds, and distances each by its own branch, adds frame and modality
embeddings behind that, and has a contrastive head for each branch and for some pairs of them.

Legend: U units, T tokens a unit, D encoder width, d text width, P contrastive width, N branches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.context import Units

BRANCH_OF: dict[Kind, str] = {
    "image": "vision",
    "audio": "audio",
    "video": "vision",
    "depth": "depth",
    "normal": "depth",  # the release has no branch for them; they too say how surfaces lie
}
BRANCHES = ("vision", "audio", "depth")
JOINT = {"va": ("vision", "audio"), "id": ("vision", "depth")}
"""Pairs with a contrastive head of their own, by the release's names for them."""

_BRANCH = [BRANCHES.index(BRANCH_OF[kind]) for kind in KINDS]


def branch_of(kind: Tensor) -> Tensor:
    """Kinds (U,) to numbers of branches (U,)."""
    return torch.tensor(_BRANCH, device=kind.device)[kind]


class ContextBranch(nn.Module):
    """Encoder tokens of one branch to context tokens: projection, frame, modality."""

    def __init__(self, context_dim: int, dim: int, frames: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(context_dim, dim), nn.LayerNorm(dim, eps=eps))
        self.frame = nn.Parameter(0.02 * torch.randn(frames, dim))  # E_C
        self.modality = nn.Parameter(0.02 * torch.randn(dim))  # E_M

    def forward(self, tokens: Tensor, place: Tensor, total: Tensor) -> Tensor:
        """(U, T, D), places and numbers of units (U,) -> (U, T, d).

        Of a medium with more or fewer units than the table, each takes the row at its place.
        """
        rows = len(self.frame)  # in float32, as the release's nearest interpolation
        row = (place.float() * (rows / total.float())).long().clamp(max=rows - 1)
        context: Tensor = self.proj(tokens)
        return context + self.frame[row].unsqueeze(1) + self.modality


class ContextBranches(nn.ModuleDict):
    """A :class:`ContextBranch` for each of :data:`BRANCHES`."""

    def __init__(self, frames: Mapping[str, int], context_dim: int, dim: int, eps: float) -> None:
        super().__init__(
            {name: ContextBranch(context_dim, dim, frames[name], eps) for name in BRANCHES}
        )
        self.dim = dim

    def forward(self, tokens: Tensor, units: Units) -> Tensor:
        """(U, T, D) -> (U, T, d)."""
        branch = branch_of(units.kind)
        out = tokens.new_zeros(*tokens.shape[:2], self.dim)
        for number, name in enumerate(BRANCHES):
            mine = (branch == number).nonzero().squeeze(1)
            if len(mine):
                made = self[name](tokens[mine], units.place[mine], units.total[mine])
                out = out.index_copy(0, mine, made)
        return out


class ContrastiveBranches(nn.Module):
    """[CLS] tokens of a sample's units to its point in the contrastive space."""

    def __init__(self, context_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.projection_dim = projection_dim
        self.one = nn.ModuleDict(
            {name: nn.Linear(context_dim, projection_dim, bias=False) for name in BRANCHES}
        )
        self.both = nn.ModuleDict(
            {name: nn.Linear(2 * context_dim, projection_dim) for name in JOINT}
        )

    def forward(self, cls: Tensor, kind: Tensor, row: Tensor, n: int) -> Tensor:
        """[CLS] (U, D) of units with kinds and samples (U,) -> (n, P).

        A branch's units are averaged. A sample of two branches goes through their joint head;
        where there is none, or of three, through each branch's own, and the points are averaged.
        """
        place = row * len(BRANCHES) + branch_of(kind)
        counts = torch.bincount(place, minlength=n * len(BRANCHES))
        sums = cls.new_zeros(n * len(BRANCHES), cls.shape[1]).index_add(0, place, cls)
        means = (sums / counts.clamp(min=1).unsqueeze(1)).unflatten(0, (n, -1))  # (n, N, D)
        there = counts.view(n, -1) > 0
        alone = torch.stack(
            [self.one[name](means[:, number]) for number, name in enumerate(BRANCHES)], 1
        )
        several = (F.normalize(alone, dim=-1) * there.unsqueeze(-1)).sum(1)
        single = (alone * there.unsqueeze(-1)).sum(1)
        out = torch.where(there.sum(1, keepdim=True) == 1, single, several)
        for name, pair in JOINT.items():
            numbers = [BRANCHES.index(branch) for branch in pair]
            just_these = there[:, numbers].all(1) & (there.sum(1) == len(pair))
            joint = self.both[name](means[:, numbers].flatten(1))
            out = torch.where(just_these.unsqueeze(1), joint, out)
        return out

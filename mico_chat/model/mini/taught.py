"""Taught names: where a medium is near a person's own examples, their name takes the learned one's.

A name is the mean of its examples' features, as in prototypical networks (arXiv 1703.05175). It is
learned at once and changes no weight.

Legend: R media or things, N names, D features, P places of a name's tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Taught(NamedTuple):
    """The names that one medium may have: means of their examples (N, D), of unit length; the
    least cosine (N,) at which each is said; their tokens (N, P), -1 behind the last."""

    means: Tensor
    least: Tensor
    ids: Tensor


def root_mean(cells: Tensor) -> Tensor:
    """Features of cells (R, C, D), which are not negative -> one of unit length for each (R, D).

    The square root, as in Hellinger's distance, keeps a few strong features from deciding alone.
    """
    return F.normalize(cells.float().mean(1).clamp(min=0).sqrt(), dim=-1)


def taught_ids(features: Tensor, taught: Sequence[Taught | None], places: int) -> Tensor:
    """Features (R, D) of media or things -> the tokens (R, P) of the taught name that each has.

    The row is -1 throughout where no name is near enough; ``taught`` are the names of each.
    """
    ids = torch.full((len(features), places), -1, device=features.device)
    for row, feature, own in zip(ids, features, taught, strict=True):
        if own is not None:
            over = own.means.to(feature) @ feature - own.least.to(feature)
            if float(over.max()) >= 0:
                row.copy_(own.ids[over.argmax()])
    return ids

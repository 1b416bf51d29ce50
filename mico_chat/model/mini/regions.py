"""What stage 1 learns of words beside the paper's objectives: regions and tags.

A caption names things without their places. A region is a box of a still (or a whole clip) with the
words that hold there, which the tokens that look at the box must score. Tags are the words of a
caption in any order.

Legend: R regions of a batch, K words a region, P places (grid cells, or queries), W distinct words,
N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mico_chat.model.text_branch import TextBranch

WHOLE = -1.0
"""A box of four of these is a whole medium: its words hold at no place more than at another."""
INNER = 0.8
"""A region's box is this share of the thing's own, whose corners seldom belong to the thing."""


@dataclass(frozen=True)
class RegionBatch:
    """Regions of a batch.

    ``medium`` (R,) is the place of the medium in the batch; ``box`` (R, 4) is left, top, right,
    bottom as fractions, or :data:`WHOLE`. Token ids, filled up with -1: ``names`` (R, K') of the
    things in the box, ``words`` (R, K) of their properties. ``distance`` (R,) from the camera, in
    metres, is NaN where it is unknown. ``way`` (R,) is where a clip's thing goes, a place in
    ``WORDS["way"]`` of :mod:`mico_chat.model.mini.things`, or -1.
    """

    medium: Tensor
    box: Tensor
    words: Tensor
    names: Tensor
    distance: Tensor
    way: Tensor

    @classmethod
    def given(cls, inputs: Mapping[str, Tensor]) -> RegionBatch | None:
        """The reverse of :meth:`inputs`; None where there are no inputs."""
        named = {name.removeprefix("region_"): tensor for name, tensor in inputs.items()}
        return cls(**named) if named else None

    def inputs(self) -> dict[str, Tensor]:
        """As inputs of a model, each name with ``region_`` before it."""
        return {f"region_{name}": tensor for name, tensor in vars(self).items()}

    def vocabulary(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct ``ids`` (W,), of (R, K), and which of them hold in each region (R, W)."""
        given = ids >= 0
        words, index = ids[given].unique(return_inverse=True)
        wanted = torch.zeros(len(ids), len(words), dtype=torch.bool, device=ids.device)
        wanted[given.nonzero()[:, 0], index] = True
        return words, wanted

    @property
    def both(self) -> Tensor:
        return torch.cat([self.words, self.names], 1)

    def places(self, centres: Tensor) -> Tensor:
        """The places that belong to each region: centres (P, 2) as (y, x) -> (R, P).

        A place belongs to the smallest box of its medium that covers it. A box that covers no
        place gets the one nearest to its middle. A whole medium has no places.
        """
        box = self.box
        y, x = centres[:, 0], centres[:, 1]
        inside = (x >= box[:, :1]) & (x <= box[:, 2:3]) & (y >= box[:, 1:2]) & (y <= box[:, 3:])
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        beside = self.medium.unsqueeze(1) == self.medium.unsqueeze(0)
        smaller = beside & (area.unsqueeze(0) < area.unsqueeze(1))  # [r, q]: q is smaller than r
        own = inside & ~((smaller.to(box) @ inside.to(box)) > 0)
        middle_y, middle_x = (box[:, 1] + box[:, 3]) / 2, (box[:, 0] + box[:, 2]) / 2
        distance = (y - middle_y.unsqueeze(1)) ** 2 + (x - middle_x.unsqueeze(1)) ** 2
        nearest = F.one_hot(distance.argmin(1), len(centres)).bool()
        own = torch.where(own.any(1, keepdim=True), own, nearest)
        return own & ~self.whole.unsqueeze(1)

    @property
    def whole(self) -> Tensor:
        return (self.box == WHOLE).all(1)


def thing_boxes(boxes: Tensor) -> Tensor:
    """Boxes of regions (R, 4) -> the things' own: centre x, centre y, width, height."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return torch.cat([(low + high) / 2, (high - low) / INNER], 1)


def region_loss(scores: Tensor, region: Tensor, wanted: Tensor) -> Tensor:
    """Each right word against all wrong words, at each token; every region counts the same.

    ``scores`` (N, W) of each token for each word, ``region`` (N,) that each token looks at,
    ``wanted`` (R, W) words that hold in each region. Returns the mean over regions that have
    tokens; 0 (with no gradient) where none has.
    """
    right = wanted[region]
    wrong = scores.float().masked_fill(right, -torch.inf).logsumexp(1, keepdim=True)
    each = F.softplus(wrong - scores.float()).masked_fill(~right, 0.0).sum(1)
    each = each / right.sum(1).clamp(min=1)
    size = torch.bincount(region, minlength=len(wanted)).clamp(min=1)
    present = region.unique()
    return (each / size[region]).sum() / max(1, len(present))


def tagging_loss(
    text: TextBranch, input_ids: Tensor, attention_mask: Tensor, context: Tensor, mask: Tensor
) -> Tensor:
    """The mean context token (of (B, N, d)) predicts the words of the caption, in any order.

    As in Tag2Text (arXiv 2303.05657): contrast alone loses colours, numbers and places. A word
    counts less the more captions of the batch have it.
    """
    size = (len(input_ids), len(text.head_bias))
    tags = torch.zeros(size, device=input_ids.device).scatter_(1, input_ids, attention_mask.float())
    tags[:, input_ids[:, 0]] = 0  # [CLS]
    tags = tags / tags.sum(0).clamp(min=1)
    tags = tags / tags.sum(1, keepdim=True).clamp(min=torch.finfo(tags.dtype).tiny)
    seen = mask.unsqueeze(-1).to(context.dtype)
    mean = (context * seen).sum(1) / seen.sum(1).clamp(min=1)
    return -(tags * text.logits(mean).float().log_softmax(-1)).sum(1).mean()


def token_loss(
    text: TextBranch, regions: RegionBatch, tokens: Tensor, centres: Tensor, n_prefix: int
) -> Tensor:
    """Each token of a region predicts the region's words; tokens (R, T, d) of its medium.

    ``centres`` (P, 2) are those of the tokens behind the prefix, which predicts a whole medium's
    words.
    """
    words, wanted = regions.vocabulary(regions.both)
    own = regions.places(centres.to(regions.box))
    own = torch.cat([regions.whole.unsqueeze(1).expand(-1, n_prefix), own], 1)
    region, place = own.nonzero(as_tuple=True)
    return region_loss(text.logits(tokens[region, place], words), region, wanted)

"""Stage 2 by set prediction: queries learn to find each thing of a picture once.

A query that is matched with a thing learns its box and its distance; the others learn that they
are no thing. The match is the cheapest one (Hungarian algorithm), as in DETR (arXiv 2005.12872).

Legend: B pictures, N queries or cells, M things of a picture, R things of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou
from transformers.utils import ModelOutput

from mico_chat.checkpoints.pretrained import MEDIA, MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError
from mico_chat.model.context import AlikeMedia
from mico_chat.model.mini.regions import RegionBatch, thing_boxes
from mico_chat.model.mini.things import Found

BOX, OVERLAP, THING = 5.0, 2.0, 2.0
"""The weights of the losses, those of a match among them (DETR's: 5, 2, 1)."""
FOCUS = 2.0
"""The exponent of the focal loss (arXiv 1708.02002): most queries are no things."""


@dataclass
class ThingsOutput(ModelOutput):
    loss: Tensor | None = None
    thing_loss: Tensor | None = None
    box_loss: Tensor | None = None
    distance_loss: Tensor | None = None
    way_loss: Tensor | None = None


class SetPrediction(nn.Module):
    """Trains a chat model's queries for things, and the encoder below them, without the LLM."""

    accepts_loss_kwargs = False

    def __init__(self, chat: MicoChatForConditionalGeneration) -> None:
        super().__init__()
        if chat.things is None:
            raise ConfigError("stage2.objective things: set bridge_config.things above 0")
        self.chat, self.things = chat, chat.things

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.chat.ways.train(mode)  # its batch norm learns its statistics here
        return self

    def forward(self, **inputs: Tensor) -> ThingsOutput:
        """The losses of a batch with media and ``region_*`` inputs (:class:`RegionBatch`)."""
        media = {name: tensor for name, tensor in inputs.items() if name in MEDIA}
        del media["media_row"]
        regions = RegionBatch.given({k: v for k, v in inputs.items() if k.startswith("region_")})
        tokens, features = self.chat.encoded(**media)
        total = tokens.sum() * 0.0  # a batch of sounds has no other loss
        losses = {"thing": total, "box": total, "distance": total, "way": total}
        prefix = self.chat.encoder.n_prefix
        for group in AlikeMedia.groups(media["media_kind"], media["media_units"]):
            if group.layout == "slices":
                continue
            # Where nobody says what there is, nothing is learnt.
            told = [
                n for n, m in enumerate(group.media) if regions is not None and m in regions.medium
            ]
            if not told:
                continue
            own = tokens[group.rows].unflatten(0, (-1, group.units))[told]
            truths = [truth_of(regions, group.media[n], tokens.device) for n in told]
            for found in self.things(own[:, group.units // 2, prefix:]):
                for name, loss in layer_losses(found, truths).items():
                    losses[name] = losses[name] + loss
            if group.layout == "frames" and regions is not None:
                losses["way"] = losses["way"] + self._ways(features[group.rows], group, regions)
        weighted = THING * losses["thing"] + losses["box"] + losses["distance"] + losses["way"]
        return ThingsOutput(weighted, *losses.values())

    def _ways(self, features: Tensor, clips: AlikeMedia, regions: RegionBatch) -> Tensor:
        """The loss of the ways that the things of alike clips go, by their true boxes."""
        clip_of = {medium: number for number, medium in enumerate(clips.media)}
        own = [
            number
            for number, medium in enumerate(regions.medium.tolist())
            if medium in clip_of and int(regions.way[number]) >= 0
        ]
        if len(own) < 2:  # a batch norm over one row has no variance
            return features.sum() * 0.0
        stem = self.chat.encoder.stem
        assert stem is not None
        frames = stem.middle(features).unflatten(0, (-1, clips.units))
        clip = torch.tensor([clip_of[int(regions.medium[n])] for n in own], device=frames.device)
        logits = self.chat.ways(frames, thing_boxes(regions.box[own]), clip)
        return F.cross_entropy(logits.float(), regions.way[own], label_smoothing=0.05)


def truth_of(regions: RegionBatch | None, medium: int, device: torch.device) -> Tensor:
    """Boxes and log metres (M, 5) of a medium's things; unknown metres are NaN."""
    if regions is None:
        return torch.zeros(0, 5, device=device)
    own = (regions.medium == medium) & ~regions.whole
    return torch.cat([thing_boxes(regions.box[own]), regions.distance[own].log().unsqueeze(1)], 1)


def layer_losses(found: Found, truths: Sequence[Tensor]) -> dict[str, Tensor]:
    """The losses of what a layer found, (B, N), against things (M, 5) of each picture."""
    target = torch.zeros_like(found.logits)
    places: list[tuple[Tensor, Tensor]] = []
    for number, truth in enumerate(truths):
        query, thing = matched(found, number, truth)
        target[number, query] = 1.0
        places.append((number * target.shape[1] + query, truth[thing]))
    at = torch.cat([place for place, _ in places])
    truth = torch.cat([truth for _, truth in places])
    sure = torch.where(target > 0, found.logits, -found.logits).sigmoid()
    each = (1 - sure).pow(FOCUS) * F.binary_cross_entropy_with_logits(
        found.logits, target, reduction="none"
    )
    n = max(1, len(at))
    boxes = found.boxes.flatten(0, 1)[at]
    overlap = 1 - torch.diagonal(generalized_box_iou(corners(boxes), corners(truth[:, :4])))
    box = BOX * (boxes - truth[:, :4]).abs().sum() + OVERLAP * overlap.sum()
    metres, known = found.distance.flatten()[at], ~truth[:, 4].isnan()
    distance = (metres - truth[:, 4])[known].abs()
    return {"thing": each.sum() / n, "box": box / n, "distance": distance.sum() / n}


def corners(boxes: Tensor) -> Tensor:
    return cast(Tensor, box_convert(boxes, "cxcywh", "xyxy"))


@torch.no_grad()
def matched(found: Found, number: int, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The queries of picture ``number`` and which of its things (M, 5) are theirs; equally many."""
    boxes, logits = found.boxes[number], found.logits[number]
    cost = BOX * torch.cdist(boxes, truth[:, :4], p=1) - THING * logits.sigmoid().unsqueeze(1)
    cost = cost - OVERLAP * generalized_box_iou(corners(boxes), corners(truth[:, :4]))
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    device = truth.device
    return torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)

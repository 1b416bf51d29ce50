"""What all cells start from: a ViT and a text branch that are pretrained, as in the paper (4.1).

The paper starts from EVA-CLIP and BERT. Here a packaged model's parts stand for them: the first
blocks of its ViT, and of its text branch what a BERT has. Cross-attention, projections, the
matching head and the context embeddings start at random, as all that the paper adds.
"""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ConfigError
from mico_chat.model.mini.stem import Stem
from mico_chat.model.pretraining import MicoForPretraining

PATCH = 16
"""A cell of the grid has so many pixels a side, where a picture's own pixels are read."""

PIXELS = 3 * PATCH**2


class CoarseStem(Stem):
    """The stem on a coarser grid, and behind its channels the pixels of each cell.

    Returns (U, C + 3 P², G, G). The ViT sees the C channels of the stem; an architecture without a
    pretrained picture encoder reads the pixels alone (Table 1 ii and iii).
    """

    def __init__(self, name: str, image_size: int, grid: int) -> None:
        super().__init__(name, image_size)
        self.coarse = grid

    def forward(self, pixel_values: Tensor, is_sound: Tensor | None = None) -> Tensor:
        cells = F.adaptive_avg_pool2d(super().forward(pixel_values, is_sound), self.coarse)
        pixels = F.adaptive_avg_pool2d(pixel_values, self.coarse * PATCH)
        return torch.cat([cells, F.pixel_unshuffle(pixels, PATCH)], 1)


def take_vit(vit: Any, source: Any) -> None:
    """Fill a ViT of timm with the first blocks of one that may be deeper and see a finer grid."""
    wanted, given = vit.state_dict(), source.state_dict()
    grids = [list(one.patch_embed.grid_size) for one in (vit, source)]
    given["pos_embed"] = resample_abs_pos_embed(given["pos_embed"], *grids)
    _take(vit, {name: given.get(name) for name in wanted}, "its ViT")


def take_text(model: MicoForPretraining, source: MicoForPretraining) -> None:
    """Fill the text branch with what a BERT has: words, layers, and the layer that predicts."""
    given = source.text.state_dict()
    own = ("bert.", "head.", "head_bias")
    wanted = [k for k in model.text.state_dict() if k.startswith(own) and "crossatt" not in k]
    _take(model.text, {name: given.get(name) for name in wanted}, "its text branch")


def _take(part: nn.Module, given: dict[str, Tensor | None], what: str) -> None:
    own: dict[str, Any] = part.state_dict()
    for name, tensor in given.items():
        shape = None if tensor is None else tuple(tensor.shape)
        if tensor is None or shape != tuple(own[name].shape):
            raise ConfigError(
                f"model.encoder: {what} has {name} {shape}, but this cell needs "
                f"{tuple(own[name].shape)}; change model.options"
            )
    part.load_state_dict({**own, **given})

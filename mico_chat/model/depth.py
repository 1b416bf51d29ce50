"""A small network that guesses a picture's distances: a CNN's grids, joined from coarse to fine.

Legend: U pictures, S their side, a multiple of 32.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.model.encoder import timm

WIDTHS = (40, 56, 80, 128)
"""Channels of the decoder at a quarter, an eighth, .. of the picture's side."""


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.GELU()
    )


class DepthNet(nn.Module):
    """Frozen CNN features of four scales -> log distance.

    The CNN is the mini's stem, whose weights its checkpoint holds; only the decoder is stored.
    """

    def __init__(self, cnn: str = "tf_efficientnet_lite0", widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.cnn: nn.Module = timm.create_model(cnn, features_only=True, out_indices=(1, 2, 3, 4))
        self.cnn.requires_grad_(False)
        channels = cast(Any, self.cnn).feature_info.channels()
        sides = list(zip(channels, widths, strict=True))
        self.decoder = nn.ModuleDict(
            {
                "lateral": nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in sides),
                "whole": nn.Linear(channels[-1], widths[-1]),
                "narrow": nn.ModuleList(
                    nn.Conv2d(wide, w, 1) for w, wide in zip(widths, widths[1:], strict=False)
                ),
                "join": nn.ModuleList(nn.Sequential(_block(w), _block(w)) for w in widths),
                "head": nn.Conv2d(widths[0], 1, 3, padding=1),
            }
        )

    def train(self, mode: bool = True) -> "DepthNet":
        super().train(mode)
        self.cnn.eval()  # its batch norms keep ImageNet's statistics
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (U, 3, S, S) in [-1, 1] -> log metres (U, S / 4, S / 4), up to a scale."""
        with torch.no_grad():
            grids = list(self.cnn(pixel_values))
        parts = cast(Any, self.decoder)
        x = (
            parts["lateral"][-1](grids[-1])
            + parts["whole"](grids[-1].mean((2, 3)))[:, :, None, None]
        )
        x = parts["join"][-1](x)
        for i in reversed(range(len(grids) - 1)):
            x = F.interpolate(parts["narrow"][i](x), grids[i].shape[-2:], mode="bilinear")
            x = parts["join"][i](x + parts["lateral"][i](grids[i]))
        return cast(Tensor, parts["head"](x)[:, 0])

"""A small network that guesses a picture's distances: a CNN's grids, joined from coarse to fine.

Legend: U pictures, S their side, a multiple of 32.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.model.mini.stem import timm_model

WEIGHTS = "depth/model.safetensors"
"""Of the decoder, in the folder of the checkpoint whose stem it reads."""
STEM = "encoder.stem.cnn."
SIDE = 224
"""The side of the squares that it was trained on; a picture gets as many pixels."""
WIDTHS = (40, 56, 80, 128)
"""The decoder has these channels at a quarter, an eighth, .. of the picture's side."""


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
        self.cnn: nn.Module = timm_model(cnn, features_only=True, out_indices=(1, 2, 3, 4))
        self.cnn.requires_grad_(False)
        channels = cast(Any, self.cnn).feature_info.channels()
        sides = list(zip(channels, widths, strict=True))
        self.decoder = nn.ModuleDict(
            {
                "lateral": nn.ModuleList(nn.Conv2d(c, w, 1) for c, w in sides),
                "whole": nn.Linear(channels[-1], widths[-1]),
                "narrow": nn.ModuleList(nn.Conv2d(wide, w, 1) for w, wide in pairwise(widths)),
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
        whole = parts["whole"](grids[-1].mean((2, 3)))[:, :, None, None]
        x = parts["join"][-1](parts["lateral"][-1](grids[-1]) + whole)
        for i in reversed(range(len(grids) - 1)):
            x = F.interpolate(parts["narrow"][i](x), grids[i].shape[-2:], mode="bilinear")
            x = parts["join"][i](x + parts["lateral"][i](grids[i]))
        return cast(Tensor, parts["head"](x)[:, 0])

    @torch.inference_mode()
    def nearness(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A picture (H, W, 3) -> inverse distances (H, W), up to a scale."""
        height, width = picture.shape[:2]
        longer = math.sqrt(width / height)
        size = [max(1, round(SIDE * by / 32)) * 32 for by in (longer, 1 / longer)]
        small = Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.BOX)
        guess = self(pixels_of(np.asarray(small)[None]))
        near = F.interpolate((-guess).exp()[None], (height, width), mode="bilinear")
        return cast(NDArray[np.float32], near[0, 0].numpy())


def pixels_of(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures (U, S, S, 3) as the network reads them: (U, 3, S, S) in [-1, 1]."""
    return (torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() - 127) / 128


def load_stem(net: DepthNet, checkpoint: Path) -> None:
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith(STEM)]  # noqa: SIM118
        own = {name.removeprefix(STEM): weights.get_tensor(name) for name in names}
    net.cnn.load_state_dict(own)


def load_depth_net(checkpoint: Path) -> DepthNet:
    """The network of a checkpoint's folder, ready to guess."""
    net = DepthNet()
    load_stem(net, checkpoint)
    net.decoder.load_state_dict(load_file(checkpoint / WEIGHTS))
    return net.eval()

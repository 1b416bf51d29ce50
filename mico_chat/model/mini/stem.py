"""Stem: the mini's pretrained CNN, whose features of a picture or a mel slice take patches' place.

Legend: U units (stills, frames, mel slices), C stem channels, G grid side, S side of a unit.
"""

import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.late import unrun
from mico_chat.model.mini.ear import WIDTH, ear


def _import_timm() -> Any:
    """timm with the mini's families of models alone: its other 85, and torchvision, of which it
    needs three names, took 0.6 s. They are imported when somebody uses them."""
    for name in ("torchvision", "torchvision.ops", "torchvision.models"):
        unrun(name)
    timm, data, _ = map(unrun, ("timm", "timm.data", "timm.models"))
    for package, name in ((timm, "timm.version"), (data, "timm.data.constants")):
        vars(package).update(vars(importlib.import_module(name)) | vars(package))
    for name in ("efficientnet", "vision_transformer", "_factory"):
        importlib.import_module(f"timm.models.{name}")
    return timm


timm = _import_timm()


def timm_model(name: str, **options: Any) -> Any:
    """timm's ``create_model``, which imports its other families for a model that is not here."""
    here = timm.models._factory
    return (here if here.is_model(name) else timm).create_model(name, **options)


COLOUR_CELLS = 4
"""Each grid cell keeps its own 4 x 4 colours, because deep features blur hue and exact depth."""

COLOUR_GAIN = 4.0
"""The colours' weights start larger by this factor: they are 48 of some 800 channels. After 120
steps on composed scenes, held-out things had the right colour in 70 % at 1 and in 84 % at 4."""


class Stem(nn.Module):
    """A CNN as patch embedding.

    Returns (U, C, G, G) with C = [last grid | middle blocks, 2 x 2 folded | 4 x 4 colours | heard].
    The last grid shows objects, the middle blocks keep texture and, for sound, frequency. With
    ``ear_blocks`` the ear's features of a mel slice, folded to G x G, are at the end; the ViT does
    not see them.
    """

    def __init__(self, name: str, image_size: int, ear_blocks: int = 0) -> None:
        super().__init__()
        self.image_size = image_size
        self.cnn: nn.Module = timm_model(name, features_only=True, out_indices=(3, 4))
        mid, last = cast(Any, self.cnn).feature_info.channels()
        self.last_dim: int = last
        self.mid_dim: int = mid * 4
        self.seen_dim: int = last + mid * 4 + 3 * COLOUR_CELLS**2
        self.ear_blocks = ear_blocks
        self.heard_dim = 2 * WIDTH * ear_blocks
        self.out_dim: int = self.seen_dim + -(-self.heard_dim // (image_size // 32) ** 2)

    def forward(self, pixel_values: Tensor, is_sound: Tensor | None = None) -> Tensor:
        """(U, 3, S, S) -> (U, C, G, G), G = image_size / 32; finer pixels are averaged first.

        The ear hears the units for which ``is_sound`` (U,) is true; of the others, and without it,
        what is heard is zero.
        """
        if (finer := pixel_values.shape[-1] // self.image_size) > 1:
            pixel_values = F.avg_pool2d(pixel_values, finer)
        mid, last = self.cnn(pixel_values)
        grid = last.shape[-1]
        colours = F.adaptive_avg_pool2d(pixel_values, grid * COLOUR_CELLS)
        parts = [last, F.pixel_unshuffle(mid, 2), F.pixel_unshuffle(colours, COLOUR_CELLS)]
        if self.ear_blocks:
            parts.append(self.heard(pixel_values, is_sound, grid).to(last))
        return torch.cat(parts, dim=1)

    def middle(self, features: Tensor) -> Tensor:
        """Features (U, C, G, G) -> the middle blocks as the CNN gives them, (U, C', 2 G, 2 G)."""
        return F.pixel_shuffle(features[:, self.last_dim : self.last_dim + self.mid_dim], 2)

    def heard(self, pixel_values: Tensor, is_sound: Tensor | None, grid: int) -> Tensor:
        """(U, 3, S, S) -> the ear's features as channels (U, n, G, G), zero but for mel slices."""
        shape = (len(pixel_values), (self.out_dim - self.seen_dim) * grid**2)
        heard = torch.zeros(shape, device=pixel_values.device)
        if is_sound is not None and bool(is_sound.any()):
            hear = ear(self.ear_blocks, pixel_values.device)
            slices = pixel_values[is_sound, 0].float()  # of three equal channels
            heard[is_sound, : self.heard_dim] = hear(slices).to(heard)
        return heard.view(len(heard), self.out_dim - self.seen_dim, grid, grid)

"""OmniEncoder: one ViT from timm, shared by every knowledge modality (paper 3.2).

Legend: U units (stills, frames, mel slices), C stem channels, G grid side, T = prefix + G² tokens,
D encoder width. A unit is a (3, H, W) picture. The ViT does not know its modality; a stem with an
ear is told which units are sounds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoEncoderConfig
from mico_chat.model.mini.stem import COLOUR_CELLS, COLOUR_GAIN, Stem, timm, timm_model
from mico_chat.model.preprocessing import in_parts

AUDIO = KINDS.index("audio")


def cell_centres(n: int) -> Tensor:
    """Centres (n², 2) as (y, x) of an n x n grid over the unit square."""
    line = (torch.arange(n) + 0.5) / n
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


class OmniEncoder(nn.Module):
    """Units to tokens: (U, 3, H, W) -> (U, T, D), final norm included, prefix tokens first.

    Without ``position`` it has no E_Pos, which is the ViT's own table.
    """

    def __init__(self, config: MicoEncoderConfig, position: bool = True) -> None:
        super().__init__()
        self.stem: Stem | None = None
        vit: Any  # timm does not type the attributes of its models
        if config.stem is None:
            options = {"img_size": config.image_size, **(config.architecture_options or {})}
            vit = timm_model(config.architecture, num_classes=0, **options)
        else:
            self.stem = Stem(config.stem, config.image_size, config.ear_blocks)
            # The batch norm, without weights, brings the stem's channels to one scale.
            embed = partial(
                timm.layers.HybridEmbed,
                backbone=nn.BatchNorm2d(self.stem.seen_dim, affine=False),
                feature_size=config.image_size // 32,
            )
            sizes = ("embed_dim", "depth", "num_heads", "mlp_ratio")
            vit = timm.models.vision_transformer.VisionTransformer(
                img_size=config.image_size,
                patch_size=1,
                num_classes=0,
                embed_layer=embed,
                **{name: vars(config)[name] for name in sizes},
            )
            with torch.no_grad():
                vit.patch_embed.proj.weight[:, -3 * COLOUR_CELLS**2 :] *= COLOUR_GAIN
            for block in vit.blocks:
                # 50 tokens: on a CPU the fused kernel's backward pass is three times slower.
                block.attn.fused_attn = False
        if not position:
            vit.pos_embed = None
        self.vit: nn.Module = vit
        self.image_size = config.image_size
        self.embed_dim: int = vit.num_features
        self.n_prefix: int = vit.num_prefix_tokens
        self.grid: int = vit.patch_embed.grid_size[0]

    def features(self, pixel_values: Tensor, kind: Tensor | None = None) -> Tensor:
        """The stem's features, which training may cache; the pixels where there is no stem.

        ``kind`` (U,) are the units' kinds; without them no unit is taken for a sound.
        """
        if self.stem is None:
            return pixel_values
        return _computed(self.stem, pixel_values, *([] if kind is None else [kind == AUDIO]))

    def unit_features(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> Tensor:
        """A batch's pixels, or its cached stem features, as the features of its U units."""
        given = stem_features if pixel_values is None else pixel_values
        if given is None or (pixel_values is not None and stem_features is not None):
            raise ModelError("give either pixel_values or stem_features")
        if (total := int(media_units.sum())) != len(given):
            raise ModelError(f"media_units sum to {total} but there are {len(given)} units")
        if pixel_values is None:
            return given.to(next(self.vit.parameters()).dtype)
        kind = torch.repeat_interleave(media_kind, media_units)
        return self.features(given.to(next(self.parameters()).dtype), kind)

    def forward(self, features: Tensor) -> Tensor:
        """Features (see :meth:`features`) to tokens (U, T, D)."""
        return _computed(cast(Any, self.vit).forward_features, self.seen(features))

    def seen(self, features: Tensor) -> Tensor:
        """The features that are for the ViT: those that the ear heard are not."""
        return features if self.stem is None else features[:, : self.stem.seen_dim]


def _computed(compute: Callable[..., Tensor], *units: Tensor) -> Tensor:
    """What ``compute`` makes of units: outside of training, of some at a time.

    In training they are computed together: FSDP's processes must make equal numbers of calls.
    """
    return in_parts(compute, *units) if torch.is_inference_mode_enabled() else compute(*units)


def init_buffers(module: nn.Module) -> None:
    """Fill the buffers that timm keeps out of the state dict: rotary tables, EVA's key bias.

    Hugging Face builds a model without memory, and then calls ``_init_weights`` for each module.
    """
    if (compute := getattr(module, "init_non_persistent_buffers", None)) is not None:
        compute()

"""OmniEncoder: one ViT from timm, shared by every knowledge modality (paper 3.2).

Legend: U units (stills, frames, mel slices), C stem channels, G grid side, T = prefix + G² tokens,
D encoder width. A unit is a (3, H, W) picture; the encoder does not know its modality.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.model.config import MicoEncoderConfig
from mico_chat.model.ear import WIDTH, ear
from mico_chat.model.preprocessing import in_parts


def _import_timm() -> Any:
    """Import timm without torch's compiler, whose import took 1.3 of the 4 s of all imports.

    timm and torchvision import the compiler only to mark functions, so stand-ins are enough. Later
    code imports the real compiler.
    """

    def disable(function: Any = None, *_: Any, **__: Any) -> Any:  # with and without arguments
        return (lambda given: given) if function is None else function

    def is_compile_supported(device: str) -> Any:  # torchvision asks when an operator is called
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device)

    if "torch._dynamo" not in sys.modules:
        compiler, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
        vars(compiler)["disable"] = disable
        vars(utils)["is_compile_supported"] = is_compile_supported
        sys.modules.update({module.__name__: module for module in (compiler, utils)})
        try:
            return importlib.import_module("timm")
        except (ImportError, AttributeError):
            pass  # another release needs more of the compiler, so the import below brings it
        finally:
            for module in (compiler, utils):
                if sys.modules.get(module.__name__) is module:
                    del sys.modules[module.__name__]
    return importlib.import_module("timm")


timm = _import_timm()

COLOUR_CELLS = 4
"""Each grid cell keeps its own 4 x 4 colours, because deep features blur hue and exact depth."""

COLOUR_GAIN = 4.0
"""The colours' weights start larger by this factor: they are 48 of some 800 channels. After 120
steps on composed scenes, held-out things had the right colour in 70 % at 1 and in 84 % at 4."""


def cell_centres(n: int) -> Tensor:
    """Centres (n², 2) as (y, x) of an n x n grid over the unit square."""
    line = (torch.arange(n) + 0.5) / n
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)


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
        self.cnn: nn.Module = timm.create_model(name, features_only=True, out_indices=(3, 4))
        mid, last = cast(Any, self.cnn).feature_info.channels()
        self.last_dim: int = last
        self.mid_dim: int = mid * 4
        self.seen_dim: int = last + mid * 4 + 3 * COLOUR_CELLS**2
        self.ear_blocks = ear_blocks
        self.heard_dim = 2 * WIDTH * ear_blocks
        self.out_dim: int = self.seen_dim + -(-self.heard_dim // (image_size // 32) ** 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(U, 3, S, S) -> (U, C, G, G), G = image_size / 32; finer pixels are averaged first."""
        if (finer := pixel_values.shape[-1] // self.image_size) > 1:
            pixel_values = F.avg_pool2d(pixel_values, finer)
        mid, last = self.cnn(pixel_values)
        grid = last.shape[-1]
        colours = F.adaptive_avg_pool2d(pixel_values, grid * COLOUR_CELLS)
        parts = [last, F.pixel_unshuffle(mid, 2), F.pixel_unshuffle(colours, COLOUR_CELLS)]
        if self.ear_blocks:
            parts.append(self.heard(pixel_values, grid).to(last))
        return torch.cat(parts, dim=1)

    def middle(self, features: Tensor) -> Tensor:
        """Features (U, C, G, G) -> the middle blocks as the CNN gives them, (U, C', 2 G, 2 G)."""
        return F.pixel_shuffle(features[:, self.last_dim : self.last_dim + self.mid_dim], 2)

    def heard(self, pixel_values: Tensor, grid: int) -> Tensor:
        """(U, 3, H, W) -> the ear's features as channels (U, n, G, G), zero but for mel slices.

        A mel slice has three equal channels. A grey picture may have them too: nothing reads what
        is heard in it.
        """
        shape = (len(pixel_values), (self.out_dim - self.seen_dim) * grid**2)
        heard = torch.zeros(shape, device=pixel_values.device)
        slices = (pixel_values == pixel_values[:, :1]).flatten(1).all(1)
        if bool(slices.any()):
            hear = ear(self.ear_blocks, pixel_values.device)
            heard[slices, : self.heard_dim] = hear(pixel_values[slices, 0].float()).to(heard)
        return heard.view(len(heard), self.out_dim - self.seen_dim, grid, grid)


class OmniEncoder(nn.Module):
    """Units to tokens: (U, 3, H, W) -> (U, T, D), final norm included, prefix tokens first."""

    def __init__(self, config: MicoEncoderConfig) -> None:
        super().__init__()
        self.stem: Stem | None = None
        vit: Any  # timm does not type the attributes of its models
        if config.stem is None:
            options = config.architecture_options or {}
            vit = timm.create_model(
                config.architecture, num_classes=0, img_size=config.image_size, **options
            )
        else:
            self.stem = Stem(config.stem, config.image_size, config.ear_blocks)
            # The batch norm, without weights, brings the stem's channels to one scale.
            embed = partial(
                timm.layers.HybridEmbed,
                backbone=nn.BatchNorm2d(self.stem.seen_dim, affine=False),
                feature_size=config.image_size // 32,
            )
            sizes = ("embed_dim", "depth", "num_heads", "mlp_ratio")
            vit = timm.models.VisionTransformer(
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
        self.vit: nn.Module = vit
        self.image_size = config.image_size
        self.embed_dim: int = vit.num_features
        self.n_prefix: int = vit.num_prefix_tokens
        self.grid: int = vit.patch_embed.grid_size[0]

    def features(self, pixel_values: Tensor) -> Tensor:
        """The stem's features, which training may cache; the pixels where there is no stem."""
        return pixel_values if self.stem is None else _computed(self.stem, pixel_values)

    def unit_features(
        self, pixel_values: Tensor | None, stem_features: Tensor | None, media_units: Tensor
    ) -> Tensor:
        """A batch's pixels, or its cached stem features, as the features of its U units."""
        if stem_features is not None and pixel_values is None:
            features = stem_features.to(next(self.vit.parameters()).dtype)
        elif pixel_values is not None and stem_features is None:
            features = self.features(pixel_values.to(next(self.parameters()).dtype))
        else:
            raise ModelError("give either pixel_values or stem_features")
        total = int(media_units.sum())
        if total != len(features):
            raise ModelError(f"media_units sum to {total} but there are {len(features)} units")
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Features (see :meth:`features`) to tokens (U, T, D)."""
        return _computed(cast(Any, self.vit).forward_features, self.seen(features))

    def seen(self, features: Tensor) -> Tensor:
        """The features that are for the ViT: those that the ear heard are not."""
        return features if self.stem is None else features[:, : self.stem.seen_dim]


def _computed(compute: Callable[[Tensor], Tensor], units: Tensor) -> Tensor:
    """What ``compute`` makes of units: outside of training, of some at a time.

    In training they are computed together: FSDP's processes must make equal numbers of calls.
    """
    return in_parts(compute, units) if torch.is_inference_mode_enabled() else compute(units)


def init_buffers(module: nn.Module) -> None:
    """Fill the buffers that timm keeps out of the state dict: rotary tables, EVA's key bias.

    Hugging Face builds a model without memory, and then calls ``_init_weights`` for each module.
    """
    compute: Callable[[], None] | None = getattr(module, "init_non_persistent_buffers", None)
    if compute is not None:
        compute()

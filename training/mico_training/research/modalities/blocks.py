"""The encoder's transformer blocks on other sequences than pictures: series, tables, graphs.

Legend: B samples, N tokens, U pictures, T tokens a picture, D encoder width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mico_chat.errors import ModelError
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.text_branch import additive_mask


def keep_blocks(encoder: OmniEncoder, layers: int | None, pictures: bool) -> None:
    """Keep the first ``layers`` blocks (None: all) and, for ``pictures``, the patch embedding.

    Raises:
        ModelError: more layers than there are.
    """
    vit = cast(Any, encoder.vit)
    if layers is not None and not 0 < layers <= len(vit.blocks):
        raise ModelError(f"layers {layers}: this encoder has 1 to {len(vit.blocks)}")
    vit.blocks = vit.blocks[:layers]
    if not pictures:
        encoder.stem = None
        vit.patch_embed = nn.Identity()


def embed_pictures(encoder: OmniEncoder, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Features to the tokens that enter the blocks, (U, T, D) with E_Pos, and rotary positions."""
    vit = cast(Any, encoder.vit)
    embedded = vit._pos_embed(vit.patch_embed(features))
    if isinstance(embedded, tuple):  # timm's Eva
        return embedded[0], embedded[1]
    return embedded, None


def prefix_tokens(encoder: OmniEncoder, batch: int) -> Tensor:
    """The [CLS] and register tokens that stand before a sequence, (batch, prefix, D)."""
    vit = cast(Any, encoder.vit)
    tokens = torch.cat([t for t in (vit.cls_token, vit.reg_token) if t is not None], dim=1)
    positions = vit.pos_embed
    if positions is not None:
        own = positions.shape[1] - encoder.grid**2  # rows of E_Pos for the prefix
        tokens = tokens + F.pad(positions[:, :own], (0, 0, 0, tokens.shape[1] - own))
    return tokens.expand(batch, -1, -1)


def run_blocks(
    encoder: OmniEncoder, tokens: Tensor, mask: Tensor | None = None, rotary: Tensor | None = None
) -> Tensor:
    """Tokens (B, N, D), prefix first, through the blocks and the final norm.

    Args:
        encoder: whose blocks run.
        tokens: the input of the first block.
        mask: (B, N), true where there is a token; no token attends to the others.
        rotary: the positions that :func:`embed_pictures` gave; None for a sequence.
    """
    vit = cast(Any, encoder.vit)
    # Additive: some of timm's attentions take no boolean mask.
    bias = None
    if mask is not None and not bool(mask.all()):
        bias = additive_mask(mask[:, None, None], tokens.dtype)
    options = {"attn_mask": bias} | ({} if rotary is None else {"rope": rotary})
    x = vit.norm_pre(tokens)
    for block in vit.blocks:
        if vit.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(partial(block, **options), x, use_reentrant=False)
        else:
            x = block(x, **options)
    return cast(Tensor, vit.norm(x))

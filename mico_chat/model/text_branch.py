"""TextBranch: the language side of pretraining, a BERT that can look at media (paper 3.4).

Legend: B captions, S text length, N context tokens, d text width, V vocabulary, U units,
T tokens a unit, D encoder width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel

from mico_chat.model.config import MicoTextConfig
from mico_chat.model.context import KindProjections, Units


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (True: look there) as numbers to add to attention scores: 0 or the lowest one.

    Plain attention adds a mask as it is, so a boolean mask would hide nothing.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def backwards(prefix_mask: Tensor, length: int) -> Tensor:
    """A mask (B, S, S): all tokens look at the prefix; those after it look backwards too.

    Args:
        prefix_mask: (B, P), false where the prefix is padding; P may be 0.
        length: S, prefix included.
    """
    p = prefix_mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=prefix_mask.device).tril()
    seen = seen.expand(len(prefix_mask), -1, -1).clone()
    seen[:, :, :p] = prefix_mask.bool().unsqueeze(1)
    return seen


class TextBranch(nn.Module):
    """BERT with cross-attention: alone, over media, or causal over media (paper 3.4)."""

    def __init__(self, config: MicoTextConfig, context_dim: int, n_corpus_pairs: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.bert = BertModel(config.bert(), add_pooling_layer=False)
        eps = config.head_norm_eps
        self.context_proj: nn.Sequential | KindProjections
        if config.frames is None:
            self.context_proj = nn.Sequential(nn.Linear(context_dim, d), nn.LayerNorm(d, eps=eps))
        else:
            self.context_proj = KindProjections(config.frames, context_dim, d, eps)
        self.sampling = nn.Embedding(n_corpus_pairs, d)  # E_Sam of the caption's side, eq. (3)
        nn.init.normal_(self.sampling.weight, std=0.02)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=eps))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def project(self, tokens: Tensor, units: Units) -> Tensor:
        """The encoder's tokens (U, T, D) in the text's width (U, T, d), for cross-attention."""
        if isinstance(self.context_proj, KindProjections):
            return cast(Tensor, self.context_proj(tokens, units))
        return cast(Tensor, self.context_proj(tokens))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        corpus_pair: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Captions (B, S), context (B, N, d) already projected -> hidden states (B, S, d).

        ``attention_mask`` is (B, S), true at the tokens that all look at, or (B, S, S), which
        tokens look at which (:func:`backwards`).
        """
        s = input_ids.shape[1]
        by_all = attention_mask[:, None, :] if attention_mask.dim() == 2 else attention_mask
        mask = by_all.unsqueeze(1).bool().expand(-1, 1, s, s)
        embeds = self.bert.get_input_embeddings()(input_ids)
        embeds = embeds + self.sampling(corpus_pair).unsqueeze(1)
        cross = None
        if context is not None and context_mask is not None:
            cross = additive_mask(context_mask[:, None, None, :].expand(-1, 1, s, -1), embeds.dtype)
        output = self.bert(
            inputs_embeds=embeds,
            attention_mask=additive_mask(mask, embeds.dtype),
            encoder_hidden_states=context,
            encoder_attention_mask=cross,
        )
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """Logits of all words or of ``words`` (W,). The output table is the input table."""
        table = self.bert.get_input_embeddings().weight
        if words is None:
            return F.linear(self.head(hidden), table, self.head_bias)
        return F.linear(self.head(hidden), table[words], self.head_bias[words])

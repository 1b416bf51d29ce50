"""Stage 2 without the language model's layers: context tokens near the vectors of the right words.

A language model understands best what lies near its own word vectors. Before it listens at all,
the bridge learns to put a medium's tokens there: of all words in the batch's captions, which are in
this medium's? That takes the encoder and a table, not thirty layers, so that ten times as many
captions are seen in a minute.

Legend: B samples, N context tokens of the batch, W distinct words, S text length, L LLM width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from mico_chat.modeling import MicoChatForConditionalGeneration

START = 1.0
"""Inverse temperature in the beginning, of tokens in units of the word vectors' deviation."""


class WordAlignment(nn.Module):
    """A chat model under the word objective; trains what of the model has gradients."""

    accepts_loss_kwargs = False

    def __init__(self, chat: MicoChatForConditionalGeneration) -> None:
        super().__init__()
        self.chat = chat
        self.log_scale = nn.Parameter(torch.tensor(START).log())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **media: Tensor
    ) -> CausalLMOutputWithPast:
        """Loss over the words that ``labels`` (B, S) ask for; a row without media has none."""
        del input_ids, attention_mask
        rows = media.pop("media_row")
        context = self.chat.context_tokens(**media)
        row = torch.repeat_interleave(rows, torch.tensor([len(c) for c in context]).to(rows))
        table = cast(nn.Embedding, self.chat.get_input_embeddings()).weight
        loss = word_loss(torch.cat(context), row, labels, table, self.log_scale.exp())
        return CausalLMOutputWithPast(loss=cast(torch.FloatTensor, loss))


def word_loss(context: Tensor, row: Tensor, labels: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of context tokens (N, L) against the words of their samples' labels.

    A token speaks for a word by its dot product with the word's vector; a sample by its tokens'
    log-sum-exp. A word counts less the more samples of the batch have it.

    Args:
        context: all samples' tokens.
        row: (N,), which sample each is of.
        labels: (B, S), -100 where there is no word.
        table: (V, L), the language model's word vectors.
        scale: inverse temperature.
    """
    spoken = labels >= 0
    words, index = labels[spoken].unique(return_inverse=True)  # (W,)
    wanted = torch.zeros(len(labels), len(words), device=labels.device)
    wanted[spoken.nonzero()[:, 0], index] = 1.0
    wanted = wanted / wanted.sum(0)
    wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
    vectors = table[words].float()
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    tokens = context.float() / table.float().std()
    heard = (tokens @ vectors.T).float() * scale  # (N, W)
    shape = (len(labels), len(words))
    at = row.unsqueeze(1).expand(-1, len(words))
    top = torch.full(shape, -torch.inf, device=heard.device)
    top = top.scatter_reduce(0, at, heard.detach(), "amax").nan_to_num(neginf=0.0)
    total = torch.zeros(shape, device=heard.device).scatter_add(0, at, (heard - top[row]).exp())
    has_media = torch.bincount(row, minlength=len(labels)) > 0
    scores = total[has_media].log() + top[has_media]
    return -(wanted[has_media] * scores.log_softmax(-1)).sum(1).mean()

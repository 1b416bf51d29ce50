"""Stage 2 without the language model's layers: context tokens near the vectors of the right words.

Legend: B samples, N context tokens of the batch, W distinct words, S text length, L LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mico_chat.checkpoints.pretrained import MEDIA, MicoChatForConditionalGeneration
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import layout_of
from mico_chat.model.encoder import cell_centres
from mico_chat.model.regions import RegionBatch, region_loss

START = 1.0
"""The first inverse temperature, for tokens in units of the word vectors' deviation."""


@dataclass
class WordOutput(ModelOutput):
    """The two losses and their sum, scalars."""

    loss: Tensor | None = None
    word_loss: Tensor | None = None
    region_loss: Tensor | None = None


class WordAlignment(nn.Module):
    """Stage 2 without the language model's layers: context tokens near the right words' vectors.

    A language model understands vectors near its own word vectors best. So the bridge first learns
    to put a medium's tokens there: the loss asks which of the words in the batch's captions belong
    to this medium. That takes the encoder and a table instead of thirty layers: ten times as many
    captions are seen in a minute.
    """

    accepts_loss_kwargs = False

    def __init__(self, chat: MicoChatForConditionalGeneration) -> None:
        super().__init__()
        self.chat = chat
        self.log_scale = nn.Parameter(torch.tensor(START).log())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        media_row: Tensor,
        **inputs: Tensor,
    ) -> WordOutput:
        """The loss of the words in ``labels`` (B, S) and of the words of regions.

        ``inputs`` are the media, and the regions as :class:`RegionBatch` names them. A row without
        media has no loss.
        """
        del input_ids, attention_mask
        media = {name: tensor for name, tensor in inputs.items() if name in MEDIA}
        given = {name: tensor for name, tensor in inputs.items() if name not in MEDIA}
        context = self.chat.context_tokens(**media)
        row = torch.repeat_interleave(
            media_row, torch.tensor([len(c) for c in context]).to(media_row)
        )
        table = cast(nn.Embedding, self.chat.get_input_embeddings()).weight
        scale = self.log_scale.exp()
        loss = word_loss(torch.cat(context), row, labels, table, scale)
        regions = RegionBatch.given(given)
        if regions is None:
            return WordOutput(loss=loss, word_loss=loss)
        bound = self._region_loss(regions, context, media["media_kind"], table, scale)
        return WordOutput(loss=loss + bound, word_loss=loss, region_loss=bound)

    def _region_loss(
        self,
        regions: RegionBatch,
        context: Sequence[Tensor],
        kind: Tensor,
        table: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """The loss of regions' words.

        A query whose place lies in a region speaks for its words and its name, with one token for
        each if it has two. A still's global queries, and all queries of a clip, speak for the words
        of the whole medium.
        """
        bridge = self.chat.bridge.config
        each = bridge.place_tokens
        anchored = bridge.still_grid**2 * each
        own, whole = regions.places(cell_centres(bridge.still_grid).to(regions.box)), regions.whole
        first, last, region = [], [], []  # of each place; the same where it has one token
        for number, medium in enumerate(regions.medium.tolist()):
            found = context[medium]
            if layout_of(KINDS[int(kind[medium])]) == "still":
                found = found[-anchored - bridge.still_global :]  # without concept tokens
                if not whole[number]:
                    places = found[:anchored].unflatten(0, (-1, each))[own[number]]
                    first.append(places[:, 0])
                    last.append(places[:, -1])
                    region += [number] * len(places)
                    continue
                found = found[anchored:]
            first.append(found)
            last.append(found)
            region += [number] * len(found)
        row = torch.tensor(region).to(regions.medium)
        parts = [(regions.words, last), (regions.names, first)]
        parts = [(regions.both, last)] if each == 1 else parts
        total = torch.zeros((), device=table.device)
        for ids, tokens in parts:
            words, wanted = regions.vocabulary(ids)
            scores = spoken_for(torch.cat(tokens), words, table, scale)
            told = wanted.any(1)[row]  # a region without a name asks for none
            if bool(told.any()):
                total = total + region_loss(scores[told], row[told], wanted)
        return total


def spoken_for(context: Tensor, words: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Scores (N, W) of tokens (N, L) for words (W,), by their centred word vectors."""
    vectors = table[words].float()
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    return (context.float() / table.float().std() @ vectors.T).float() * scale


def word_loss(context: Tensor, row: Tensor, labels: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy between context tokens (N, L) and the words of their samples' labels (B, S).

    A token's score for a word is its dot product with the word's vector in ``table`` (V, L), times
    the inverse temperature ``scale``; a sample's score is the log-sum-exp over its tokens. ``row``
    (N,) names the sample of each token. A word that many samples of the batch have counts less.
    Labels are -100 where there is no word.
    """
    spoken = labels >= 0
    words, index = labels[spoken].unique(return_inverse=True)  # (W,)
    wanted = torch.zeros(len(labels), len(words), device=labels.device)
    wanted[spoken.nonzero()[:, 0], index] = 1.0
    wanted = wanted / wanted.sum(0)
    wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
    heard = spoken_for(context, words, table, scale)  # (N, W)
    shape = (len(labels), len(words))
    at = row.unsqueeze(1).expand(-1, len(words))
    top = torch.full(shape, -torch.inf, device=heard.device)
    top = top.scatter_reduce(0, at, heard.detach(), "amax").nan_to_num(neginf=0.0)
    total = torch.zeros(shape, device=heard.device).scatter_add(0, at, (heard - top[row]).exp())
    has_media = torch.bincount(row, minlength=len(labels)) > 0
    scores = total[has_media].log() + top[has_media]
    return -(wanted[has_media] * scores.log_softmax(-1)).sum(1).mean()

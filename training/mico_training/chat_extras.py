"""What stages 2 and 3 put around a chat model: noise in its media, and a loss of words alone.

Legend: B samples, N context tokens of the batch, W distinct words, S text length, L LLM width; for
the noise: B alike media, U units each, C grid cells a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.media.kinds import KINDS
from mico_chat.model.concepts import ConceptAttention
from mico_chat.model.config import layout_of
from mico_chat.model.context import AlikeMedia
from mico_chat.model.encoder import cell_centres
from mico_chat.model.media_path import MediaPath
from mico_chat.model.regions import RegionBatch, region_loss
from mico_training.recipe import DropRecipe

HIDDEN = -30.0
"""The logit of a name that is hidden."""


class MediaNoise:
    """Dropped paths, hidden names and simulated names of a model's media, in training mode alone.

    The changes hang on the model's modules as hooks: the model itself does not know them.

    ``drop.path`` is the probability that a medium's concept path is zeroed and, as large, that its
    grid path is, so that the model can do without either. ``drop.names`` is the probability that
    the learned names of a medium are hidden, which know the training pictures too well. Where a
    batch's ``simulated_names`` (M,) are not -1, the concept path sees this name instead of the
    picture (:func:`simulate`).

    Args:
        chat: the model with the media path.
        drop: the probabilities.
        trained: the module that takes the batches, where it is not ``chat`` itself.
    """

    def __init__(self, chat: MediaPath, drop: DropRecipe, trained: nn.Module | None = None) -> None:
        self.chat, self.drop = chat, drop
        self._names: Tensor | None = None
        self._draw = torch.empty(0)
        (trained or chat).register_forward_pre_hook(self._take_names, with_kwargs=True)
        if chat.concepts is not None:
            chat.concepts.change_cells = self._change_cells
        if drop.path > 0:
            if chat.concepts is not None:
                chat.concepts.register_forward_pre_hook(self._draw_paths)
                chat.concepts.register_forward_hook(self._drop_concepts)
            else:
                chat.bridge.register_forward_pre_hook(self._draw_paths)
            chat.bridge.register_forward_hook(self._drop_grid)

    def _take_names(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._names = kwargs.pop("simulated_names", None)
        return args, kwargs

    def _change_cells(self, cells: Tensor, media: AlikeMedia) -> Tensor:
        """Cell logits (B·U, C, names), names hidden or simulated."""
        concepts = self.chat.concepts
        if concepts is None or not self.chat.training:
            return cells
        if self.drop.names > 0:
            hidden = torch.rand(len(media.media), device=cells.device) < self.drop.names
            hidden = hidden.repeat_interleave(media.units).view(-1, 1, 1)
            learned = torch.arange(cells.shape[-1], device=cells.device) >= concepts.n_pretrained
            cells = cells.masked_fill(hidden & learned, HIDDEN)
        if self._names is not None and media.units == 1:
            names = self._names[media.media]
            named = names >= 0
            if bool(named.any()):
                cells = cells.clone()
                cells[named] = simulate(concepts, names[named], cells.shape[1]).to(cells.dtype)
        return cells

    def _draw_paths(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A number for each medium: the concept path goes below p, the grid path below 2 p."""
        if self.chat.training:
            media = args[1]  # AlikeMedia of the concepts, kinds (B,) of the bridge
            n = len(media.media) if isinstance(media, AlikeMedia) else len(media)
            self._draw = torch.rand(n, device=args[0].device)

    def _drop_concepts(
        self, module: nn.Module, args: Any, found: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Concept tokens (B, K, L) and cell values (B·U, C, L), zero where dropped."""
        if not self.chat.training:
            return found
        named, values = found
        keep = (self._draw >= self.drop.path).view(-1, 1, 1)
        if named is not None:
            named = named * keep
        if values is not None:
            values = values * keep.repeat_interleave(len(values) // len(keep), 0)
        return named, values

    def _drop_grid(self, module: nn.Module, args: Any, context: Tensor) -> Tensor:
        """The bridge's context tokens (B, N, L), zero where dropped."""
        if not self.chat.training:
            return context
        p = self.drop.path
        keep = (self._draw < p) | (self._draw >= 2 * p)
        return context * keep.view(-1, 1, 1)


def simulate(concepts: ConceptAttention, names: Tensor, n_cells: int) -> Tensor:
    """Cell logits (B, n_cells, n_visual) as the stem might give them for named things (B,).

    Classes are confused where their classifier rows are alike, the confidence varies, and the
    thing fills some of the cells. So the LLM learns to put a posterior into words for every name,
    pictured in the training data or not.
    """
    rows = torch.cat([concepts.classifier.weight, concepts.learned.weight]).detach()
    rows = F.normalize(rows - rows.mean(0), dim=-1)
    b, n = len(names), len(rows)
    alike = rows[names] @ rows.T  # (B, n_visual)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, 1, 1, device=rows.device).uniform_(low, high)

    inside = torch.rand(b, n_cells, 1, device=rows.device) < uniform(0.3, 1.0)
    # The pooled logits are the cells' mean: a thing in few cells is surer in each.
    share = inside.float().mean(1, keepdim=True).clamp(min=0.1)
    strength = uniform(6.5, 13.0) / share
    noise = torch.randn(b, n_cells, n, device=rows.device) * uniform(0.3, 2.0)
    shared = torch.randn(b, 1, n, device=rows.device) * uniform(0.0, 0.7)
    return inside * strength * alike.unsqueeze(1) + noise + shared


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
        region_medium: Tensor | None = None,
        region_box: Tensor | None = None,
        region_words: Tensor | None = None,
        region_names: Tensor | None = None,
        **media: Tensor,
    ) -> WordOutput:
        """The loss of the words in ``labels`` (B, S) and of the words of regions.

        A row without media has no loss. The ``region_`` inputs are :class:`RegionBatch`'s.
        """
        del input_ids, attention_mask
        context = self.chat.context_tokens(**media)
        row = torch.repeat_interleave(
            media_row, torch.tensor([len(c) for c in context]).to(media_row)
        )
        table = cast(nn.Embedding, self.chat.get_input_embeddings()).weight
        scale = self.log_scale.exp()
        loss = word_loss(torch.cat(context), row, labels, table, scale)
        regions = RegionBatch.given(region_medium, region_box, region_words, region_names)
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

"""Changes to a chat model's media that training makes on their way to the language model.

They hang on the model's modules as hooks: the model itself does not know them.

Legend: B alike media, U units each, C grid cells a unit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.model.concepts import ConceptAttention
from mico_chat.model.context import AlikeMedia
from mico_chat.model.media_path import MediaPath
from mico_chat.model.pretraining import MicoForPretraining
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
        chat: the model with the media path, or stage 1's, of which no path is dropped.
        drop: the probabilities.
        trained: the module that takes the batches, where it is not ``chat`` itself.
    """

    def __init__(
        self,
        chat: MediaPath | MicoForPretraining,
        drop: DropRecipe,
        trained: nn.Module | None = None,
    ) -> None:
        self.chat, self.drop = chat, drop
        self._names: Tensor | None = None
        self._draw = torch.empty(0)
        (trained or chat).register_forward_pre_hook(self._take_names, with_kwargs=True)
        if chat.concepts is not None:
            chat.concepts.change_cells = self._change_cells
        if drop.path > 0 and isinstance(chat, MediaPath):
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

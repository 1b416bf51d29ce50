"""Changes to a chat model's media that training makes on their way to the language model.

They hang on the model's modules as hooks: the model itself does not know them.

Legend: B alike media, U units each, C grid cells a unit.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mico_chat.media.kinds import KINDS
from mico_chat.model.context import AlikeMedia
from mico_chat.model.media_path import MediaPath
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.regions import RegionBatch
from mico_training.recipe import DropRecipe
from mico_training.simulated import GivenThings, simulate

AUDIO = KINDS.index("audio")
HIDDEN = -30.0
"""The logit of a name that is hidden."""


class MediaNoise:
    """Dropped paths, hidden names, simulated names and given things, in training mode alone.

    The changes hang on the model's modules as hooks: the model itself does not know them.

    ``drop.path`` is the probability that a medium's concept path is zeroed and, as large, that its
    grid path is, so that the model can do without either. ``drop.names`` is the probability that
    the learned names of a medium are hidden, which know the training pictures too well. Where a
    batch's ``simulated_names`` (M,) are not -1, the concept path sees this name instead of the
    picture (:func:`simulate`). Where its ``given`` (M,) are True, a medium's context tokens come
    from its regions (:class:`GivenThings`), and the encoder does not see it.

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
        self._given: Tensor | None = None
        self._regions: RegionBatch | None = None
        self._draw = torch.empty(0)
        (trained or chat).register_forward_pre_hook(self._take_inputs, with_kwargs=True)
        if isinstance(chat, MediaPath) and chat.things is not None:
            self._things = GivenThings(chat)
            self._seen_tokens = chat.context_tokens
            chat.context_tokens = self._context_tokens  # type: ignore[method-assign]
        if chat.concepts is not None:
            chat.concepts.change_cells = self._change_cells
        if drop.path > 0 and isinstance(chat, MediaPath):
            if chat.concepts is not None:
                chat.concepts.register_forward_pre_hook(self._draw_paths)
                chat.concepts.register_forward_hook(self._drop_concepts)
            else:
                chat.bridge.register_forward_pre_hook(self._draw_paths)
            chat.bridge.register_forward_hook(self._drop_grid)

    def _take_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self._names = kwargs.pop("simulated_names", None)
        self._given = kwargs.pop("given", None)
        if self._given is not None:
            keys = [key for key in kwargs if key.startswith("region_")]
            self._regions = RegionBatch.given({key: kwargs.pop(key) for key in keys})
        return args, kwargs

    def _context_tokens(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> list[Tensor]:
        """As the model's own, but of the given media from their regions."""
        given, regions = self._given, self._regions
        if given is None or regions is None or pixel_values is None:
            return self._seen_tokens(media_kind, media_units, pixel_values, stem_features)
        given = given & (media_kind != AUDIO)  # a clip's sound track
        if self._names is not None:
            self._names = self._names[~given]
        own = (~given).repeat_interleave(media_units)
        seen: list[Tensor] = []
        if not bool(given.all()):
            seen = self._seen_tokens(media_kind[~given], media_units[~given], pixel_values[own])
        pixels = pixel_values.split(media_units.tolist())
        return [
            self._things.tokens(regions, m, int(kind), pixels[m]) if given[m] else seen.pop(0)
            for m, kind in enumerate(media_kind)
        ]

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

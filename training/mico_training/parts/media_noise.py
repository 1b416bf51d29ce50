"""What training gives a model in place of its own parts: media with gaps and made-up names.

The model takes them as arguments of a step, and itself stays as it is.

Legend: M media of a batch, B alike media, U units each, C grid cells a unit, L LLM width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mico_chat.media.kinds import KINDS
from mico_chat.model.context import AlikeMedia
from mico_chat.model.media_path import Grid, MediaPath
from mico_chat.model.mini.concepts import ChangeCells, ConceptAttention
from mico_chat.model.mini.part import Seen
from mico_chat.model.mini.regions import RegionBatch
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.parts.simulated import GivenThings, Names, settle, simulate
from mico_training.recipe import DropRecipe

AUDIO = KINDS.index("audio")
HIDDEN = -30.0
"""The logit of a name that is hidden."""


class MediaNoise:
    """Makes a batch's inputs out of the collator's: dropped paths, hidden or simulated names, given
    things; all but the last in training mode alone.

    ``drop.path`` is the probability that a medium's concept path is zeroed and, as large, that its
    grid path is, so that the model can do without either. ``drop.names`` is the probability that
    the learned names of a medium are hidden, which know the training pictures too well. Where a
    batch's ``simulated_names`` (M,) are not -1, the concept path sees this name instead of the
    medium (:func:`simulate`). Of names (M, 2) the second says what it may be as well, or is -1
    (:func:`settle`); other media are shown as sure, as their answers are. Where its ``given``
    (M,) are True, a medium's context tokens come from its regions (:class:`GivenThings`), and the
    encoder does not see it.

    Args:
        model: with the media path, or stage 1's, of which no path is dropped.
        drop: the probabilities.
    """

    def __init__(self, model: MediaPath | MicoForPretraining, drop: DropRecipe) -> None:
        self.model, self.drop = model, drop
        self.things: GivenThings | None = None
        if isinstance(model, MediaPath) and model.things is not None:
            self.things = GivenThings(model)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        names, given = inputs.pop("simulated_names", None), inputs.pop("given", None)
        if isinstance(self.model, MicoForPretraining):
            return inputs | {"change": self._change(names)}
        regions = None
        if given is not None:
            keys = [key for key in inputs if key.startswith("region_")]
            regions = RegionBatch.given({key: inputs.pop(key) for key in keys})
        return inputs | {"see": partial(self._see, names, given, regions)}

    def _see(
        self,
        names: Tensor | None,
        given: Tensor | None,
        regions: RegionBatch | None,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> list[Tensor]:
        """As the model's ``context_tokens``, but of the given media from their regions."""
        assert isinstance(self.model, MediaPath)
        grid, *others = self.model.parts
        if given is None or regions is None or pixel_values is None or self.things is None:
            media = (media_kind, media_units, pixel_values, stem_features)
            return self.model.context_tokens(*media, parts=(self._noisy(grid, names), *others))
        given = given & (media_kind != AUDIO)  # a clip's sound track
        own = (~given).repeat_interleave(media_units)
        seen: list[Tensor] = []
        if not bool(given.all()):
            noisy = self._noisy(grid, None if names is None else names[~given])
            rest = (media_kind[~given], media_units[~given], pixel_values[own])
            seen = self.model.context_tokens(*rest, parts=(noisy, *others))
        pixels = pixel_values.split(media_units.tolist())
        return [
            self.things.tokens(regions, m, int(kind), pixels[m]) if given[m] else seen.pop(0)
            for m, kind in enumerate(media_kind)
        ]

    def _noisy(self, grid: Any, names: Tensor | None) -> "NoisyGrid":
        drop = self.drop.path * self.model.training
        return NoisyGrid(grid, drop, self._change(names), names, self.model.training)

    def _change(self, names: Tensor | None) -> ChangeCells | None:
        concepts = self.model.concepts
        if concepts is None or not self.model.training:
            return None
        return partial(changed_cells, concepts, self.drop.names, names)


@dataclass(frozen=True)
class NoisyGrid:
    """A model's part :class:`Grid` whose cells change and whose paths are dropped."""

    grid: Grid
    drop: float
    change: ChangeCells | None
    names: Tensor | None = None
    training: bool = False

    def __call__(self, seen: Seen) -> Tensor:
        p, n = self.drop, len(seen.media.media)
        # A number for each medium: the concept path goes below p, the grid path below 2 p.
        draw = torch.rand(n, device=seen.features.device) if p > 0 else seen.features.new_ones(n)
        named, values = self.grid.named(seen, self.change)
        if values is not None:
            values = values * (draw >= p).repeat_interleave(seen.media.units).view(-1, 1, 1)
        context = self.grid.queried(seen, values)
        context = context * ((draw < p) | (draw >= 2 * p)).view(-1, 1, 1)
        if named is None:
            return context
        named = named * (draw >= p).view(-1, 1, 1)
        concepts = self.grid.path.concepts
        if self.training and concepts is not None and concepts.sure_above is not None:
            second = named[:, -concepts.name_ids.shape[1] :]
            made = (
                named.new_zeros(n)
                if self.names is None
                else self.names.view(len(self.names), -1)[seen.media.media, 0] >= 0
            )
            named = torch.cat([named[:, : -second.shape[1]], second * made.view(-1, 1, 1)], 1)
        return torch.cat([context, named.to(context.dtype)], 1)


SOUND_CELLS = 16
"""So many cells vote for the name of a simulated sound, whose own logits have no cells."""


def changed_cells(
    concepts: ConceptAttention, drop: float, names: Tensor | None, cells: Tensor, media: AlikeMedia
) -> Tensor:
    """Cell logits (B·U, C, N) with learned names hidden, or simulated for ``names`` (M,) or (M, 2).

    Of sounds they are the logits (B, 1, N) of each sound.
    """
    sounds = media.layout == "slices"
    if drop > 0 and not sounds:
        hidden = torch.rand(len(media.media), device=cells.device) < drop
        hidden = hidden.repeat_interleave(media.units).view(-1, 1, 1)
        learned = torch.arange(cells.shape[-1], device=cells.device) >= concepts.n_pretrained
        cells = cells.masked_fill(hidden & learned, HIDDEN)
    if names is not None and (media.units == 1 or sounds):
        own, *others = names[media.media].view(len(media.media), -1).unbind(1)
        named = own >= 0
        if bool(named.any()):
            known, first = Names.of(concepts, sounds), concepts.n_visual * sounds
            chosen = own[named] - first
            made = simulate(known, chosen, SOUND_CELLS if sounds else cells.shape[1])
            made = made.mean(1, keepdim=True) if sounds else made
            for seconds in others if known.sure is not None else ():
                made = settle(known, made, chosen, (seconds[named] - first).clamp(min=-1))
            cells = cells.clone()
            cells[named] = made.to(cells.dtype)
    return cells

"""From a medium's file to the encoder's input: pixels, or the stem's cached features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.media import MediaFile, MediaLimits, Medium, Video, decode
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MeasuredMedium
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import run_stem, stem_of
from mico_training.data.mixture import Mixture, all_media
from mico_training.data.regions import Region
from mico_training.features import FeatureCache, stem_fingerprint
from mico_training.recipe import FeatureRecipe, Recipe


@dataclass(frozen=True)
class LoadedMedium:
    """A medium as the model takes it: ``inputs`` (n, 3, H, W) pixels or (n, C, G, G) features.

    ``track`` is a video's sound track, which the model gets as a further medium after it.
    """

    kind: Kind
    inputs: Tensor
    track: Tensor | None = None

    @property
    def measured(self) -> MeasuredMedium:
        """The medium as the processor takes it."""
        track = None if self.track is None else MeasuredMedium("audio", len(self.track))
        return MeasuredMedium(self.kind, len(self.inputs), track)

    def parts(self) -> list[tuple[Kind, Tensor]]:
        """The media for the model: this one and, if there is one, its sound track."""
        own: list[tuple[Kind, Tensor]] = [(self.kind, self.inputs)]
        return own if self.track is None else [*own, ("audio", self.track)]


def regions_by_part(
    regions: Sequence[tuple[Region, ...]], media: Sequence[LoadedMedium]
) -> list[tuple[tuple[Region, ...], Tensor]]:
    """The regions and the inputs of each medium for the model.

    A sound track has no regions, and neither have the media behind the end of ``regions``.
    """
    found: list[tuple[tuple[Region, ...], Tensor]] = []
    for own, medium in zip([*regions, *[()] * len(media)], media, strict=False):
        found.append((own, medium.inputs))
        found += [((), track) for _, track in medium.parts()[1:]]
    return found


@dataclass(frozen=True)
class MediaLoader:
    """Loads media one by one.

    ``to_units`` is ``Preprocessing.units``; ``limits`` decide what is decoded of a medium. With a
    ``cache`` of the stem's features, every medium must be in it.
    """

    to_units: Callable[[Medium], Tensor]
    limits: MediaLimits
    cache: FeatureCache | None = None

    def pixels(self, medium: MediaFile) -> list[Tensor]:
        """Units of a medium and, for a video with sound, of its sound track; or a MediaError.

        The medium is decoded in this process: training data are trusted.
        """
        found = decode(medium, self.limits)
        units = [self.to_units(found)]
        if isinstance(found, Video) and found.audio is not None:
            units.append(self.to_units(found.audio))
        return units

    def load(self, medium: MediaFile) -> LoadedMedium:
        inputs = self.pixels(medium) if self.cache is None else self.cache[medium]
        return LoadedMedium(medium.kind, *inputs)

    def batch(self, rows: Sequence[Sequence[LoadedMedium]]) -> dict[str, Tensor]:
        """The model's media inputs for the rows of a batch; empty where no row has a medium.

        ``pixel_values`` (U, 3, H, W) or ``stem_features`` (U, C, G, G), ``media_kind``,
        ``media_units`` and ``media_row``, each (M,).
        """
        flat = [
            (row, KINDS.index(kind), inputs)
            for row, media in enumerate(rows)
            for medium in media
            for kind, inputs in medium.parts()
        ]
        if not flat:
            return {}
        places, kinds, inputs = zip(*flat, strict=True)
        return {
            "pixel_values" if self.cache is None else "stem_features": torch.cat(inputs),
            "media_kind": torch.tensor(kinds),
            "media_units": torch.tensor([len(units) for units in inputs]),
            "media_row": torch.tensor(places),
        }


def media_loader(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: MicoForPretraining | MicoChatForConditionalGeneration,
    preprocessing: Preprocessing,
    mixture: Mixture | None,
) -> MediaLoader:
    """A loader of pixels, or of the stem's features if the recipe has ``features``.

    The stem is then frozen, and the first rank fills the cache with the mixture's media while the
    others wait. Without a ``mixture``, an earlier call has filled the cache.
    """
    limits = MediaLimits()
    pixels = MediaLoader(preprocessing.units, limits)
    if recipe.features is None:
        return pixels
    stem = stem_of(model).requires_grad_(False).eval()
    settings = (
        preprocessing.model_dump_json(),
        limits.model_dump_json(include={"max_frames", "max_seconds", "max_side"}),
    )
    cache = FeatureCache(recipe.features.cache, stem_fingerprint(stem, *settings))
    with arguments.main_process_first(local=False, desc="features"):
        if arguments.process_index == 0 and mixture is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            cache.fill(
                all_media(mixture),
                pixels.pixels,
                _runner(stem.to(device), recipe.features),
                batch_size=recipe.features.batch_size,
                workers=recipe.train.workers,
            )
            stem.to("cpu")
    return MediaLoader(preprocessing.units, limits, cache)


def _runner(stem: nn.Module, recipe: FeatureRecipe) -> Callable[[Tensor], Tensor]:
    """The stem as a function of pixels (n, 3, H, W), n at most ``recipe.batch_size``."""
    if not recipe.compile:
        return partial(run_stem, stem)
    from torch._inductor import config as inductor

    half: Any = copy.deepcopy(stem).to(torch.bfloat16)
    half.to(memory_format=torch.channels_last)
    with inductor.patch(freezing=True):
        compiled = cast(nn.Module, torch.compile(half, dynamic=False))

    def run(pixels: Tensor) -> Tensor:
        n = len(pixels)  # one shape only, so that it is compiled once
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, recipe.batch_size - n))
        with inductor.patch(freezing=True):
            return run_stem(compiled, padded.to(torch.bfloat16))[:n]

    return run

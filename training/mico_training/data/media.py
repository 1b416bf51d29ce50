"""From an encoded medium to what the encoder takes: pixels, or the stem's cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mico_chat.media import MediaFile, MediaLimits, Medium, Video, decode
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MeasuredMedium
from mico_training.data.regions import Region
from mico_training.data.sample import TrainingMedium
from mico_training.features import FeatureCache


@dataclass(frozen=True)
class LoadedMedium:
    """A medium as the model takes it: ``inputs`` (n, 3, H, W) pixels or (n, C, G, G) features.

    ``track`` is a video's sound track, which the model gets as a medium of its own behind it.
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
        """The media that the model gets."""
        own: list[tuple[Kind, Tensor]] = [(self.kind, self.inputs)]
        return own if self.track is None else [*own, ("audio", self.track)]


def regions_by_part(
    regions: Sequence[tuple[Region, ...]], media: Sequence[LoadedMedium]
) -> list[tuple[tuple[Region, ...], Tensor]]:
    """The regions and the inputs of each medium that the model gets; a sound track has none.

    Where there are fewer ``regions`` than media, the rest have none.
    """
    found: list[tuple[tuple[Region, ...], Tensor]] = []
    for number, medium in enumerate(media):
        own = regions[number] if number < len(regions) else ()
        for part, (_, inputs) in enumerate(medium.parts()):
            found.append((() if part else own, inputs))
    return found


class MediaLoader:
    """Loads media one by one, from the cache where there is one.

    Args:
        to_units: a decoded medium to its units (n, 3, H, W), see ``Preprocessing.units``.
        limits: what is decoded of a medium (frames, seconds, pixels).
        cache: the stem's features; every medium must then be in it.
    """

    def __init__(
        self,
        to_units: Callable[[Medium], Tensor],
        limits: MediaLimits,
        cache: FeatureCache | None = None,
    ) -> None:
        self.to_units = to_units
        self.limits = limits
        self.cache = cache

    def pixels(self, medium: TrainingMedium) -> list[Tensor]:
        """Units of a medium and, for a video with sound, of its sound track.

        Decoded in this process: training data are trusted.

        Raises:
            MediaError: it cannot be decoded.
        """
        found = decode(MediaFile(medium.kind, medium.source, medium.name), self.limits)
        units = [self.to_units(found)]
        if isinstance(found, Video) and found.audio is not None:
            units.append(self.to_units(found.audio))
        return units

    def load(self, medium: TrainingMedium) -> LoadedMedium:
        """Pixels or cached features of a medium."""
        inputs = self.pixels(medium) if self.cache is None else self.cache[medium]
        return LoadedMedium(medium.kind, *inputs)

    def batch(self, rows: Sequence[Sequence[LoadedMedium]]) -> dict[str, Tensor]:
        """The model's media inputs for the rows of a batch; empty where no row has a medium.

        ``pixel_values`` (U, 3, H, W) or ``stem_features`` (U, C, G, G), ``media_kind``,
        ``media_units`` and ``media_row``, each (M,).
        """
        flat = [
            (row, kind, inputs)
            for row, media in enumerate(rows)
            for medium in media
            for kind, inputs in medium.parts()
        ]
        if not flat:
            return {}
        return {
            "pixel_values" if self.cache is None else "stem_features": torch.cat(
                [inputs for _, _, inputs in flat]
            ),
            "media_kind": torch.tensor([KINDS.index(kind) for _, kind, _ in flat]),
            "media_units": torch.tensor([len(inputs) for _, _, inputs in flat]),
            "media_row": torch.tensor([row for row, _, _ in flat]),
        }

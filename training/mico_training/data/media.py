"""From a medium's file to the encoder's input: pixels, or the frozen stem's cached features.

With cached features a training step reads rows instead of running a CNN. Each shard of media has
one safetensors file, which maps a medium's name to its float16 features. The file is written as a
whole: a killed run loses at most one shard's features. The folder's name is the stem's fingerprint
and the file's name the shard's, so the features of a changed stem or shard are never mixed up with
the old ones.
"""

import copy
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, DataError, MediaError
from mico_chat.media import MediaFile, MediaLimits, Video, decode
from mico_chat.media.addresses import Location, fingerprint
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MeasuredMedium
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.data.mixture import Mixture
from mico_training.data.sources.sample import Region
from mico_training.recipe import FeatureRecipe, Recipe

logger = logging.getLogger(__name__)

Units = Callable[[MediaFile], list[Tensor]]
"""Decodes a medium to units (n, 3, H, W); a video's sound track gives a second tensor."""

Stem = Callable[[Tensor, Tensor], Tensor]
"""Takes units (n, 3, H, W), and which of them are sounds (n,), on any device, and returns features
(n, C, G, G) on the stem's."""

TRACK = "#track"
"""The key of a video's sound track ends so."""


def stem_fingerprint(stem: nn.Module, *settings: str) -> str:
    """A name for a stem: a hash of its weights, and of the settings that decide its input."""
    digest = hashlib.sha256("\0".join(settings).encode())
    for name, value in sorted(stem.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of the media of shards, in a folder that runs share.

    ``stem`` is the stem's :func:`stem_fingerprint`.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder / stem
        self._opened: dict[Location, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_opened": {}}  # memory maps do not cross processes

    def __getitem__(self, medium: MediaFile) -> list[Tensor]:
        """Features (n, C, G, G) float32 of a medium and of its sound track, if it has one.

        Raises:
            MediaError: the medium could not be decoded; the cache holds the reason instead.
            DataError: the cache lacks it.
        """
        path = _member(medium).path
        if path not in self._opened:
            self._opened[path] = self._read(path)[1]
        shard = self._opened[path]
        own, track = _keys(medium)
        if own not in shard:
            raise DataError(medium.name, None, f"its features are not in {self.folder}")
        if shard[own].dtype == torch.uint8:
            raise MediaError(medium.name, shard[own].numpy().tobytes().decode())
        return [shard[key].float() for key in (own, track) if key in shard]

    def _read(self, path: Location) -> tuple[Path, dict[str, Tensor]]:
        """The file of a shard's features, and the features; a step reads them from the disk."""
        file = self.folder / f"{Path(path).stem}-{fingerprint(path)}.safetensors"
        return file, load_file(file) if file.is_file() else {}

    def fill(
        self,
        media: Iterable[MediaFile],
        units: Units,
        stem: Stem,
        *,
        batch_size: int = 32,
        workers: int = 0,
    ) -> int:
        """Add the features of all media that the cache lacks; returns the number of these media.

        ``workers`` processes decode; the stem runs on at most ``batch_size`` units at once, without
        gradients.
        """
        by_shard: dict[Location, list[MediaFile]] = {}
        for medium in media:
            member = replace(_member(medium), held=None)  # all of them would not fit in memory
            by_shard.setdefault(member.path, []).append(replace(medium, source=member))
        self.folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for path, members in by_shard.items():
            file, held = self._read(path)
            todo = [medium for medium in members if _keys(medium)[0] not in held]
            if todo:
                logger.info("%s: computing features of %d media", path, len(todo))
                begun = file.with_suffix(f".{os.getpid()}")
                save_file(held | _features(todo, units, stem, batch_size, workers), begun)
                begun.replace(file)
                done += len(todo)
        self._opened.clear()
        return done


def _member(medium: MediaFile) -> TarMember:
    if not isinstance(medium.source, TarMember):
        reason = "only media of shards can have cached features; leave 'features' out"
        raise DataError(medium.name, None, reason)
    return medium.source


def _keys(medium: MediaFile) -> tuple[str, str]:
    """The keys of a medium and of its sound track: the medium's name without its shard."""
    own = medium.name.partition("/")[2]
    return own, own + TRACK


def _tried(units: Units, medium: MediaFile) -> list[Tensor] | str:
    try:
        return units(medium)
    except MediaError as error:
        return error.reason


def _features(
    media: Sequence[MediaFile], units: Units, stem: Stem, batch_size: int, workers: int
) -> dict[str, Tensor]:
    """The features by key; those of a medium that cannot be decoded are the reason, as bytes."""
    tried: Any = partial(_tried, units)
    decoded: DataLoader[list[Tensor] | str] = DataLoader(
        cast(Any, media), batch_size=None, collate_fn=tried, num_workers=workers
    )
    progress = tqdm(decoded, total=len(media), desc="features", unit="media")
    found: dict[str, Tensor] = {}
    waiting: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (medium, pixels) in enumerate(zip(media, progress, strict=True), 1):
        if isinstance(pixels, str):
            logger.warning("%s cannot be decoded: %s", medium.name, pixels)
            reason = torch.tensor(list(pixels.encode()), dtype=torch.uint8)
            found[_keys(medium)[0]], pixels = reason, []
        for key, part in zip(_keys(medium), pixels, strict=False):
            is_sound = key.endswith(TRACK) or medium.kind == "audio"
            waiting[key] = part, torch.full((len(part),), is_sound)
        counts = [len(part) for part, _ in waiting.values()]
        if waiting and (sum(counts) >= batch_size or number == len(media)):
            with torch.inference_mode():
                whole = (torch.cat(parts) for parts in zip(*waiting.values(), strict=True))
                parts = zip(*(x.split(batch_size) for x in whole), strict=True)
                features = torch.cat([stem(*part) for part in parts]).to(torch.float16).cpu()
            found.update(zip(waiting, features.split(counts), strict=True))
            waiting = {}
    return found


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
        inner = () if self.track is None else (MeasuredMedium("audio", len(self.track)),)
        return MeasuredMedium(self.kind, len(self.inputs), inner)

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

    ``limits`` decide which part of a medium is decoded. With a ``cache`` of the stem's features,
    every medium must be in it.
    """

    preprocessing: Preprocessing
    cache: FeatureCache | None = None
    limits: MediaLimits = field(default_factory=MediaLimits)

    def pixels(
        self, medium: MediaFile, generator: np.random.Generator | None = None
    ) -> list[Tensor]:
        """Units of a medium and, for a video with sound, of its sound track; or a MediaError.

        The medium is decoded in this process: training data are trusted. With a ``generator``, the
        frames and slices are drawn.
        """
        seed = None if generator is None else int(generator.integers(2**32))
        medium = replace(medium, sampling=self.preprocessing.sampling, seed=seed)
        found = decode(medium, self.limits)
        units = [self.preprocessing.units(found, generator)]
        if isinstance(found, Video) and found.audio is not None:
            units.append(self.preprocessing.units(found.audio, generator))
        return units

    def load(self, medium: MediaFile, generator: np.random.Generator | None = None) -> LoadedMedium:
        """A medium as evaluation takes it, or, with a ``generator``, as training does.

        A cache holds the frames and slices of evaluation: it leaves nothing to draw.
        """
        inputs = self.pixels(medium, generator) if self.cache is None else self.cache[medium]
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
    pixels = MediaLoader(preprocessing)
    if recipe.features is None:
        return pixels
    pixels = replace(pixels, limits=MediaLimits(max_frames=recipe.features.frames))
    if model.encoder.stem is None:
        raise ConfigError("features: this encoder lacks a frozen stem; leave 'features' out")
    stem = model.encoder.stem.requires_grad_(False).eval()
    settings = (
        preprocessing.model_dump_json(),
        pixels.limits.model_dump_json(include={"max_frames", "max_seconds", "max_side"}),
        *([f"ear {stem.ear_blocks}"] if stem.ear_blocks else []),
    )
    cache = FeatureCache(recipe.features.cache, stem_fingerprint(stem, *settings))
    with arguments.main_process_first(local=False, desc="features"):
        if arguments.process_index == 0 and mixture is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            places = ((source, index) for source in mixture.sources for index in range(len(source)))
            cache.fill(
                (medium for source, index in places for medium in source[index].media.values()),
                pixels.pixels,
                _runner(stem.to(device), device, recipe.features),
                batch_size=recipe.features.batch_size,
                workers=recipe.train.workers,
            )
            stem.to("cpu")
    return MediaLoader(preprocessing, cache, pixels.limits)


def _runner(stem: nn.Module, device: torch.device, recipe: FeatureRecipe) -> Stem:
    """The stem on its device, for at most ``recipe.batch_size`` units at once."""
    if not recipe.compile:
        return lambda pixels, sounds: cast(Tensor, stem(pixels.to(device), sounds.to(device)))
    from torch._inductor import config as inductor

    half: Any = copy.deepcopy(stem).to(torch.bfloat16)
    half.to(memory_format=torch.channels_last)
    half.heard = torch.compiler.disable(half.heard)  # which units are sounds depends on the values
    with inductor.patch(freezing=True):
        compiled = cast(nn.Module, torch.compile(half, dynamic=False))

    def run(pixels: Tensor, sounds: Tensor) -> Tensor:
        n = len(pixels)  # one shape only, so that it is compiled once
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, recipe.batch_size - n))
        sounds = F.pad(sounds, (0, recipe.batch_size - n))
        with inductor.patch(freezing=True):
            made = compiled(padded.to(device, torch.bfloat16), sounds.to(device))
        return cast(Tensor, made)[:n]

    return run

"""The frozen stem's features on disk, so that a training step reads rows instead of running a CNN.

Each shard of media has one safetensors file, which maps a medium's name to its float16 features.
The file is written as a whole: a killed run loses at most one shard's features. The folder's name
is the stem's fingerprint and the file's name the shard's, so the features of a changed stem or
shard are never mixed up with the old ones.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mico_chat.errors import DataError
from mico_chat.media.file import MediaFile, TarMember
from mico_training.data.shards import fingerprint

logger = logging.getLogger(__name__)

Units = Callable[[MediaFile], list[Tensor]]
"""Decodes a medium to units (n, 3, H, W); a video's sound track gives a second tensor."""

Stem = Callable[[Tensor], Tensor]
"""Takes units (n, 3, H, W) and returns features (n, C, G, G)."""

TRACK = "#track"
"""The end of the key of a video's sound track."""


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
        self._opened: dict[Path, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_opened": {}}  # memory maps do not cross processes

    def __getitem__(self, medium: MediaFile) -> list[Tensor]:
        """Features (n, C, G, G) float32 of a medium and of its sound track, if it has one."""
        path = _member(medium).path
        if path not in self._opened:
            self._opened[path] = self._read(path)
        shard = self._opened[path]
        own, track = _keys(medium)
        if own not in shard:
            raise DataError(medium.name, None, f"its features are not in {self.folder}")
        return [shard[key].float() for key in (own, track) if key in shard]

    def _file(self, path: Path) -> Path:
        return self.folder / f"{path.stem}-{fingerprint(path)}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor]:
        """The features of a shard; they stay on the disk until a step reads them."""
        file = self._file(path)
        return load_file(file) if file.is_file() else {}

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
        by_shard: dict[Path, list[MediaFile]] = {}
        for medium in media:
            by_shard.setdefault(_member(medium).path, []).append(medium)
        self.folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for path, members in by_shard.items():
            held = self._read(path)
            todo = [medium for medium in members if _keys(medium)[0] not in held]
            if todo:
                logger.info("%s: computing features of %d media", path, len(todo))
                file = self._file(path)
                partial = file.with_suffix(f".{os.getpid()}")
                save_file(held | _features(todo, units, stem, batch_size, workers), partial)
                partial.replace(file)
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


def _features(
    media: Sequence[MediaFile], units: Units, stem: Stem, batch_size: int, workers: int
) -> dict[str, Tensor]:
    """The features (n, C, G, G) float16 of media and of their sound tracks, by key."""
    decoded: DataLoader[list[Tensor]] = DataLoader(
        _Decoded(media, units), batch_size=None, num_workers=workers
    )
    progress = tqdm(decoded, total=len(media), desc="features", unit="media")
    found: dict[str, Tensor] = {}
    waiting: dict[str, Tensor] = {}
    for number, (medium, pixels) in enumerate(zip(media, progress, strict=True), 1):
        waiting.update(zip(_keys(medium), pixels, strict=False))
        counts = list(map(len, waiting.values()))
        if sum(counts) >= batch_size or number == len(media):
            with torch.inference_mode():
                parts = torch.cat(list(waiting.values())).split(batch_size)
                features = torch.cat([stem(part) for part in parts]).to(torch.float16).cpu()
            found.update(zip(waiting, features.split(counts), strict=True))
            waiting = {}
    return found


@dataclass(frozen=True)
class _Decoded(Dataset[list[Tensor]]):
    media: Sequence[MediaFile]
    units: Units

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.units(self.media[index])

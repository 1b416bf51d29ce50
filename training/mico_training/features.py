"""The frozen stem's features on disk, so that a training step reads rows instead of running a CNN.

Each shard has two files: ``*.f16`` holds the float16 features of all units, row after row;
``*.jsonl`` names the rows of each medium (its first line is the shape of a row). Features are
written before their names. So a killed run leaves at worst rows without a name, which the next run
writes again. The folder's name is the stem's fingerprint and the file's name the shard's, so a
changed stem or shard is never mixed up with the old one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mico_chat.errors import DataError
from mico_chat.media.file import TarMember
from mico_training.data.sample import TrainingMedium
from mico_training.data.shards import fingerprint

logger = logging.getLogger(__name__)

Units = Callable[[TrainingMedium], list[Tensor]]
"""Decodes a medium to units (n, 3, H, W); a video's sound track gives a second tensor."""

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
        self._opened: dict[Path, _ShardFeatures] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_opened": {}}  # memory maps do not cross processes

    def __getitem__(self, medium: TrainingMedium) -> list[Tensor]:
        """Features (n, C, G, G) float32 of a medium and of its sound track, if it has one."""
        path = _member(medium).path
        if path not in self._opened:
            self._opened[path] = _ShardFeatures(self._base(path))
        shard = self._opened[path]
        if medium.key not in shard.rows:
            raise DataError(medium.name, None, f"its features are not in {self.folder}")
        keys = [medium.key, medium.key + TRACK]
        return [shard.read(key) for key in keys if key in shard.rows]

    def _base(self, path: Path) -> Path:
        return self.folder / f"{path.stem}-{fingerprint(path)}"

    def fill(
        self,
        media: Iterable[TrainingMedium],
        units: Units,
        stem: Callable[[Tensor], Tensor],
        *,
        batch_size: int = 32,
        workers: int = 0,
    ) -> int:
        """Add the features of all media that the cache lacks; returns the number of these media.

        ``stem`` takes (n, 3, H, W) and returns (n, C, G, G); it is called without gradients.
        """
        missing: dict[Path, list[TrainingMedium]] = {}
        for medium in media:
            missing.setdefault(_member(medium).path, []).append(medium)
        self.folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for path, members in missing.items():
            shard = _ShardFeatures(self._base(path))
            todo = [medium for medium in members if medium.key not in shard.rows]
            if todo:
                logger.info("%s: computing features of %d media", path, len(todo))
                shard.repair()
                _compute(todo, units, stem, shard, batch_size, workers)
                done += len(todo)
        self._opened.clear()
        return done


class _ShardFeatures:
    """The cached features of a shard: key -> (first row, rows), and the memory-mapped rows.

    The index ends before a line that is incomplete, or whose rows never reached the disk.
    """

    def __init__(self, base: Path) -> None:
        self.data = base.with_name(base.name + ".f16")
        self.index = base.with_name(base.name + ".jsonl")
        self.rows: dict[str, tuple[int, int]] = {}
        self.shape: tuple[int, ...] = ()
        self.total = self.index_end = 0
        size = self.data.stat().st_size if self.data.is_file() else 0
        for line in self.index.read_bytes().splitlines(True) if self.index.is_file() else ():
            if not line.endswith(b"\n"):
                break
            content = json.loads(line)
            if "shape" in content:
                self.shape = tuple(content["shape"])
            else:
                stop = content["row"] + content["units"]
                if stop * self.row_bytes > size:
                    break
                self.rows[content["key"]] = (content["row"], content["units"])
                self.total = stop
            self.index_end += len(line)
        self.features: npt.NDArray[np.float16] = np.zeros((0, *self.shape), dtype=np.float16)
        if self.total:
            shape = (self.total, *self.shape)
            self.features = np.memmap(self.data, dtype=np.float16, mode="r", shape=shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; 0 as long as its shape is not known."""
        return math.prod(self.shape) * 2 if self.shape else 0

    def read(self, key: str) -> Tensor:
        start, units = self.rows[key]
        return torch.from_numpy(self.features[start : start + units].astype(np.float32))

    def repair(self) -> None:
        """Cut both files behind the last row with a name."""
        for path, end in ((self.data, self.total * self.row_bytes), (self.index, self.index_end)):
            with path.open("ab") as file:
                file.truncate(end)

    def append(self, keys: Sequence[str], counts: Sequence[int], features: Tensor) -> None:
        """Append the features (sum(counts), C, G, G) of some media."""
        shape, lines = tuple(features.shape[1:]), []
        if not self.shape:
            self.shape = shape
            lines.append(json.dumps({"shape": shape}))
        if shape != self.shape:
            reason = f"the stem gave the shape {shape}, but {self.shape} before"
            raise DataError(self.data, None, reason)
        with self.data.open("ab") as file:
            file.write(features.to(torch.float16).cpu().contiguous().numpy().data)
        for key, count in zip(keys, counts, strict=True):
            line = {"key": key, "row": self.total, "units": count}
            lines.append(json.dumps(line, ensure_ascii=False))
            self.total += count
        with self.index.open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def _member(medium: TrainingMedium) -> TarMember:
    if not isinstance(medium.source, TarMember):
        reason = "only media of shards can have cached features; leave 'features' out"
        raise DataError(medium.name, None, reason)
    return medium.source


def _compute(
    media: Sequence[TrainingMedium],
    units: Units,
    stem: Callable[[Tensor], Tensor],
    shard: _ShardFeatures,
    batch_size: int,
    workers: int,
) -> None:
    """Decode in ``workers`` processes, run the stem on some ``batch_size`` units, write."""
    decoded: DataLoader[list[Tensor]] = DataLoader(
        _Decoded(media, units), batch_size=None, num_workers=workers
    )
    progress = tqdm(decoded, total=len(media), desc="features", unit="media")
    keys: list[str] = []
    waiting: list[Tensor] = []
    for number, (medium, pixels) in enumerate(zip(media, progress, strict=True), 1):
        # The track comes first: a medium counts as cached once its own line is written.
        for key, part in reversed(
            list(zip((medium.key, medium.key + TRACK), pixels, strict=False))
        ):
            keys.append(key)
            waiting.append(part)
        if sum(map(len, waiting)) >= batch_size or number == len(media):
            with torch.inference_mode():
                parts = torch.split(torch.cat(waiting), batch_size)
                shard.append(keys, list(map(len, waiting)), torch.cat([stem(p) for p in parts]))
            keys, waiting = [], []


@dataclass(frozen=True)
class _Decoded(Dataset[list[Tensor]]):
    media: Sequence[TrainingMedium]
    units: Units

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.units(self.media[index])

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
        shard = self._shard(_member(medium).path)
        if medium.key not in shard.rows:
            raise DataError(medium.name, None, f"its features are not in {self.folder}")
        keys = [medium.key, medium.key + TRACK]
        return [shard.read(key) for key in keys if key in shard.rows]

    def _shard(self, path: Path) -> _ShardFeatures:
        if path not in self._opened:
            self._opened[path] = _ShardFeatures(self._base(path))
        return self._opened[path]

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
            known = _ShardFeatures(self._base(path)).rows
            todo = [medium for medium in members if medium.key not in known]
            if todo:
                logger.info("%s: computing features of %d media", path, len(todo))
                with _Writer(self._base(path)) as writer:
                    _compute(todo, units, stem, writer, batch_size, workers)
                done += len(todo)
        self._opened.clear()
        return done


class _ShardFeatures:
    """The cached features of a shard: key -> (first row, rows), and the memory-mapped rows."""

    def __init__(self, base: Path) -> None:
        self.rows: dict[str, tuple[int, int]] = {}
        self.shape, total = _read_index(base, self.rows)
        self.features: npt.NDArray[np.float16] = np.zeros((0, *self.shape), dtype=np.float16)
        if total:
            self.features = np.memmap(
                _data(base), dtype=np.float16, mode="r", shape=(total, *self.shape)
            )

    def read(self, key: str) -> Tensor:
        start, units = self.rows[key]
        return torch.from_numpy(self.features[start : start + units].astype(np.float32))


class _Writer:
    """Appends to the files of a shard, after the last row with a name."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.shape, self.total = _read_index(base, {}, repair=True)

    def __enter__(self) -> _Writer:
        self.data = _data(self.base).open("ab")
        self.data.truncate(self.total * math.prod(self.shape) * 2 if self.shape else 0)
        self.index = _index(self.base).open("a", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self.data.close()
        self.index.close()

    def write(self, keys: Sequence[str], counts: Sequence[int], features: Tensor) -> None:
        """Append the features (sum(counts), C, G, G) of some media."""
        shape = tuple(features.shape[1:])
        if not self.shape:
            self.shape = shape
            self.index.write(json.dumps({"shape": shape}) + "\n")
        if shape != self.shape:
            raise DataError(
                self.base, None, f"the stem gave the shape {shape}, but {self.shape} before"
            )
        self.data.write(features.to(torch.float16).cpu().contiguous().numpy().data)
        self.data.flush()
        for key, count in zip(keys, counts, strict=True):
            line = {"key": key, "row": self.total, "units": count}
            self.index.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.total += count
        self.index.flush()


def _data(base: Path) -> Path:
    return base.with_name(base.name + ".f16")


def _index(base: Path) -> Path:
    return base.with_name(base.name + ".jsonl")


def _read_index(
    base: Path, rows: dict[str, tuple[int, int]], *, repair: bool = False
) -> tuple[tuple[int, ...], int]:
    """Fill ``rows``; returns the shape of a row and the number of rows.

    The index ends before a line that is incomplete, or whose rows never reached the disk. With
    ``repair`` the file is cut there.
    """
    index, shape, total, end = _index(base), (), 0, 0
    if not index.is_file():
        return (), 0
    size = _data(base).stat().st_size if _data(base).is_file() else 0
    with index.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            content = json.loads(line)
            if "shape" in content:
                shape = tuple(content["shape"])
            else:
                stop = content["row"] + content["units"]
                if stop * math.prod(shape) * 2 > size:
                    break
                rows[content["key"]] = (content["row"], content["units"])
                total = stop
            end += len(line)
    if repair:
        with index.open("r+b") as file:
            file.truncate(end)
    return shape, total


def _member(medium: TrainingMedium) -> TarMember:
    if not isinstance(medium.source, TarMember):
        raise DataError(
            medium.name, None, "only media of shards can have cached features; leave 'features' out"
        )
    return medium.source


def _compute(
    media: Sequence[TrainingMedium],
    units: Units,
    stem: Callable[[Tensor], Tensor],
    writer: _Writer,
    batch_size: int,
    workers: int,
) -> None:
    """Decode in ``workers`` processes, run the stem on some ``batch_size`` units, write."""
    loader: DataLoader[list[Tensor]] = DataLoader(
        _Decoded(media, units), batch_size=None, num_workers=workers
    )
    waiting: list[Tensor] = []
    keys: list[str] = []

    def flush() -> None:
        with torch.inference_mode():
            features = torch.cat(
                [stem(part) for part in torch.split(torch.cat(waiting), batch_size)]
            )
        writer.write(keys, [len(part) for part in waiting], features)
        waiting.clear()
        keys.clear()

    for medium, pixels in zip(
        media, tqdm(loader, total=len(media), desc="features", unit="media"), strict=True
    ):
        # The track comes first: a medium counts as cached once its own line is written.
        names = (medium.key, medium.key + TRACK)[: len(pixels)]
        for key, part in reversed(list(zip(names, pixels, strict=True))):
            waiting.append(part)
            keys.append(key)
        if sum(len(part) for part in waiting) >= batch_size:
            flush()
    if waiting:
        flush()


class _Decoded(Dataset[list[Tensor]]):
    """The units of each medium, as a map-style data set."""

    def __init__(self, media: Sequence[TrainingMedium], units: Units) -> None:
        self.media = media
        self.units = units

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.units(self.media[index])

"""The frozen stem's features on disk, so that a training step reads rows instead of running a CNN.

One pair of files a shard and stem: ``*.f16`` holds the float16 features of all units, row after
row, and ``*.jsonl`` says which rows are whose (its first line gives the shape of a row). Features
are written before the line that names them, so that a killed run leaves at worst rows without a
name, which the next run cuts off and makes again. The folder's name is the stem's fingerprint,
the file's the shard's: neither a changed stem nor a changed shard is ever read by mistake.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from mico_chat.errors import DataError
from mico_chat.media import MediaLimits
from mico_chat.media.file import TarMember
from mico_chat.model.chat import MicoChatForConditionalGeneration
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import run_stem, stem_of
from mico_training.data.media import MediaLoader
from mico_training.data.mixture import Mixture
from mico_training.data.sample import TrainingMedium
from mico_training.data.shards import fingerprint
from mico_training.data.sources import all_media
from mico_training.recipe import FeatureRecipe, Recipe

logger = logging.getLogger(__name__)

Units = Callable[[TrainingMedium], list[Tensor]]
"""Decodes a medium and gives its units (n, 3, H, W) and, behind a video's, its sound track's."""

TRACK = "#track"
"""Added to a video's key for its sound track."""


def stem_fingerprint(stem: nn.Module, *settings: str) -> str:
    """Names a stem by its weights and whatever else decides its input (image size, frames)."""
    digest = hashlib.sha256("\0".join(settings).encode())
    for name, value in sorted(stem.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of the media of shards.

    Args:
        folder: where they lie; shared by runs.
        stem: the stem's fingerprint, see :func:`stem_fingerprint`.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder / stem
        self._opened: dict[Path, _ShardFeatures] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_opened": {}}  # memory maps do not cross processes

    def __getitem__(self, medium: TrainingMedium) -> list[Tensor]:
        """Features of a medium and of its sound track where it has one, (n, C, G, G) float32.

        Raises:
            DataError: they are not cached.
        """
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
        """Add the features of all media that are not there yet; returns how many media that was.

        ``stem`` takes (n, 3, H, W) and gives (n, C, G, G); it is called without gradients.
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
    """What is cached of one shard: key -> (first row, rows), and the rows, memory-mapped."""

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
    """Appends to the files of one shard, from the last row that has a name."""

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
    """Fill ``rows`` and return the shape of a row and the number of rows that are there.

    A line that was cut off by a kill, or names rows that never reached the disk, ends the index;
    with ``repair`` the file is cut there.
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
    """Decode (in ``workers`` processes), run the stem on about ``batch_size`` units, write."""
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
        # The track first: a medium counts as cached once its own line is written.
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


def media_loader(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: MicoForPretraining | MicoChatForConditionalGeneration,
    preprocessing: Preprocessing,
    mixture: Mixture | None,
) -> MediaLoader:
    """Loads pixels, or where the recipe has ``features`` the stem's features, cached by now.

    The stem is frozen then. With several ranks the first fills the cache and the others wait.
    Without a ``mixture`` nothing is looked for: all its media were cached by an earlier call.
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

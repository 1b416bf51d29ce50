"""The feature cache gives what the stem gave, survives a kill, and never serves a stale file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mico_chat.errors import DataError
from mico_training.data.sample import TrainingMedium
from mico_training.data.shards import ShardSource
from mico_training.features import FeatureCache, stem_fingerprint

FINGERPRINT = "abc"


def units(medium: TrainingMedium) -> list[Tensor]:
    """Units whose pixels tell the medium; a sound stands for a video with a sound track."""
    encoded = medium.encoded()
    assert isinstance(encoded, bytes)
    value = torch.tensor([float(sum(encoded) % 1000)])
    pixels = value.reshape(1, 1, 1, 1).expand(2, 3, 8, 8)
    return [pixels, pixels[:1] + 1] if medium.kind == "audio" else [pixels]


def stem(pixels: Tensor) -> Tensor:
    return pixels[:, :2, :7, :7] / 8


@pytest.fixture
def media(shards: Path) -> list[TrainingMedium]:
    source = ShardSource(str(shards / "*.tar"), "caption")
    return [m for i in range(len(source)) for m in source[i].media.values()]


def check(cache: FeatureCache, medium: TrainingMedium) -> None:
    expected = [stem(part) for part in units(medium)]
    torch.testing.assert_close(cache[medium], expected, rtol=1e-3, atol=1e-3)


def test_features_come_back(media: list[TrainingMedium], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FINGERPRINT)
    assert cache.fill(media, units, stem, batch_size=5) == 24
    assert cache.fill(media, units, stem) == 0
    for medium in media:
        check(cache, medium)


def test_a_killed_run_is_repaired(media: list[TrainingMedium], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FINGERPRINT)
    cache.fill(media[:7], units, stem, batch_size=2)
    data, index = (next((tmp_path / FINGERPRINT).glob(f"*.{end}")) for end in ("f16", "jsonl"))
    with data.open("ab") as file:
        file.write(b"rows without a name")
    with index.open("a") as file:
        file.write('{"key": "cut o')
    fresh = FeatureCache(tmp_path, FINGERPRINT)
    assert fresh.fill(media, units, stem, batch_size=2) == 24 - 7
    for medium in media:
        check(fresh, medium)


def test_another_stem_is_another_cache(media: list[TrainingMedium], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 1)
    before = stem_fingerprint(module, "224")
    assert before == stem_fingerprint(module, "224") != stem_fingerprint(module, "64")
    nn.init.zeros_(module.weight)
    assert stem_fingerprint(module, "224") != before
    FeatureCache(tmp_path, FINGERPRINT).fill(media[:2], units, stem)
    with pytest.raises(DataError, match="its features are not in"):
        FeatureCache(tmp_path, "def")[media[0]]


def test_files_outside_shards_are_refused(tmp_path: Path) -> None:
    medium = TrainingMedium("image", tmp_path / "cat.jpg", "cat.jpg")
    with pytest.raises(DataError, match="only media of shards can have cached"):
        FeatureCache(tmp_path, FINGERPRINT).fill([medium], units, stem)

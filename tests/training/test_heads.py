"""The concept heads, fitted on the stem's features of named media."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mico_chat.errors import ConfigError
from mico_chat.model.pretraining import MicoForPretraining
from mico_training import mini, mini_init
from mico_training.mini_init import fit, fit_heads
from mico_training.world.sample import write_shard
from tests.tiny import pretraining_model
from tests.training.conftest import scene
from tests.training.test_runs import moved, write_recipe


def test_both_heads_are_fitted_and_the_pretrained_rows_stay(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini_init, "BATCH_SIZE", 16)
    cache = {"cache": str(tmp_path / "features")}
    recipe = write_recipe(tmp_path, shards, tiny_pretraining, features=cache)
    mini.main(["heads", "--config", str(recipe), "--output", str(tmp_path / "fitted")])
    changed = moved(MicoForPretraining, tiny_pretraining, tmp_path / "fitted")
    assert {"concepts.learned.weight", "concepts.sound.2.weight"} <= changed
    assert all(name.startswith(("concepts.learned", "concepts.sound")) for name in changed)


def test_media_without_a_known_name_are_left_out(
    tmp_path: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}

    def count(what: str, head: nn.Module, logits: object, features: Tensor, *_: object) -> None:
        sizes[what] = len(features)

    monkeypatch.setattr(mini_init, "fit", count)
    unknown = replace(scene(1), concepts={"image.png": "no such thing"})
    write_shard(tmp_path / "train-000000.tar", [scene(0), unknown, scene(2)])
    cache = {"cache": str(tmp_path / "features")}
    recipe = write_recipe(tmp_path, tmp_path, tiny_pretraining, features=cache)
    fit_heads(recipe, tmp_path / "fitted")
    assert sizes == {"visual names": 2, "sound names": 2}


def test_a_head_tells_apart_what_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PASSES": 60, "BATCH_SIZE": 16, "LR": 0.05}.items():
        monkeypatch.setattr(mini_init, name, value)
    torch.manual_seed(0)
    classes = torch.arange(40) % 2
    features = torch.randn(40, 8)
    features[:, 0] += classes * 8.0
    head = nn.Linear(8, 2)
    fit("two names", head, head, features.half(), classes, 0.0)
    assert (head(features).argmax(1) == classes).float().mean() > 0.9


def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    with pytest.raises(ConfigError, match="add the key 'features'"):
        fit_heads(write_recipe(tmp_path, shards, tiny_pretraining))
    folder = tmp_path / "plain"
    shutil.copytree(tiny_pretraining, folder)
    pretraining_model(concepts=False).save_pretrained(folder)
    cache = {"cache": str(tmp_path / "features")}
    with pytest.raises(ConfigError, match="no concepts"):
        fit_heads(write_recipe(tmp_path, shards, folder, features=cache))

"""Weight files that are missing, cut, or of another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mico_chat.cli.doctor.weights import disagreements, read_weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_whole(file: Path) -> None:
    found = read_weights(file.parent)
    assert found.shapes == {"a.weight": (3, 4), "b": (5,)}
    assert found.size == file.stat().st_size
    assert found.faults == ()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    (fault,) = read_weights(file.parent).faults
    assert fault.startswith(f"model.safetensors is not whole: {file.stat().st_size} bytes")
    assert "\n" not in fault


def test_longer_than_it_says(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")
    assert len(read_weights(file.parent).faults) == 1


def test_a_pointer_of_git_lfs(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (fault,) = read_weights(file.parent).faults
    assert "is a Git LFS pointer" in fault


def test_nothing_and_pickled(tmp_path: Path) -> None:
    (fault,) = read_weights(tmp_path).faults
    assert fault == f"no model.safetensors in {tmp_path}"
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"12345")
    found = read_weights(tmp_path)
    assert (found.pickled, found.size, found.faults) == (True, 5, ())


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    (fault,) = read_weights(tmp_path).faults
    assert fault == "model.safetensors leads to a file that is not there"


def sharded(folder: Path, weight_map: object) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    whole = sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert read_weights(whole).faults == ("2.safetensors is missing",)
    save_file({"c": torch.zeros(2)}, tmp_path / "2.safetensors")
    (fault,) = read_weights(whole).faults
    assert fault.startswith("2.safetensors lacks b")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    assert read_weights(whole).faults == ()


@pytest.mark.parametrize("weight_map", [None, 3, "x"])
def test_an_index_that_is_none(tmp_path: Path, weight_map: object) -> None:
    (fault,) = read_weights(sharded(tmp_path, weight_map)).faults
    assert "is no index of shards" in fault
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert len(read_weights(tmp_path).faults) == 1


def test_disagreements() -> None:
    assert disagreements({"a": (1, 2)}, {"a": (1, 2)}) is None
    shape = disagreements({"a": (1, 2)}, {"a": (2, 1)})
    assert shape == "a is [1, 2] in the file but [2, 1] by the config (1 such)"
    assert disagreements({}, {"a": (1,), "b": (2,)}) == "a is in no file (2 such)"
    assert disagreements({"a": (1,)}, {}) == "a is in a file but not in the model (1 such)"

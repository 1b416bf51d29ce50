"""Two processes that share a model train as one does, resume, and leave the same folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.parallel import deepspeed_config
from mico_training.stages import train_stage3
from tests.training.test_runs import write_recipe

RUN = """
import sys, shutil
from pathlib import Path
import torch.distributed as dist
from mico_training.stages import {stage} as stage

recipe, output = Path(sys.argv[1]), Path(sys.argv[2])
stage(recipe)
if dist.get_rank() == 0:
    (output / "log.jsonl").rename(output / "whole.jsonl")
    shutil.rmtree(output / "checkpoint-4")
dist.barrier()
stage(recipe)  # once more, from the checkpoint in the middle
dist.barrier()
dist.destroy_process_group()
"""

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SHARED = [
    pytest.param("fsdp", None, id="fsdp"),
    pytest.param("fsdp", "nf4", id="fsdp-nf4"),
    pytest.param("zero2", None, id="zero2", marks=needs_deepspeed),
]


def write(folder: Path, shards: Path, model: dict[str, Any], **train: Any) -> Path:
    """A recipe of four steps."""
    train = {"batch_size": 2, "gradient_checkpointing": True} | train
    return write_recipe(folder, shards, model, train=train)


def two_ranks(worker: Path, code: str, *arguments: Path) -> None:
    """Run code in two processes of torchrun."""
    worker.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*command, str(worker), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def train_on_two_ranks(folder: Path, recipe: Path, stage: str) -> None:
    two_ranks(folder / "worker.py", RUN.format(stage=stage), recipe, folder / "out")


@pytest.fixture
def uneven(tmp_path: Path, make_shard: Any, make_scene: Any) -> Path:
    """A folder of shards where one process has pictures and sounds, and the other text alone."""
    samples = []
    for number in range(8):
        scene = make_scene(number)
        turns = scene.turns[:2] if number % 4 < 2 else scene.turns[3:]
        samples.append(dataclasses.replace(scene, turns=turns))
    folder = tmp_path / "uneven"
    folder.mkdir()
    make_shard(folder / "train-000000.tar", samples)
    return folder


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("parallel", "quantization"), SHARED)
def test_two_ranks_that_share_a_model_train_as_one(
    tmp_path: Path, uneven: Path, llama: Path, parallel: str, quantization: str | None
) -> None:
    shards = uneven
    model = {"name": "tiny", "llm": str(llama), "llm_quantization": quantization}
    model["llm_dtype"] = "bfloat16" if quantization else "float32"
    one, two = tmp_path / "one", tmp_path / "two"
    train_stage3(write(one, shards, model, accumulation=2))
    train_on_two_ranks(two, write(two, shards, model, parallel=parallel), "train_stage3")

    expected = losses(one / "out/log.jsonl")
    assert losses(two / "out/whole.jsonl") == pytest.approx(expected, rel=1e-3)
    assert losses(two / "out/log.jsonl") == pytest.approx(expected, rel=1e-3)
    kept = load_file(two / "out/checkpoint-2/model.safetensors")
    assert set(kept) == set(load_file(one / "out/checkpoint-2/model.safetensors"))
    held = sum(f.stat().st_size for f in (two / "out/checkpoint-4").rglob("*") if f.is_file())
    trained = sum(value.numel() * 4 for value in kept.values())
    assert held < 6 * trained  # weights, two states of the optimizer, DeepSpeed's own copies

    a = MicoChatForConditionalGeneration.from_pretrained(one / "out")
    b = MicoChatForConditionalGeneration.from_pretrained(two / "out")
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-2, atol=2e-3)
    assert json.loads((two / "out/config.json").read_text())["architectures"] == [
        "MicoChatForConditionalGeneration"
    ]


def test_pretraining_gathers_features_of_ranks_that_share_a_model(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    """As with DDP, whose contrastive loss is the whole batch's (test_ranks)."""
    weights = ["matching", "caption", "tagging", "region", "concept"]  # which draw at random
    stage = {"weights": dict.fromkeys(weights, 0.0)}
    histories = []
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        recipe = write(folder, shards, {"name": str(tiny_pretraining)}, parallel=parallel)
        content = yaml.safe_load(recipe.read_text()) | {"stage1": stage}
        content["train"]["gradient_checkpointing"] = parallel == "fsdp"
        recipe.write_text(yaml.safe_dump(content))
        train_on_two_ranks(folder, recipe, "train_stage1")
        histories.append(losses(folder / "out/whole.jsonl"))
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)
    a = MicoForPretraining.from_pretrained(tmp_path / "ddp/out").state_dict()
    b = MicoForPretraining.from_pretrained(tmp_path / "fsdp/out").state_dict()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-2, atol=1e-3)


def test_one_process_has_nobody_to_share_with(tmp_path: Path, shards: Path, llama: Path) -> None:
    model = {"name": "tiny", "llm": str(llama)}
    recipe = write(tmp_path / "one", shards, model, parallel="fsdp")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        train_stage3(recipe)


def test_without_deepspeed_its_extra_is_named(
    tmp_path: Path, shards: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "deepspeed" else found(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = write(tmp_path / "one", shards, {"name": "tiny", "llm": str(llama)}, parallel="zero2")
    with pytest.raises(Exception, match=r"pip install 'mico-chat\[deepspeed\]'"):
        train_stage3(recipe)


@needs_deepspeed
def test_deepspeed_knows_its_configuration() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(**deepspeed_config()["zero_optimization"]).stage == 2

"""Two processes train as one does, resume, leave the same folder, and share their contrasts."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.parallel import parallel_arguments
from mico_training.recipe import TrainRecipe
from mico_training.stages import train_stage1, train_stage3
from mico_training.world.sample import write_shard
from tests.training.conftest import scene
from tests.training.test_runs import losses, write_recipe

pytestmark = pytest.mark.slow

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mico_training.stages"])
"""The new processes have torch imported already: each import would take ten seconds."""


def two_ranks(work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work`` in two processes that form a group, as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(2, FORKS) as pool:
        ranks = [pool.submit(as_rank, rank, port, work, arguments) for rank in range(2)]
        for rank in ranks:
            rank.result(timeout=300)


def as_rank(rank: int, port: int, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    group |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    work(*arguments)
    dist.barrier()
    dist.destroy_process_group()


def train_twice(stage: Callable[[Path], None], recipe: Path, output: Path) -> None:
    """Train; then train again, from the checkpoint in the middle."""
    stage(recipe)
    if dist.get_rank() == 0:
        (output / "log.jsonl").rename(output / "whole.jsonl")
        shutil.rmtree(output / "checkpoint-4")
    dist.barrier()
    stage(recipe)


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
SHARED = [
    pytest.param("fsdp", None, id="fsdp"),
    pytest.param("fsdp", "nf4", id="fsdp-nf4"),
    pytest.param("zero2", None, id="zero2", marks=needs_deepspeed),
]


def write(
    folder: Path, shards: Path, model: dict[str, Any], train: dict[str, Any], **sections: Any
) -> Path:
    """A recipe of four steps."""
    train = {"batch_size": 2, "gradient_checkpointing": True} | train
    return write_recipe(folder, shards, model, train=train, **sections)


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A folder of shards where one process has pictures and sounds, and the other text alone."""
    samples = []
    for number in range(8):
        made = scene(number)
        turns = made.turns[:2] if number % 4 < 2 else made.turns[3:]
        samples.append(dataclasses.replace(made, turns=turns))
    (tmp_path / "uneven").mkdir()
    write_shard(tmp_path / "uneven/train-000000.tar", samples)
    return tmp_path / "uneven"


@pytest.mark.parametrize(("parallel", "quantization"), SHARED)
def test_two_ranks_that_share_a_model_train_as_one(
    tmp_path: Path, uneven: Path, llama: Path, parallel: str, quantization: str | None
) -> None:
    model = {"name": "tiny", "llm": str(llama), "llm_quantization": quantization}
    model["llm_dtype"] = "bfloat16" if quantization else "float32"
    one, two = tmp_path / "one", tmp_path / "two"
    train_stage3(write(one, uneven, model, {"accumulation": 2}))
    recipe = write(two, uneven, model, {"parallel": parallel})
    two_ranks(train_twice, train_stage3, recipe, two / "out")

    expected = pytest.approx(losses(one), rel=1e-3)
    assert losses(two, "whole.jsonl") == expected
    assert losses(two) == expected
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
    """As with DDP, whose contrastive loss is the whole batch's."""
    weights = ["matching", "caption", "tagging", "region", "concept"]  # which draw at random
    stage = {"weights": dict.fromkeys(weights, 0.0)}
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        model = {"name": str(tiny_pretraining)}
        train = {"parallel": parallel, "gradient_checkpointing": parallel == "fsdp"}
        recipe = write(folder, shards, model, train, stage1=stage)
        two_ranks(train_twice, train_stage1, recipe, folder / "out")
    one, other = (losses(tmp_path / name, "whole.jsonl") for name in ("ddp", "fsdp"))
    assert one == pytest.approx(other, rel=1e-4)
    a = MicoForPretraining.from_pretrained(tmp_path / "ddp/out").state_dict()
    b = MicoForPretraining.from_pretrained(tmp_path / "fsdp/out").state_dict()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-2, atol=1e-3)


def test_sharing_needs_several_processes_and_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainRecipe(lr=1e-3, steps=1, parallel="zero2")
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        parallel_arguments(train)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match=r"pip install 'mico-chat\[deepspeed\]'"):
        parallel_arguments(train)


def contrast(recipe: Path, folder: Path, answer: Path) -> None:
    """The contrastive loss and its gradients, averaged over two processes with half a batch."""
    train_stage1(recipe)  # brings up the process group
    model = MicoForPretraining.from_pretrained(folder)
    model.train(False)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    own = {name: value[half] for name, value in batch().items()}
    loss = model(**own | {"media_row": torch.arange(2)}).contrastive_loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found["loss"] = loss.detach()
    for value in found.values():
        dist.all_reduce(value)
        value /= 2
    if dist.get_rank() == 0:
        torch.save(found, answer)


def batch() -> dict[str, Tensor]:
    """Four pictures with different captions, one each."""
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(4, 3, 64, 64, generator=generator),
        "media_kind": torch.zeros(4, dtype=torch.long),
        "media_units": torch.ones(4, dtype=torch.long),
        "media_row": torch.arange(4),
        "input_ids": torch.randint(5, 40, (4, 6), generator=generator),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
    }


def test_the_loss_of_two_ranks_is_that_of_the_whole_batch(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    train = {"steps": 2, "batch_size": 2}
    recipe = write_recipe(tmp_path, shards, tiny_pretraining, train=train)
    two_ranks(contrast, recipe, tiny_pretraining, tmp_path / "answer.pt")
    assert (tmp_path / "out/log.jsonl").read_text().count("contrastive_loss") == 2

    model = MicoForPretraining.from_pretrained(tiny_pretraining)
    model.train(False)
    loss = model(**batch()).contrastive_loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = {"loss": loss.detach()} | gradients
    found = torch.load(tmp_path / "answer.pt")
    assert set(found) == set(expected)
    # Sums in another order: a single gradient may be off by some 1e-6.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

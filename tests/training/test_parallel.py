"""Several processes train as one does, split the model as asked, and go on as fewer.

Every run here is real: processes of one group on CPUs over gloo, as torchrun starts them.
"""

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
import transformers.trainer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.model.pretraining import MicoForPretraining
from mico_training import parallel, trainer
from mico_training.parallel import parallel_arguments, split
from mico_training.recipe import TrainRecipe
from mico_training.stages import train_stage1, train_stage2, train_stage3
from mico_training.world.sample import write_shard
from tests.training.conftest import scene
from tests.training.test_runs import losses, write_recipe

pytestmark = pytest.mark.slow

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mico_training.stages"])
"""The new processes have torch imported already: each import would take ten seconds."""

STAGES = {1: train_stage1, 2: train_stage2, 3: train_stage3}


def run(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work`` in several processes that form a group, as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, FORKS) as pool:
        group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        each = [pool.submit(as_rank, group, rank, work, arguments) for rank in range(ranks)]
        for rank in each:
            rank.result(timeout=300)


def as_rank(
    group: dict[str, int], rank: int, work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    group = group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    work(*arguments)
    dist.barrier()
    dist.destroy_process_group()


class Share(TrainerCallback):
    """Measures, after the first step, how much a process holds; writes it into the output folder.

    Of a model that is split over N processes, 1/N of the numbers is here: share 1. Of a whole one
    all are: share 0.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        every = here = 0
        for parameter in model.parameters():
            every += getattr(parameter, "ds_numel", parameter.numel())
            here += local(parameter).numel()
        share = (every - here) / (every - every / args.world_size)
        folder = Path(args.output_dir) / "shares"
        folder.mkdir(exist_ok=True)
        dtensors = sum(isinstance(p, DTensor) for p in model.parameters())
        measured = {"share": share, "dtensors": dtensors, "of": len(list(model.parameters()))}
        (folder / f"{args.process_index}.json").write_text(json.dumps(measured))


def local(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's piece


def train(stage: int, recipe: Path) -> None:
    if Share not in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.append(Share)
    STAGES[stage](recipe)


def shares(folder: Path) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "out/shares").iterdir())]


def write(
    folder: Path, shards: Path, model: Any, train: dict[str, Any], **sections: Any
) -> Path:
    """A recipe of a few steps with a small batch."""
    train = {"batch_size": 2, "gradient_checkpointing": True} | train
    return write_recipe(folder, shards, model, train=train, **sections)


def on_llama(llama: Path, quantization: str | None = None) -> dict[str, Any]:
    dtype = "bfloat16" if quantization else "float32"
    return {
        "name": "tiny",
        "llm": str(llama),
        "llm_quantization": quantization,
        "llm_dtype": dtype,
    }


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


deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'mico-chat[deepspeed]'",
)
ZERO = [
    pytest.param("zero2", None, id="zero2", marks=deepspeed),
    pytest.param("zero3", None, id="zero3", marks=deepspeed),
]
STEPS = 20


def test_stage_1_in_two_processes_is_stage_1_in_one(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    """Contrast alone, over the whole batch: the other objectives draw at random in each process.

    The patch embedding has a batch norm, which would see another batch, so it is frozen.
    """
    weights = dict.fromkeys(["matching", "caption", "tagging", "region", "concept"], 0.0)
    found = {}
    for name, ranks, ways in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        train_ = {"parallel": ways, "batch_size": 4 // ranks, "steps": STEPS, "save_steps": STEPS}
        train_["freeze"] = ["encoder.vit.patch_embed", "encoder.stem"]
        sections: Any = {"train": train_, "stage1": {"weights": weights}}
        recipe = write(tmp_path / name, shards, tiny_pretraining, **sections)
        run(ranks, train, 1, recipe)
        found[name] = losses(tmp_path / name)
    assert len(found["one"]) == STEPS
    assert found["fsdp"] == pytest.approx(found["one"], rel=1e-3)
    assert found["ddp"] == pytest.approx(found["one"], rel=1e-3)
    check_split(tmp_path / "fsdp")
    assert all(part["share"] == 0 for part in shares(tmp_path / "ddp"))
    a = MicoForPretraining.from_pretrained(tmp_path / "ddp/out").state_dict()
    b = MicoForPretraining.from_pretrained(tmp_path / "fsdp/out").state_dict()
    assert {name: value.shape for name, value in a.items()} == {n: v.shape for n, v in b.items()}


def check_split(folder: Path) -> None:
    for part in shares(folder):
        assert part["share"] > 0.9
        assert part["dtensors"] == part["of"]


@pytest.mark.parametrize(
    ("stage", "ways", "quantization"),
    [
        pytest.param(2, "fsdp", None, id="stage2-fsdp"),
        pytest.param(3, "fsdp", None, id="stage3-fsdp"),
        pytest.param(3, "fsdp", "nf4", id="stage3-fsdp-nf4"),
    ],
)
def test_two_processes_that_share_a_model_train_as_one(
    tmp_path: Path,
    uneven: Path,
    llama: Path,
    stage: int,
    ways: str,
    quantization: str | None,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    steps = {"steps": STEPS, "save_steps": STEPS}
    model = on_llama(llama, quantization)
    train(stage, write(one, uneven, model, steps | {"accumulation": 2}))
    run(2, train, stage, write(two, uneven, model, steps | {"parallel": ways}))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    check_split(two)


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
    run(2, contrast, recipe, tiny_pretraining, tmp_path / "answer.pt")
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

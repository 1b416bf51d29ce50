"""Several processes train as one does, split the model as asked, and go on as fewer.

Every run here is real: processes of one group on CPUs over gloo, as torchrun starts them.
"""

import dataclasses
import faulthandler
import functools
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

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
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_training import parallel
from mico_training.data.sources.written import write_shard
from mico_training.parallel import parallel_arguments, split
from mico_training.recipe import TrainRecipe
from mico_training.stages import train_stage1, train_stage2, train_stage3
from tests.mico_training.scenes import scene
from tests.mico_training.test_health import Spoilt
from tests.mico_training.test_runs import logged, losses, write_recipe

pytestmark = pytest.mark.slow

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

PATIENCE = 200.0  # seconds for one run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mico_training.stages", *(["deepspeed"] if DEEPSPEED else [])])
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
        ended = wait(each, timeout=PATIENCE, return_when=FIRST_EXCEPTION).done
        failed = [rank for rank in ended if rank.exception() is not None]
        if failed or len(ended) < ranks:  # the others wait for what will not come
            for process in list(cast(Any, pool)._processes.values()):
                process.kill()
    for rank in failed:
        rank.result()
    assert len(ended) == ranks, "the processes wait for each other"


def as_rank(
    group: dict[str, int], rank: int, work: Callable[..., None], arguments: Sequence[Any]
) -> None:
    group = group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in group.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    faulthandler.enable()  # a process that crashes says where
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
        share = (every - here) / (every - every / max(args.world_size, 2))
        folder = Path(args.output_dir) / "shares"
        folder.mkdir(exist_ok=True)
        dtensors = sum(isinstance(p, DTensor) for p in model.parameters())
        measured = {"share": share, "dtensors": dtensors, "of": len(list(model.parameters()))}
        measured["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        (folder / f"{args.process_index}.json").write_text(json.dumps(measured))


def local(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's piece


def train(stage: int, recipe: Path) -> None:
    everywhere: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    if Share not in everywhere:
        everywhere.append(Share)
    if DEEPSPEED:  # its sums through shared memory would have to be compiled first
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
    torch.multinomial = likeliest  # type: ignore[assignment]
    STAGES[stage](recipe)


def likeliest(weights: Tensor, n: int) -> Tensor:
    """In place of ``torch.multinomial``: no chance."""
    return weights.topk(n, 1).indices


def shares(folder: Path) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "out/shares").iterdir())]


def write(folder: Path, shards: Path, model: Any, train: dict[str, Any], **sections: Any) -> Path:
    """A recipe of a few steps with a small batch."""
    train = {"batch_size": 2, "gradient_checkpointing": True} | train
    return write_recipe(folder, shards, model, train=train, **sections)


def on_llama(llama: Path, quantization: str | None = None) -> dict[str, Any]:
    dtype = "bfloat16" if quantization else "float32"
    return {"name": "tiny", "llm": str(llama), "llm_quantization": quantization, "llm_dtype": dtype}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards where one process has pictures and sounds, and the other text alone."""
    samples = []
    for number in range(8):
        made = scene(number)
        turns = made.turns[:2] if number % 4 < 2 else made.turns[3:]
        samples.append(dataclasses.replace(made, turns=turns))
    folder = tmp_path_factory.mktemp("uneven")
    write_shard(folder / "train-000000.tar", samples)
    return folder


needs_deepspeed = pytest.mark.skipif(
    not DEEPSPEED, reason="DeepSpeed is not installed: pip install 'mico-chat[deepspeed]'"
)
STEPS = 10
ALL_STEPS = {"steps": STEPS, "save_steps": STEPS}
FULL = {
    "weights": dict.fromkeys(["tagging", "region", "concept"], 0.0),
    "mask_probability": 1.0,
    "label_smoothing": 0.1,
}
"""Stage 1 with the paper's three objectives, over the whole batch. Nothing is drawn: all words are
masked, and negatives are the likeliest ones (:func:`train`)."""
FROZEN = ["encoder.vit.patch_embed", "encoder.stem"]
"""They have batch norms, which would see another batch in each process."""


@pytest.fixture(scope="module")
def recipe_of(
    uneven: Path, shards: Path, tiny_pretraining: Path, llama: Path
) -> Callable[..., Path]:
    """Writes the recipe of a stage; the global batch is 4 samples whatever the processes."""

    def written(
        folder: Path,
        stage: int,
        ranks: int,
        quantization: str | None = None,
        stage1: Mapping[str, Any] = MappingProxyType({}),
        **train: Any,
    ) -> Path:
        if stage == 1:
            settings = {"batch_size": 4 // ranks, "freeze": FROZEN} | train
            return write(folder, shards, tiny_pretraining, settings, stage1={**FULL, **stage1})
        # The loss of a batch is a mean over its tokens, so that one process needs batches of two.
        settings = {"batch_size": min(2, 4 // ranks), "accumulation": max(1, 2 // ranks)} | train
        if quantization:  # bfloat16 has few digits: large steps make more of what it rounds away
            settings = {"lr": 1e-4} | settings
        return write(folder, uneven, on_llama(llama, quantization), settings)

    return written


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, recipe_of: Callable[..., Path]
) -> Callable[[int, str | None], Path]:
    """The folder of a run of a stage in one process; each runs once."""

    @functools.cache
    def run_alone(stage: int, quantization: str | None) -> Path:
        folder = tmp_path_factory.mktemp(f"alone{stage}")
        run(1, train, stage, recipe_of(folder, stage, 1, quantization, **ALL_STEPS))
        return folder

    return run_alone


RUNS = [
    *[pytest.param("fsdp", stage, None, id=f"fsdp-{stage}") for stage in STAGES],
    *[pytest.param("fsdp", stage, "nf4", id=f"fsdp-{stage}-nf4") for stage in (2, 3)],
    *[
        pytest.param(ways, stage, None, id=f"{ways}-{stage}", marks=needs_deepspeed)
        for ways in ("zero2", "zero3")
        for stage in STAGES
    ],
]


@pytest.mark.parametrize(("ways", "stage", "quantization"), RUNS)
def test_two_processes_that_share_a_model_train_as_one(
    tmp_path: Path,
    recipe_of: Callable[..., Path],
    alone: Callable[[int, str | None], Path],
    ways: str,
    stage: int,
    quantization: str | None,
) -> None:
    one = alone(stage, quantization)
    settings = {"parallel": ways, "packing": ways == "fsdp" and stage == 3, **ALL_STEPS}
    run(2, train, stage, recipe_of(tmp_path, stage, 2, quantization, **settings))
    assert len(losses(tmp_path)) == STEPS
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-3)
    if stage == 1:
        parts = [entry[f"{o}_loss"] for entry in logged(one) for o in ("matching", "caption")]
        assert min(parts) > 0
    assert len(shares(tmp_path)) == 2
    for rank in shares(tmp_path):
        assert (rank["share"] > 0.9) is (ways != "zero2")  # which splits gradients, not weights
        assert rank["dtensors"] == (rank["of"] if ways == "fsdp" else 0)
    same_folder(stage, one, tmp_path)


def same_folder(stage: int, one: Path, other: Path) -> None:
    """Whatever shares the model, the folder at the end has the same weights under one class."""
    kind: Any = MicoForPretraining if stage == 1 else MicoChatForConditionalGeneration
    a, b = (kind.from_pretrained(folder / "out").state_dict() for folder in (one, other))
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-2, atol=1e-2)
    assert json.loads((other / "out/config.json").read_text())["architectures"] == [kind.__name__]
    kept = [load_file(f / f"out/checkpoint-{STEPS}/model.safetensors") for f in (one, other)]
    assert set(kept[0]) == set(kept[1])


def test_four_processes_with_two_copies_train_as_four_with_one(
    tmp_path: Path, recipe_of: Callable[..., Path], alone: Callable[[int, str | None], Path]
) -> None:
    """The full objective, in chunks too; a checkpoint of two copies goes on as one."""
    square, row = tmp_path / "square", tmp_path / "row"
    ways: Any = {"parallel": "hsdp", "shard_over": 2, **ALL_STEPS, "save_steps": STEPS // 2}
    run(4, train, 1, recipe_of(square, 1, 4, **ways, keep_checkpoints=3))
    run(4, train, 1, recipe_of(row, 1, 4, parallel="fsdp", **ALL_STEPS))
    assert losses(square) == pytest.approx(losses(row), rel=1e-5)
    assert losses(square) == pytest.approx(losses(alone(1, None)), rel=1e-3)
    # Each process holds a half, not a quarter.
    held = [rank["share"] * (1 - 1 / 4) for rank in shares(square)]
    assert held == pytest.approx([1 / 2] * 4, abs=0.05)
    same_folder(1, row, square)
    shutil.rmtree(square / f"out/checkpoint-{STEPS}")
    whole = losses(square)
    run(2, train, 1, recipe_of(square, 1, 2, stage1={"chunk": 1}, parallel="fsdp", **ALL_STEPS))
    assert losses(square) == pytest.approx(whole, rel=1e-4)


def test_copies_need_a_divisor_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = TrainRecipe(lr=1e-3, steps=1, parallel="hsdp")
    assert parallel.mesh_of(found, 8) == (2, 4)
    assert parallel.mesh_of(found, 4) == (4,)  # one copy
    with pytest.raises(ConfigError, match=r"6 processes are no whole number of copies over 4"):
        parallel.mesh_of(found, 6)
    with pytest.raises(ValueError, match="shard_over works with parallel hsdp, not with fsdp"):
        TrainRecipe(lr=1e-3, steps=1, parallel="fsdp", shard_over=2)


def go_on(stage: int, recipe: Path, output: Path) -> None:
    """Train; then train again, from the checkpoint in the middle."""
    train(stage, recipe)
    if dist.get_rank() == 0:
        (output / "log.jsonl").rename(output / "whole.jsonl")
        shutil.rmtree(output / "checkpoint-4")
    dist.barrier()
    train(stage, recipe)


@pytest.mark.parametrize("form", ["whole", "pieces", "async"])
def test_four_processes_stop_and_two_or_one_go_on_at_the_same_sample(
    tmp_path: Path, recipe_of: Callable[..., Path], form: str
) -> None:
    """Rank r's batch k is number k x ranks + r of the draws, and its losses are the sample's."""
    keep = {"checkpoint_format": form, "keep_checkpoints": 3}
    recipe = recipe_of(tmp_path, 3, 4, parallel="fsdp", **keep)
    run(4, train, 3, recipe)
    whole = losses(tmp_path)
    middle, end = (tmp_path / f"out/checkpoint-{step}" for step in (2, 4))
    held = sum(file.stat().st_size for file in middle.rglob("*.*"))
    trained = 4 * json.loads((tmp_path / "out/shares/0.json").read_text())["trained"]
    # Weights and two states of the optimizer, once for all processes.
    assert 3 * trained < held
    written = [file.stat().st_size for file in (middle / "pieces").glob("*.distcp")]
    if form == "whole":
        assert held < 4 * trained
    else:
        assert len(written) == 4, "each process writes its own"
        assert max(written) < sum(written) / 3
    for ranks, settings in (
        (2, {"parallel": "fsdp", "accumulation": 2}),
        (1, {"parallel": "ddp", "accumulation": 4}),
    ):
        shutil.rmtree(end)
        (tmp_path / "out/log.jsonl").unlink()
        recipe_of(tmp_path, 3, 4, **settings, **keep)
        run(ranks, train, 3, recipe)
        assert losses(tmp_path) == pytest.approx(whole, rel=1e-4)
    shutil.rmtree(end)
    if form == "async":  # killed while the pieces were written: the checkpoint is not used
        shutil.copytree(middle, end)
        (end / "pieces/.metadata").unlink()
    recipe_of(tmp_path, 3, 4, parallel="fsdp", **keep)
    with pytest.raises(ConfigError, match=r"checkpoint-2 was trained with 4 samples a step.* 2:"):
        run(2, train, 3, recipe)


def test_a_checkpoint_of_one_process_goes_on_in_pieces_as_two(
    tmp_path: Path, recipe_of: Callable[..., Path]
) -> None:
    keep = {"checkpoint_format": "async", "keep_checkpoints": 1}
    run(1, train, 1, recipe_of(tmp_path, 1, 1, **keep))
    whole, end = losses(tmp_path), tmp_path / "out/checkpoint-4"
    shutil.rmtree(end)
    run(2, train, 1, recipe_of(tmp_path, 1, 2, parallel="hsdp", shard_over=2, **keep))
    assert losses(tmp_path) == pytest.approx(whole, rel=1e-4)
    assert not (end / "model.safetensors").exists()
    recipe = recipe_of(tmp_path, 1, 1, **keep | {"freeze": [*FROZEN, "text"], "steps": 6})
    with pytest.raises(ConfigError, match=r"checkpoint-4 was made by another recipe: text\."):
        run(1, train, 1, recipe)


def spoil_one(recipe: Path) -> None:
    """Train with a loss that is not finite in the fourth pass of the second process."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            Spoilt(patch, {4}, math.inf)
        train(2, recipe)


@pytest.mark.parametrize(
    "ways",
    ["ddp", "fsdp", *(pytest.param(w, marks=needs_deepspeed) for w in ("zero2", "zero3"))],
)
def test_what_one_process_cannot_use_is_left_out_by_all(
    tmp_path: Path, recipe_of: Callable[..., Path], ways: str
) -> None:
    settings = {"save_steps": 1, "accumulation": 2, "keep_checkpoints": 9}
    run(2, spoil_one, recipe_of(tmp_path, 2, 2, parallel=ways, **settings))
    assert [entry["skipped_steps"] for entry in logged(tmp_path)] == [0, 1, 1, 1]
    assert all(map(math.isfinite, losses(tmp_path)))
    steps = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert steps == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


@needs_deepspeed
@pytest.mark.parametrize("ways", ["zero2", "zero3"])
def test_deepspeed_goes_on_with_as_many_processes(
    tmp_path: Path, recipe_of: Callable[..., Path], ways: str
) -> None:
    recipe = recipe_of(tmp_path, 3, 2, parallel=ways)
    run(2, go_on, 3, recipe, tmp_path / "out")
    assert losses(tmp_path) == pytest.approx(losses(tmp_path, "whole.jsonl"), rel=1e-5)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    recipe_of(tmp_path, 3, 4, parallel=ways)
    with pytest.raises(ConfigError, match=r"files of 2 processes, but now there are 4: start 2"):
        run(4, train, 3, recipe)


def train_whole(recipe: Path) -> None:
    """As if what splits models did nothing, and said nothing."""
    cast(Any, parallel).split = lambda *_: None
    train_stage3(recipe)


def test_a_run_that_is_not_split_ends(tmp_path: Path, recipe_of: Callable[..., Path]) -> None:
    recipe = recipe_of(tmp_path, 3, 2, parallel="fsdp")
    with pytest.raises(ConfigError, match=r"parallel fsdp did not take: 0% .* over 2 processes"):
        run(2, train_whole, recipe)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_model_that_is_not_shared_as_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(ways: Any, model: nn.Module) -> None:
        parallel.check_parallel(model, TrainRecipe(lr=1e-3, steps=1, parallel=ways))

    check("ddp", nn.Linear(2, 2))  # alone
    engine = nn.Linear(2, 2)
    engine.zero_optimization_stage = lambda: 2  # type: ignore[assignment]
    check("zero2", engine)
    for ways, model, found in (
        ("zero3", engine, "DeepSpeed runs at stage 2"),
        ("zero2", nn.Linear(2, 2), "DeepSpeed does not hold the model"),
    ):
        with pytest.raises(ConfigError, match=f"train.parallel {ways} did not take: {found}"):
            check(ways, model)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="ddp did not take: the model is a plain Linear"):
        check("ddp", nn.Linear(2, 2))


def test_gpus_are_split_by_the_lines_that_split_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No branch asks for the device: its type goes to the mesh, and nowhere else."""
    made: list[Any] = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda *mesh, **_: made.append(mesh))
    monkeypatch.setattr(parallel, "fully_shard", lambda *of, **how: made.append((of, how)))
    model = MicoForPretraining(MicoConfig.tiny())
    half = TrainRecipe(lr=1e-3, steps=1, parallel="fsdp", bf16=True)
    split(model, "cpu", half)
    on_cpu = made.copy()
    made.clear()
    split(model, "cuda", half)
    assert (on_cpu[0], made[0]) == (("cpu", (8,)), ("cuda", (8,)))
    assert on_cpu[1:] == made[1:]
    assert len(made) == 2 + len(parallel.layers(model))


def test_packed_weights_of_eight_bits_cannot_be_split() -> None:
    class Linear8bitLt(nn.Linear): ...

    with pytest.raises(ConfigError, match=r"cannot split .*llm_quantization int8"):
        split(nn.Sequential(Linear8bitLt(2, 2)), "cpu", TrainRecipe(lr=1e-3, steps=1))


def test_sharing_needs_several_processes_and_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainRecipe(lr=1e-3, steps=1, parallel="zero3")
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

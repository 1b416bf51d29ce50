"""Steps that are not finite, losses out of range, full disks and signals harm no model."""

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.cli.main import main
from mico_chat.errors import ConfigError, TrainingError
from mico_training.health import Health
from mico_training.stages import train_stage2
from mico_training.trainer import OPTIMIZER, WEIGHTS
from tests.mico_training.test_runs import logged, losses, write_recipe


class Spoilt:
    """Makes the loss of some forward passes another one."""

    def __init__(self, patch: pytest.MonkeyPatch, passes: Iterable[int], factor: float) -> None:
        self.n, forward = 0, MicoChatForConditionalGeneration.forward

        def spoilt(model: Any, *arguments: Any, **inputs: Any) -> Any:
            outputs = forward(model, *arguments, **inputs)
            self.n += 1
            if self.n in passes:
                outputs["loss"] = outputs["loss"] * factor
            return outputs

        patch.setattr(MicoChatForConditionalGeneration, "forward", spoilt)


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of each checkpoint and of the final folder, if it is there."""
    return {path.parent.name: load_file(path) for path in folder.rglob("model.safetensors")}


def test_a_learning_rate_that_destroys_the_model_ends_the_run(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    train = {"lr": 1e20, "steps": 40, "save_steps": 1}
    recipe = write_recipe(tmp_path, shards, tiny_chat, train=train)
    with pytest.raises(TrainingError) as error:
        train_stage2(recipe)
    said = str(error.value)
    assert "10 steps in a row were not finite" in said
    for part in ("norm is nan", "learning rate 7.", "begins anew", "train.lr (now 1e+20)"):
        assert part in said
    assert list(saved(tmp_path / "out")) == ["spoiled-checkpoint-1"]  # and no final folder
    entries = logged(tmp_path)
    assert entries[-1]["skipped_steps"] >= 9
    assert entries[-1]["loss"] is None
    train_stage2(recipe, ["train.lr=1e-4", "train.steps=2"])
    assert all(map(math.isfinite, losses(tmp_path)))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(
    tmp_path: Path, shards: Path, tiny_chat: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"use_cpu": True, "disable_tqdm": True, "optim": optim}
    train = {"accumulation": 2, "save_steps": 1, "weight_decay": 0.1, "arguments": arguments}
    train |= {"keep_checkpoints": 9}
    recipe = write_recipe(tmp_path, shards, tiny_chat, train=train)
    Spoilt(monkeypatch, {3, 8}, math.inf)  # in steps 2 and 4
    train_stage2(recipe)
    entries = logged(tmp_path)
    assert [entry["skipped_steps"] for entry in entries] == [0, 1, 1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in entries)  # of the other half
    assert entries[1]["grad_norm"] is None
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        *("checkpoint-1", "checkpoint-3", "checkpoint-4")
    ]
    three, four = (out / f"checkpoint-{step}" for step in (3, 4))
    assert (three / WEIGHTS).read_bytes() == (four / WEIGHTS).read_bytes()
    states = [torch.load(path / OPTIMIZER)["state"] for path in (three, four)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_loss_out_of_its_range_ends_the_run(
    tmp_path: Path, shards: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat, train={"steps": 30})
    Spoilt(monkeypatch, range(8, 99), 100.0)
    with pytest.raises(
        TrainingError, match=r"step 12: the loss is .* after a best of .*checkpoint-6"
    ):
        train_stage2(recipe)
    assert {"checkpoint-4", "checkpoint-6"} == set(saved(tmp_path / "out"))


@pytest.mark.parametrize("reward", [False, True])
def test_healthy_losses_stay_in_range(reward: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(500, generator=generator).tolist()
    falling = [11 * math.exp(-n / 50) + 2 * x for n, x in enumerate(noise)]
    others = [0.01 * x for x in noise] + [4 * x for x in noise]  # then other data
    policy = [0.0] * 20 + [80 * (x - 0.5) for x in noise]
    for series in [policy] if reward else [falling, others]:
        health = Health()
        for loss in series:
            health.note(
                {"loss": loss, "loss_at_start": series[0]} | ({"reward": 1} if reward else {})
            )
            assert not health.astray


TWO = {"log_steps": 2, "accumulation": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_chat: Path) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train_stage2(write_recipe(folder, shards, tiny_chat, train=TWO))
    return folder


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path, shards: Path, tiny_chat: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "full", shards, tiny_chat, train=TWO)
    out, write = tmp_path / "full/out", torch.save
    with monkeypatch.context() as patch:

        def full(content: Any, path: Any, *arguments: Any, **options: Any) -> None:
            if "checkpoint-4" in str(path):
                Path(path).write_bytes(b"half")
                raise RuntimeError(
                    "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"
                )
            write(content, path, *arguments, **options)

        patch.setattr(torch, "save", full)
        with pytest.raises(TrainingError) as error:
            train_stage2(recipe)
        for part in (
            "checkpoint-4: the disk is full",
            "bytes are needed",
            "are free",
            "checkpoint-2",
        ):
            assert part in str(error.value)
        assert not (out / "checkpoint-4").exists()
        little = shutil.disk_usage(tmp_path)._replace(free=10)
        patch.setattr(shutil, "disk_usage", lambda path: little)
        with pytest.raises(TrainingError, match="bytes are needed, and 10 are free"):
            train_stage2(recipe)
    train_stage2(recipe)
    assert losses(tmp_path / "full") == losses(whole)


class Ask(TrainerCallback):
    def __init__(self, number: int) -> None:
        self.number = number

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_a_checkpoint(
    tmp_path: Path,
    shards: Path,
    tiny_chat: Path,
    whole: Path,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat, train=TWO)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback, Ask(number)])
        patch.setattr("mico_chat.cli.models.log_to_stderr", lambda: None)
        with pytest.raises(SystemExit) as ended:
            main(["train-stage2", "--config", str(recipe)])
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert f"stopped by {signal.Signals(number).name} after step 3 of 4" in said
    assert said.count("checkpoint-3") == 1
    assert "Traceback" not in said
    assert 0 < logged(tmp_path)[-1]["mfu"] < 1
    train_stage2(recipe)
    assert [entry["step"] for entry in logged(tmp_path)] == [2, 3, 4]
    one, other = (saved(folder / "out")["out"] for folder in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_changed_data_are_an_error_unless_told(
    tmp_path: Path, tiny_chat: Path, shards: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(shards, own)
    recipe = write_recipe(tmp_path, own, tiny_chat)
    train_stage2(recipe)
    for path in own.glob("*.tar"):
        os.utime(path, (1, 1))  # another time is no other content
    train_stage2(recipe)
    path = own / "train-000001.tar"
    path.write_bytes(path.read_bytes().replace(b"a tone", b"a moan"))
    with pytest.raises(ConfigError, match=r"data have changed .*train\.changed_data"):
        train_stage2(recipe)
    train_stage2(recipe, ["train.changed_data=true", "train.steps=6"])
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2, 3, 4, 5, 6]


LEARN = """
import sys
from pathlib import Path
from mico_training.stages import train_stage1
train_stage1(Path(sys.argv[1]))
"""
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_two_runs_of_one_recipe_learn_the_same_words(tmp_path: Path, shards: Path) -> None:
    """In processes with other hash seeds and numbers of threads."""
    options = {f"text_config.{name}": n for name, n in (SMALL | {"intermediate_size": 64}).items()}
    model = {"name": "tiny", "options": options}
    folders, started = [tmp_path / "1", tmp_path / "2"], []
    for folder in folders:
        recipe = write_recipe(folder, shards, model, stage1={"vocabulary": 120})
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONHASHSEED": folder.name, "RAYON_NUM_THREADS": folder.name}
        command = [sys.executable, "-c", LEARN, str(recipe)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    words = [(folder / "out/tokenizer/tokenizer.json").read_bytes() for folder in folders]
    assert words[0] == words[1]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), abs=1e-6)


def test_a_report_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, tmp_path, {"name": "tiny"}, train={"report_to": ["wandb"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.report_to wandb: .* pip install wandb"):
        train_stage2(recipe)

"""Held-out data while a run trains: what is measured, what it leaves alone, when it ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mico_chat.errors import ConfigError
from mico_training.parts.held_out import answered
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.stages import train_stage1, train_stage2, train_stage3
from tests.mico_training.test_parallel import FROZEN, run, train
from tests.mico_training.test_runs import RECIPE, logged, write_recipe

STAGES: Any = {1: train_stage1, 2: train_stage2, 3: train_stage3}
MEASURED = {1: "R@1", 2: "accuracy", 3: "accuracy"}


def written(folder: Path, shards: Path, model: Path, train: Any = None, **held: Any) -> Path:
    data = [{"path": str(shards / "train-000001.tar")}]
    sections: dict[str, Any] = {"eval": {"data": data, "every": 2, "samples": 5} | held}
    return write_recipe(folder, shards, model, train=train or {}, **sections if held else {})


def of(folder: Path, key: str) -> dict[float, float]:
    return {entry["step"]: entry[key] for entry in logged(folder) if key in entry}


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_if_nothing_had_been_measured(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, tiny_chat: Path, stage: int
) -> None:
    model = tiny_pretraining if stage == 1 else tiny_chat
    drawn = {"steps": 5, "drop": {"path": 0.3}}
    STAGES[stage](written(tmp_path / "bare", shards, model, drawn))
    STAGES[stage](written(tmp_path / "held", shards, model, drawn, metric=MEASURED[stage]))
    assert of(tmp_path / "held", "loss") == of(tmp_path / "bare", "loss")
    figures = of(tmp_path / "held", f"eval_{MEASURED[stage]}")
    assert list(figures) == list(of(tmp_path / "held", "eval_loss")) == [2, 4, 5]
    assert all(0 <= value <= 100 for value in figures.values())


def test_the_best_weights_stay_and_a_run_that_grows_worse_ends(
    tmp_path: Path, shards: Path, tiny_chat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worse = {"lr": 10.0, "steps": 40, "save_steps": 40, "keep_checkpoints": 1, "max_grad_norm": 0}
    recipe = written(tmp_path, shards, tiny_chat, worse, patience=2, every=1)
    caplog.set_level("INFO")
    train_stage2(recipe)
    found = of(tmp_path, "eval_loss")
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(1, int(best) + 3))
    said = f"stopped at step {len(found)}: 2 evaluations were no better than that of step {best}"
    assert said in caplog.text
    assert f"the weights are those of checkpoint-{best}, by eval_loss" in caplog.text
    kept = load_file(tmp_path / f"out/checkpoint-{best}/model.safetensors")
    at_end = load_file(tmp_path / "out/model.safetensors")
    assert kept
    assert all(torch.equal(at_end[name], value) for name, value in kept.items())
    before = logged(tmp_path)
    train_stage2(recipe)  # the same command changes nothing
    assert logged(tmp_path) == before
    shutil.rmtree(tmp_path / f"out/checkpoint-{len(found)}")  # as if killed before the end
    train_stage2(recipe)
    assert of(tmp_path, "eval_loss") == pytest.approx(found, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ways"), [(1, "fsdp"), (1, "ddp"), (3, "fsdp"), (3, "zero3")])
def test_processes_measure_what_one_does(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, tiny_chat: Path, stage: int, ways: str
) -> None:
    model = tiny_pretraining if stage == 1 else tiny_chat
    for name, ranks, shared in (("one", 1, "ddp"), ("two", 2, ways)):
        settings = {"lr": 1e-9, "batch_size": 4 // ranks, "parallel": shared, "save_steps": 4}
        settings |= {"freeze": FROZEN} if stage == 1 else {}
        run(ranks, train, stage, written(tmp_path / name, shards, model, settings, metric="loss"))
    for key in ("eval_loss", f"eval_{MEASURED[stage]}"):
        assert of(tmp_path / "two", key) == pytest.approx(of(tmp_path / "one", key), rel=1e-4)


def test_an_answer_is_right_word_for_word() -> None:
    labels = torch.tensor([[-100, 1, 2, -100, 3, 4], [-100, -100, -100, 5, 6, -100]])
    said = torch.tensor([1, 2, 3, 0, 5, 6])  # the second answer of the first row ends in 4
    assert answered(torch.eye(8)[said], labels) == [True, False, True]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"every": 25}, "eval.every 25 is not a multiple of train.log_steps 10"),
        ({"metric": "accuracy"}, "eval.metric accuracy: this stage measures loss or R@1"),
        ({"data": []}, "eval.data"),
    ],
)
def test_what_does_not_fit_is_said_at_once(tmp_path: Path, held: Any, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match=said):
        load_recipe(
            Stage1Run,
            tmp_path / "recipe.yaml",
            [f"eval={json.dumps({'data': [{'path': 'x.tar'}], **held})}"],
        )

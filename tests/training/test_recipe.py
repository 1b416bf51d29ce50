"""Recipes: what is unknown is refused with its nearest neighbour, overrides have YAML's types."""

from __future__ import annotations

from pathlib import Path

import pytest

from mico_chat.errors import ConfigError
from mico_training.recipe import Stage1Run, Stage3Run, load_recipe

RECIPE = """
model: mini
output: runs/one
data:
  - {path: "shards/train-*.tar", ratio: 2}
train: {lr: 1e-4, steps: 100}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_overrides_reach_every_depth(recipe: Path) -> None:
    run = load_recipe(
        Stage1Run,
        recipe,
        [
            "train.lr=3e-5",
            "train.bf16=true",
            "data.0.skills=[name, count]",
            "stage1.weights.matching=0",
            "model.options.temperature=0.1",
        ],
    )
    assert run.train.lr == 3e-5
    assert run.train.bf16 is True
    assert run.data[0].skills == ("name", "count")
    assert run.stage1.weights.matching == 0
    assert run.model.name == "mini"
    assert run.model.options == {"temperature": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key 'train.learning_rat'"),
        ("train.stepz=1", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("stage1.weights.matchin=1", "did you mean 'matching'?"),
        ("data.0.ration=1", "unknown key 'data.0.ration'; did you mean 'ratio'?"),
        ("stage3.full=true", "unknown key 'stage3'; did you mean 'stage1'?"),
        ("train.lr=-1", "train.lr: Input should be greater than 0 (got -1)"),
        ("data.1.ratio=1", "the list has only the items 0 to 0"),
        ("train.lr", "write it as key=value"),
        ("train.save_steps=7", "save_steps 7 is not a multiple of log_steps 10"),
        ("train.end_lr=0.1", "end_lr 0.1 is not below lr"),
        ("train={lr: 1, steps: 1, end_lr: 0.1, schedule: constant}", "not with 'constant'"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(Stage1Run, recipe, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lora_and_full_exclude_each_other(recipe: Path) -> None:
    assert load_recipe(Stage3Run, recipe, ["stage3.full=true"]).stage3.full
    with pytest.raises(ConfigError, match="lora or full, not both"):
        load_recipe(Stage3Run, recipe, ["stage3.full=true", "stage3.lora.r=4"])


def test_a_missing_file_and_broken_yaml_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_recipe(Stage1Run, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(Stage1Run, broken)

"""The recipes that come with the project, and what a recipe of annotators may not say."""

from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import ConfigError
from mico_corpus.describing.base import OURS, annotator_class, check_options
from mico_corpus.recipe import AnnotatorRecipe, BuildRecipe
from mico_training.recipe import load_recipe

RECIPES = ("data-laptop", "data-vast")


class Mine:
    """An annotator of somebody else."""

    name = "mine"
    version = "1"

    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_its_options_are_known(name: str, root: Path) -> None:
    recipe = load_recipe(BuildRecipe, root / f"training/recipes/{name}.yaml", [])
    assert recipe.annotators
    for one in recipe.annotators:
        check_options(one.use, one.options)


def test_the_paper_s_recipe_uses_all_of_ours(root: Path) -> None:
    recipe = load_recipe(BuildRecipe, root / "training/recipes/data-vast.yaml", [])
    assert {one.use for one in recipe.annotators} == set(OURS)
    laptop = load_recipe(BuildRecipe, root / "training/recipes/data-laptop.yaml", [])
    assert all(one.gpus == 0 and "url" not in one.options for one in laptop.annotators)


@pytest.mark.parametrize("use", OURS)
def test_each_of_ours_has_its_name(use: str) -> None:
    assert annotator_class(use).name == use


@pytest.mark.parametrize(
    ("use", "options", "reason"),
    [
        (
            "depth",
            {"modle": "x"},
            "depth: it lacks the option 'modle'; its options are model, metr",
        ),
        (f"{__name__}:Mine", {}, "Mine: the option 'size' is needed"),
        (f"{__name__}:Yours", {}, "cannot be imported: .*Yours"),
        ("captions", {}, "'captions' is none of caption, depth, fuse, normal, safety, speech, t"),
    ],
)
def test_an_option_that_a_class_lacks(use: str, options: dict[str, Any], reason: str) -> None:
    check_options(f"{__name__}:Mine", {"size": 3})
    with pytest.raises(ConfigError, match=reason):
        check_options(use, options)


def recipe_of(*uses: str, **options: Any) -> BuildRecipe:
    last = AnnotatorRecipe(use=uses[-1], options=options)
    return BuildRecipe(annotators=(*(AnnotatorRecipe(use=use) for use in uses[:-1]), last))


def test_who_reads_another_comes_behind_it() -> None:
    assert recipe_of("depth", "normal")
    assert recipe_of("normal", model="facebook/sapiens2-normal-0.4b")
    assert recipe_of("my.package:Depths", "normal")
    for wrong in [("normal",), ("caption", "normal"), ("fuse", "caption")]:
        with pytest.raises(ConfigError, match=r"goes on from what '(depth|caption)' says: put a"):
            recipe_of(*wrong)

"""The page of all keys of a recipe is current, and its examples are valid."""

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter

from mico_training import recipe
from mico_training.recipe import Section
from mico_training.recipe_page import page

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def test_the_page_is_current() -> None:
    hint = "not current: python -m mico_training.recipe_page > docs/recipes.md"
    assert page() == PAGE.read_text(encoding="utf-8"), hint


SECTIONS = [s for s in vars(recipe).values() if isinstance(s, type) and issubclass(s, Section)]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_meaning_and_a_valid_example(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{name}: write what it means in a string below it"
        assert field.description.endswith("."), name
        for example in field.examples or ():
            kind: Any = Annotated[field.annotation, field]
            TypeAdapter(kind).validate_python(example)
        has_one = field.examples or field.get_default(call_default_factory=True)
        is_value = "Recipe" not in str(field.annotation)
        assert has_one not in (None, (), {}) or not is_value, f"{name}: give Field(examples=[...])"

"""Plain names: "cat" for an Egyptian Mau."""

from pathlib import Path

import pytest
import yaml

from mico_chat.errors import ConfigError
from mico_training.data.language.plain import TABLE, plain_names


def test_a_fine_name_becomes_plain_and_a_plain_name_stays() -> None:
    classes = [f"class {i}" for i in range(1000)]
    found = plain_names([*classes, "kitten", "umbrella"], 1000)
    assert [found[285], found[98]] == ["cat", "duck"]
    assert found[151:269] == ["dog"] * 118
    assert found[291] == "class 291", "a lion is called a lion"
    assert found[1000:] == ["cat", "umbrella"]


def test_names_without_imagenets_classes_are_looked_up_by_name_alone() -> None:
    assert plain_names(["kitten", "class 1"]) == ["cat", "class 1"]


def test_the_plain_name_of_a_plain_name_is_itself() -> None:
    plain = [str(name) for name in yaml.safe_load(TABLE.read_text(encoding="utf-8"))]
    assert plain_names(plain) == plain


def test_a_finer_name_has_one_plain_name(tmp_path: Path) -> None:
    table = tmp_path / "names.yaml"
    table.write_text("cat: 1-3\ndog: 3, puppy\n")
    with pytest.raises(ConfigError, match="3 is both cat and dog"):
        plain_names(["puppy"], path=table)

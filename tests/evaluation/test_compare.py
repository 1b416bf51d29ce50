"""Two evaluations side by side: equal items are compared, others are only named."""

import json
from pathlib import Path
from typing import Any

import pytest

from mico_chat.cli.evaluate import main
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.run import run
from mico_chat.evaluation.scores import score
from mico_chat.evaluation.task import ITEMS, Contents, Item, Reply
from tests.evaluation.parrot import Parrot


def evaluated(folder: Path, says: str | None, *, n: int = 4, other: str = "Two?") -> Path:
    """Results of a model that always says the same; "one" is right for half of the skill "sum"."""
    items = [Item(str(i), (), f"{i}?", (), (("one", "two")[i % 2],), (), "sum") for i in range(n)]
    items.append(Item("x", (), other, (), ("two",), (), "more"))
    reply = Reply("refused", "no") if says is None else Reply("answer", says)
    run(ITEMS, Contents(items), Parrot(lambda _: reply), folder / "items")
    report = {"skills": {"items": score(folder / "items")}}
    (folder / "results.json").write_text(json.dumps(report))
    return folder


def compared(a: Path, b: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--compare", str(a), str(b)]) == 0
    return capsys.readouterr().out


def test_equal_items_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = evaluated(tmp_path / "a", "one"), evaluated(tmp_path / "b", "two")
    printed = compared(a, b, capsys)
    assert "| sum | 4 | 50 % (15-85) | 50 % (15-85) | +0 |" in printed
    assert "| more | 1 | 0 % (0-79) | 100 % (21-100) | +100 |" in printed
    assert "A is parrot (by heart)" in printed
    refusing = evaluated(tmp_path / "c", None)
    assert "| sum | 4 | 50 % (15-85) | 4 refused |  |" in compared(a, refusing, capsys)


def test_other_items_are_named_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = evaluated(tmp_path / "a", "one"), evaluated(tmp_path / "b", "one", other="Tow?")
    printed = compared(a, b, capsys)
    assert "| sum | 4 |" in printed
    assert "| more |" not in printed
    assert "Not compared, because the items differ: more (1 and 1)" in printed


def task(figure: float | None, **more: Any) -> dict[str, Any]:
    row = {
        "metric": "accuracy",
        "figure": figure,
        "paper": {"figure": 73.7, "place": "", "also": {}},
        "judge": "j",
        "broken": 0,
        "refused": 0,
        "unjudged": 0,
        "run": {"data": "d", "items": 5},
    }
    return {**row, **more}


@pytest.mark.parametrize(
    ("other", "cells"),
    [
        (task(50.0), "60.0 | 50.0 | -10.0 | 73.7 |"),
        (task(None), "60.0 | - |  | 73.7 |"),
        (task(50.0, judge="k"), "60.0 | 50.0 | other judge | 73.7 |"),
        (task(50.0, refused=1), "60.0 | 50.0 | other items | 73.7 |"),
        (task(50.0, run={"data": "e", "items": 5}), "60.0 | 50.0 |  | 73.7 |"),
    ],
)
def test_tasks_are_compared_where_they_are_the_same(
    other: dict[str, Any], cells: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, row in (("a", task(60.0)), ("b", other)):
        (tmp_path / name).mkdir()
        report = {"tasks": {"msvd-qa-chat": row}}
        (tmp_path / name / "results.json").write_text(json.dumps(report))
    printed = compared(tmp_path / "a", tmp_path / "b", capsys)
    assert f"| msvd-qa-chat | accuracy | {cells}" in printed
    assert ("the items differ: msvd-qa-chat" in printed) is (other["run"]["data"] == "e")


def test_nothing_in_common_is_reported(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", "one")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"b: results\.json is missing"):
        main(["--compare", str(a), str(tmp_path / "b")])
    (tmp_path / "b" / "results.json").write_text('{"tasks": {}}')
    with pytest.raises(ConfigError, match=r"has items, .*b has nothing: no result is in both"):
        main(["--compare", str(a), str(tmp_path / "b")])

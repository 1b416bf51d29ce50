"""The table of tasks has the figures and settings of the paper; files of items are checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.errors import DataError
from mico_chat.evaluation.task import SUITES, TASKS, read_items
from mico_chat.media import MediaFile

PAPER = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


def test_the_25_figures_of_table_3() -> None:
    assert len(PAPER["figures"]) == 25
    of_stage_1 = {n: task for n, task in TASKS.items() if task.paper and not task.prompt}
    figures = {n: task.paper.figure for n, task in of_stage_1.items() if task.paper}
    assert figures == PAPER["figures"]
    first = {"retrieval": "R@1", "captioning": "CIDEr", "qa": "accuracy"}
    assert all(task.metrics[0] == first[task.family] for task in of_stage_1.values())
    assert all("SPIDEr" in TASKS[f"{n}-captioning"].metrics for n in ("clothov1", "audiocaps"))


def test_the_figures_of_the_chat_model() -> None:
    figures = {}
    for name, task in TASKS.items():
        if task.prompt and task.dataset != "own" and name not in (*SUITES, *PAPER["public"]):
            assert task.paper is not None
            assert task.max_tokens > 0
            figures[name] = [task.paper.figure, *task.paper.also.values()]
    assert figures == PAPER["chat"]
    public = {n: t.paper and t.paper.figure for n, t in TASKS.items() if len(t.controls) > 1}
    assert public == PAPER["public"]
    assert all("{question}" in t.prompt for t in TASKS.values() if t.prompt and t.family == "qa")


@pytest.mark.parametrize(("setting", "value", "names"), PAPER["settings"])
def test_settings_of_appendix_b2(setting: str, value: int, names: list[str]) -> None:
    assert {name: getattr(TASKS[name], setting) for name in names} == dict.fromkeys(names, value)


ITEM: dict[str, Any] = {
    "id": "1",
    "skill": "count",
    "message": "How many dogs are there?",
    "media": [{"kind": "image", "path": "media/x.jpg"}],
    "accept": ["two"],
    "choices": ["one", "two"],
}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "items.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    absolute = {**ITEM, "media": [{"kind": "audio", "path": "/x/y.wav"}]}
    short = {k: v for k, v in ITEM.items() if k not in ("media", "choices")} | {"reject": ["cat"]}
    items = read_items(write(tmp_path, *map(json.dumps, (ITEM, absolute, short))))
    assert items[0].media == (MediaFile("image", tmp_path / "media" / "x.jpg"),)
    assert items[1].media[0].source == Path("/x/y.wav")
    assert items[0].answers == ("two",)
    assert (items[2].media, items[2].choices) == ((), ())
    assert (items[0].reject, items[2].reject) == ((), ("cat",))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "Invalid JSON: "),
        (json.dumps({k: v for k, v in ITEM.items() if k != "accept"}), "Field required"),
        (json.dumps({**ITEM, "extra": 1}), "Extra inputs"),
        (json.dumps({**ITEM, "media": [{"kind": "smell", "path": "x"}]}), "Input should be"),
        ("[]", "should be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path, json.dumps(ITEM), line)
    with pytest.raises(DataError, match=reason) as caught:
        read_items(path)
    assert "items.jsonl" in str(caught.value)
    assert "2" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"x\.jsonl: its text is not UTF-8"):
        read_items(tmp_path / "x.jsonl")

"""The table of tasks against the paper's own text, and files of items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.task import SUITES, TASKS, read_items
from mico_chat.media import MediaFile

TABLE_3 = {
    "68.1 91.1 90.1 152.4 78.9 60.4 80.5": """coco-retrieval flickr30k-retrieval
        flickr30k-retrieval-zeroshot coco-captioning tgif-qa msvd-qa vqav2-qa""",
    "21.2 23.3 41.0 49.6 50.8 66.2": """clothov1-retrieval clothov2-retrieval audiocaps-retrieval
        clothov1-captioning clothov2-captioning audiocaps-captioning""",
    "64.3 51.3 78.7 81.3 63.6 68.5": """msrvtt-retrieval youcook2-retrieval valor32k-retrieval
        vatex-retrieval didemo-retrieval activitynet-retrieval""",
    "79.3 197.8 62.8 50.4 79.7 51.0": """msrvtt-captioning youcook2-captioning valor32k-captioning
        msrvtt-qa music-avqa activitynet-qa""",
}
"""The four rows "MiCo" of Table 3, left to right."""

B_2 = {
    "16 frames": "msrvtt-retrieval youcook2-retrieval vatex-retrieval youcook2-captioning "
    "activitynet-qa",
    "8 frames": "valor32k-retrieval msrvtt-captioning msrvtt-qa music-avqa",
    "32 frames": "didemo-retrieval activitynet-retrieval",
    "12 frames": "valor32k-captioning",
    "14 frames": "msvd-qa",
    "4 frames": "tgif-qa",
    "3 slices": "clothov1-retrieval clothov2-retrieval clothov1-captioning clothov2-captioning",
    "1 slices": "audiocaps-retrieval audiocaps-captioning msrvtt-qa",
    "2 slices": "didemo-retrieval activitynet-retrieval music-avqa activitynet-qa",
    "0 slices": "msvd-qa tgif-qa",
    "384 resolution": "coco-retrieval flickr30k-retrieval flickr30k-retrieval-zeroshot vqav2-qa",
    "480 resolution": "coco-captioning",
}
"""What tests take, from appendix B.2."""


def test_the_25_figures_of_table_3() -> None:
    figures = {
        name: float(figure)
        for row, names in TABLE_3.items()
        for figure, name in zip(row.split(), names.split(), strict=True)
    }
    assert len(figures) == 25
    of_stage_1 = {n: task for n, task in TASKS.items() if task.paper and not task.prompt}
    assert {n: task.paper.figure for n, task in of_stage_1.items() if task.paper} == figures
    first = {"retrieval": "R@1", "captioning": "CIDEr", "qa": "accuracy"}
    assert all(task.metrics[0] == first[task.family] for task in of_stage_1.values())
    assert all("SPIDEr" in TASKS[f"{n}-captioning"].metrics for n in ("clothov1", "audiocaps"))


def test_the_figures_of_the_chat_model() -> None:
    figures = {}
    for name, task in TASKS.items():
        if task.prompt and name not in SUITES:
            assert name.endswith("-chat")
            assert task.paper is not None
            assert task.max_tokens > 0
            figures[name] = (task.paper.figure, *task.paper.also.values())
    # The rows "MiCo-Chat-7B" of Tables 5 and 6.
    assert figures == {
        "clotho-captioning-chat": (33.3, 21.9),
        "clotho-aqa-chat": (63.9,),
        "msvd-qa-chat": (73.7, 4.1),
        "msrvtt-qa-chat": (60.1, 3.6),
        "activitynet-qa-chat": (50.1, 3.3),
    }
    assert all("{question}" in t.prompt for t in TASKS.values() if t.prompt and t.family == "qa")


@pytest.mark.parametrize("setting", B_2)
def test_settings_of_appendix_b2(setting: str) -> None:
    value, what = setting.split()
    for name in B_2[setting].split():
        assert getattr(TASKS[name], what) == int(value), name


# --- files of items -------------------------------------------------------------------------------

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
    short = {k: v for k, v in ITEM.items() if k not in ("media", "choices")}
    items = read_items(write(tmp_path, *map(json.dumps, (ITEM, absolute, short))))
    assert items[0].media == (MediaFile("image", tmp_path / "media" / "x.jpg"),)
    assert items[1].media[0].source == Path("/x/y.wav")
    assert items[0].answers == ("two",)
    assert (items[2].media, items[2].choices) == ((), ())


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

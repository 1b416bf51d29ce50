"""Items files: paths made whole, and what is wrong with a bad line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.items import read_items

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
    items = read_items(write(tmp_path, json.dumps(ITEM), json.dumps(absolute)))
    assert items[0].media[0].path == tmp_path / "media" / "x.jpg"
    assert items[0].media[0].kind == "image"
    assert items[1].media[0].path == Path("/x/y.wav")
    assert items[0].accept == ("two",)


def test_media_and_choices_may_be_left_out(tmp_path: Path) -> None:
    line = json.dumps({k: v for k, v in ITEM.items() if k not in ("media", "choices")})
    (item,) = read_items(write(tmp_path, line))
    assert item.media == ()
    assert item.choices == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "Expecting property name"),
        (json.dumps({k: v for k, v in ITEM.items() if k != "accept"}), "Field required"),
        (json.dumps({**ITEM, "extra": 1}), "Extra inputs"),
        (json.dumps({**ITEM, "media": [{"kind": "smell", "path": "x"}]}), "Input should be"),
        ("[]", "valid dictionary"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path, json.dumps(ITEM), line)
    with pytest.raises(DataError, match=reason) as caught:
        read_items(path)
    assert "items.jsonl" in str(caught.value)
    assert "2" in str(caught.value)

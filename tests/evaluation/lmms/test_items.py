"""Items as tasks of lmms-eval: the files that are written, and the marks of answers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mico_chat.errors import ConfigError, DataError, MediaError
from mico_chat.evaluation.lmms.items import (
    doc_to_messages,
    doc_to_visual,
    main,
    process_results,
    write_tasks,
)
from tests.evaluation.lmms.drawn import drawn_items

pytest.importorskip("pyarrow")


def rows(folder: Path, task: str) -> list[dict[str, object]]:
    from pyarrow import parquet

    found: list[dict[str, object]] = parquet.read_table(folder / f"data/{task}.parquet").to_pylist()
    return found


def test_a_task_for_each_skill(tmp_path: Path) -> None:
    file = drawn_items(tmp_path / "items", n=4)
    names = write_tasks([file], tmp_path / "tasks", name="drawn", limit=3)
    assert names == ["drawn", "drawn_colour", "drawn_sound", "drawn_clip", "drawn_how_far"]
    # The group lacks the depth maps, which lmms-eval's chat format cannot show.
    group = (tmp_path / "tasks/drawn.yaml").read_text()
    assert group == "group: drawn\ntask:\n  - drawn_colour\n  - drawn_sound\n  - drawn_clip\n"
    found = rows(tmp_path / "tasks", "drawn_colour")
    assert len(found) == 3
    (message,) = doc_to_messages(found[0])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert isinstance(message["content"][0]["url"], Image.Image)
    (sound,) = doc_to_visual(rows(tmp_path / "tasks", "drawn_sound")[0])
    assert sound["type"] == "audio"
    assert sound["url"].startswith("data:audio/wav;base64,UklGR")
    assert process_results(found[0], ["It is red."]) == {"accuracy": 1.0}
    assert process_results(found[0], ["Blue, not red."]) == {"accuracy": 0.0}


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = drawn_items(tmp_path, n=1)
    main([str(file), "--output", str(tmp_path / "t"), "--name", "x"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 't'}: x, x_colour, ")
    with pytest.raises(SystemExit, match="2"):
        main([str(file), "--output", str(tmp_path / "t"), "--name", "A B"])
    assert capsys.readouterr().err.startswith("error: name 'A B': use lower-case letters")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    item = {"id": "1", "skill": "a b", "message": "?", "accept": ["x"]}
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(item) + "\n" + json.dumps({**item, "skill": "a-b"}))
    with pytest.raises(ConfigError, match="'a b' and 'a-b' would both become the task x_a_b"):
        write_tasks([file], tmp_path, name="x")
    file.write_text(json.dumps({**item, "media": [{"kind": "image", "path": "no.png"}]}))
    with pytest.raises(MediaError, match=r"no\.png: no such file"):
        write_tasks([file], tmp_path, name="x")
    file.write_text("")
    with pytest.raises(DataError, match="the files hold no items"):
        write_tasks([file], tmp_path, name="x")

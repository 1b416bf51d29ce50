"""Small files in the published formats: every row is an item, or is counted with a reason."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.datasets.files import read_table, read_text
from mico_chat.evaluation.task import TASKS, Contents
from tests.evaluation.conftest import empty_files


def write_case(case: dict[str, Any], folder: Path) -> None:
    for name, content in {**dict.fromkeys(case["media"], ""), **case["files"]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


CASES = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[f"{c['dataset']}-{c['split']}" for c in CASES])
def test_every_row_is_an_item_or_is_counted_with_a_reason(
    case: dict[str, Any], tmp_path: Path
) -> None:
    write_case(case, tmp_path)
    contents = DATASETS[case["dataset"]].read(tmp_path, case["split"])
    found = {
        item.id: [item.media[0].name, *filter(None, [item.question]), *item.captions, *item.answers]
        for item in contents.items
    }
    assert found == case["items"]
    assert list(map(list, contents.broken)) == case["lost"]


def captions(contents: Contents) -> dict[str, tuple[str, ...]]:
    return {item.id: item.captions for item in contents.items}


def lost(contents: Contents) -> dict[str, str]:
    return dict(contents.broken)


CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_clotho(tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "clothov1"
    empty_files(folder / "evaluation", ["Santa Motor.wav", "Café.wav", "short.wav"])
    rows = (
        'Santa Motor.wav,"A machine, old, whines.",B.,C.,D.,"He said ""go"".\r\nThen left."\r\n'
        "Café.wav,Crème,B,,D,E\r\n"
        "gone.wav,A,B,C,D,E\r\n"
        "short.wav\r\n"
        "Santa Motor.wav,A,B,C,D,E\r\n"
    )
    table = folder / "clotho_captions_evaluation.csv"
    table.write_bytes((CLOTHO + rows).encode(encoding))
    contents = DATASETS["clothov1"].read(tmp_path)
    said = captions(contents)
    assert said["Santa Motor.wav"][0] == "A machine, old, whines."
    assert said["Santa Motor.wav"][4] == 'He said "go". Then left.'
    assert said["Café.wav"] == ("Crème", "B", "D", "E")
    assert lost(contents)["gone.wav"] == "no file gone.wav in evaluation/"
    assert lost(contents)["Café.wav, caption 3"] == "it is empty"
    assert lost(contents)["short.wav"] == "it has no caption"
    assert lost(contents)["Santa Motor.wav"] == "the item occurs twice; only the first is used"


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2", "not JSON"),
        ("[]", "expected an object, got list"),
        ('{"videos": []}', "there are no records at 'images'"),
        ('{"images": [1]}', "none of 1 items .*; the first: record 1: .* is int, not an object"),
        ('{"images": []}', "none of 0 items can be used"),
        (
            '{"images": [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "x"}]}]}',
            r"none of 1 items .*; the first: 1\.jpg: no file 1\.jpg",
        ),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: str, said: str) -> None:
    empty_files(tmp_path / "flickr30k" / "flickr30k-images", [])
    (tmp_path / "flickr30k" / "dataset_flickr30k.json").write_text(content)
    with pytest.raises(DataError, match=said):
        DATASETS["flickr30k"].read(tmp_path)


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"t\.csv:1: missing columns: a, b; the columns are a;b"):
        list(read_table(path, ["a", "b"]))
    path.write_text("")
    with pytest.raises(DataError, match="the columns are none"):
        list(read_table(path, ["a"]))


def test_text_of_no_known_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\x81\x8d\x8f")
    with pytest.raises(DataError, match="not encoded as utf-8-sig or cp1252"):
        read_text(path)
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_every_task_has_a_data_set_and_every_data_set_a_task() -> None:
    assert {task.dataset for task in TASKS.values()} == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_layout_names_everything_that_is_missing(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    needed = [part for part in dataset.tree if not part.startswith("[")]
    assert dataset.missing(tmp_path) == needed
    layout = dataset.layout(tmp_path)
    assert layout.splitlines()[0] == f"{tmp_path / dataset.folder}/"
    assert all(part in layout for part in dataset.tree)
    assert dataset.page in layout
    for part in needed:
        place = tmp_path / dataset.folder / part.replace("*", "000000")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if part.endswith("/") else place.touch()
    assert dataset.missing(tmp_path) == []

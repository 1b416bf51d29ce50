"""Folders, tables and arrays are read as JSON Lines are; docs/data.md has examples that load."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.errors import DataError
from mico_chat.media.kinds import MODALITIES
from mico_training.data.mixture import open_source
from mico_training.data.sources import manifests
from mico_training.data.sources.contents import contents
from mico_training.data.sources.sample import Need, TrainingSample, bad_of
from mico_training.recipe import DataRecipe
from mico_training.stages import train_stage1
from tests.mico_training.scenes import picture, tone
from tests.mico_training.test_runs import write_recipe
from tests.support.made import write_clip, write_sound

PAGE = Path(__file__).parents[3] / "docs/data.md"
MEDIA = {".wav": tone(300), ".ogg": tone(300)}


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_medium = not text and path.suffix != ".txt"
        path.write_bytes(
            MEDIA.get(path.suffix, picture("red"))
            if is_medium
            else text.encode(errors="surrogateescape")
        )
    return folder


def read(path: Path | str, need: Need = "caption", **more: Any) -> list[TrainingSample]:
    source = open_source(DataRecipe(path=str(path), **more), need)
    return [source[index] for index in range(len(source))]


def examples() -> list[Any]:
    """Each example of the page's formats, with the kind that its heading and fence say."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Formats\n")[2].partition("\n## ")[0]
    found = []
    for part in text.split("\n### ")[1:]:
        title = part.partition("\n")[0]
        for number, block in enumerate(re.findall(r"```(?:text|json|csv)\n(.*?)```", part, re.S)):
            found.append(pytest.param(title, block, id=f"{title} {number}"))
    return found


@pytest.mark.parametrize(("title", "block"), examples())
def test_the_examples_of_the_page_load(title: str, block: str, tmp_path: Path) -> None:
    if title == "A folder of media":
        written = re.sub(r"\n  (?=\S)", "\0", block)
        rows = [line.replace("\0", "\n").partition(" = ") for line in written.splitlines()]
        write(tmp_path, **{name: text for name, _, text in rows})
        path = tmp_path / rows[0][0].partition("/")[0]
    else:
        path = tmp_path / {"JSON Lines": "a.jsonl", "CSV": "a.csv", "LLaVA": "a.json"}[title]
        path.write_text(block)
        write(tmp_path, **dict.fromkeys(re.findall(r"\b[\w-]+(?:\.depth)?\.\w{3}\b", block), ""))
    found = contents(str(path))
    assert found.profiles.total() >= 1, found.lines()
    assert not any("bad:" in line for line in found.lines()), found.lines()
    assert found.serving("caption") + found.serving("conversation") >= found.profiles.total()


def test_a_folder_joins_media_of_one_name_and_leaves_the_rest(tmp_path: Path) -> None:
    names = ("b.jpg", "b.wav", "b.depth.png", "b.csv", "c.jpg", ".d.jpg", "e/a.mp4")
    write(tmp_path, **dict.fromkeys(names, ""), **{"b.txt": "A cat.\n", "e/a.txt": " "})
    (only,) = read(tmp_path)
    assert (only.id, only.captions) == ("b", {"image": ("A cat.",), "depth": ("A cat.",)})
    assert list(only.media) == ["image", "audio", "depth"]
    assert contents(str(tmp_path)).profiles.total() == 3, "media without a caption are counted"


def test_a_folders_changes_are_seen(tmp_path: Path) -> None:
    write(tmp_path / "own", **{"red_cat/1.jpg": "", "owl/1.wav": ""})
    owl, cat = read(tmp_path / "own")
    assert cat.captions == {"image": ("A photo of a red cat.",)}
    assert cat.concepts == {"image": "red cat"}
    assert owl.captions == {"audio": ("The sound of an owl.",)}
    write(tmp_path / "own", **{"owl/1.txt": "It hoots."})
    assert [one.captions for one in read(tmp_path / "own")] == [{"audio": ("It hoots.",)}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.md": "x"}, "no file in this folder has the ending of a medium"),
        ({"train/1.jpg": "", "train/metadata.csv": "x"}, "train/metadata.csv describes its own"),
        ({"1.jpg": "", "1.txt": "caf\udce9"}, "1: 'image' is not UTF-8"),
        ({"metadata.jsonl": '{"file_name": "a.md", "text": "x"}'}, "no medium has this ending"),
    ],
)
def test_a_wrong_folder_is_named(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, **files), bad="stop")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_has_lines_of_its_own(tmp_path: Path, separator: str) -> None:
    table = '\ufeffimage,caption,question,answers,other\n1.jpg,"A cat,\na dog; and\tan owl",,,7\n'
    table += "1.jpg,,What?,A cat,\n\ngone.jpg,x,,,\n"
    rows = re.sub(r'("[^"]*")|,', lambda m: m[1] or separator, table)
    path = write(tmp_path, **{"1.jpg": "", "a.csv": rows}) / "a.csv"
    (told,), (asked,) = read(path), read(path, "question")
    assert told.captions == {"image": ("A cat,\na dog; and\tan owl",)}
    assert (asked.turns[0].question, asked.turns[0].answer) == ("What?", "A cat")
    with pytest.raises(DataError, match=r"a\.csv:6: image gone\.jpg: no such file"):
        read(path, bad="stop")
    path.write_bytes(b"image,caption\n1.jpg,caf\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv:2: not CSV in UTF-8"):
        read(path)


def test_the_kind_is_found(tmp_path: Path, shards: Path) -> None:
    record = {"image": "1.jpg", "caption": "A cat."}
    write(tmp_path, **{"1.jpg": "", "a.json": json.dumps([record]), "b.json": json.dumps(record)})
    for path, form in (("a.json", "llava"), ("b.json", "jsonl"), (shards, "shards")):
        assert contents(str(tmp_path / path)).form == form
    assert read(tmp_path / "b.json", kind="jsonl") == read(tmp_path / "b.json")
    with pytest.raises(DataError, match=r"none\.csv: No such file"):
        read(tmp_path / "none.csv")
    assert set(MODALITIES) >= {kind for one in read(shards) for kind in ("image", "audio")}


PUBLISHED_FILES = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))


def published(folder: Path, kind: str) -> DataRecipe:
    """A corpus in its published layout, as a source; the media are small, and real."""
    case = PUBLISHED_FILES[kind]
    (folder / case["file"]).write_text(case["text"], encoding="utf-8")
    for medium in case["media"]:
        path = folder / kind / medium
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            write_clip(str(path), "libx264", n=3, sound="aac")
        elif path.suffix == ".flac":
            write_sound(str(path), "flac", seconds=0.2)
        else:
            path.write_bytes(picture("red"))
    return DataRecipe(path=str(folder / case["file"]), kind=kind, root=folder / kind)


@pytest.mark.parametrize("kind", PUBLISHED_FILES)
def test_a_published_corpus_is_read_row_by_row(tmp_path: Path, kind: str) -> None:
    case = PUBLISHED_FILES[kind]
    source = open_source(published(tmp_path, kind), "caption")
    samples = [source[n] for n in range(len(source))]
    found = {one.id: {name: [*said] for name, said in one.captions.items()} for one in samples}
    assert found == case["captions"]
    assert samples[0].subtitle == ("Go!" if kind == "vast27m" else "")
    errors = [str(error) for error in bad_of(source).errors]
    assert len(errors) == bad_of(source).n
    for error, said in zip(errors, case["wrong"], strict=True):
        assert f"{case['file']}:{said}" in error


def test_published_corpora_are_trained_on(tmp_path: Path, tiny_pretraining: Path) -> None:
    data = [
        published(tmp_path, kind).model_dump(mode="json", exclude_defaults=True)
        for kind in PUBLISHED_FILES
    ]
    train = {"lr": 1e-3, "steps": 3, "batch_size": 14, "save_steps": 3, "log_steps": 1}
    stage1 = {"cross_corpus": 0.5, "caption_length": 16}
    train_stage1(
        write_recipe(tmp_path, tmp_path, tiny_pretraining, data=data, train=train, stage1=stage1)
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    lines = (tmp_path / "out" / "bad-samples.jsonl").read_text().splitlines()
    found = {Path(json.loads(line)["path"]).name for line in lines}
    assert found == {case["file"] for case in PUBLISHED_FILES.values()}, "malformed rows are named"


def test_rows_are_read_before_the_file_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "CHUNK", 50)
    published(tmp_path, "vast27m")
    path = tmp_path / "annotations.json"
    whole = path.read_text()
    assert list(manifests._items(path)) == json.loads(whole)
    path.write_text(whole[:-20])
    rows = manifests._items(path)
    assert [row["clip_id"] for row in (next(rows), next(rows))] == ["VbT.33", "VbT.34"]
    with pytest.raises(DataError, match=r"annotations\.json: not JSON behind value \d: it ends"):
        list(rows)
    for text, said in (("7", "begins with '7'"), ("\x80", "not JSON"), ('{"a": [1]}', "begins")):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(DataError, match=said):
            list(manifests._items(path))
    with pytest.raises(DataError, match="has no array at 'data'"):
        list(manifests._items(path, "data"))

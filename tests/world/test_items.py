"""Evaluation items: questions of shards, and media out of Qt resource files."""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.task import read_items
from mico_training import mini
from mico_training.world import build, items
from mico_training.world.items import Everyday, everyday_items, read_rcc, shard_items
from mico_training.world.sample import Sample, Turn, write_shard

PLAIN, ZLIB, ZSTD = 0, 1, 4
FOLDER = 2


@dataclass(frozen=True)
class File:
    """A file of a resource; ``flags`` say how it is compressed."""

    name: str
    data: bytes
    flags: int = PLAIN


def write_rcc(path: Path, folders: dict[str, list[File]]) -> Path:
    """A Qt resource file: a root folder with folders of files."""
    names, blobs = bytearray(), bytearray()

    def name(text: str) -> int:
        offset = len(names)
        names.extend(struct.pack(">HI", len(text), 0) + text.encode("utf-16-be"))
        return offset

    def blob(file: File) -> int:
        offset = len(blobs)
        data = file.data
        if file.flags & ZLIB:
            data = struct.pack(">I", len(data)) + zlib.compress(data)
        blobs.extend(struct.pack(">I", len(data)) + data)
        return offset

    first_file = 1 + len(folders)
    nodes = [struct.pack(">IHIIQ", name(""), FOLDER, len(folders), 1, 0)]
    leaves: list[bytes] = []
    for folder, files in folders.items():
        first = first_file + len(leaves)
        nodes.append(struct.pack(">IHIIQ", name(folder), FOLDER, len(files), first, 0))
        leaves += [struct.pack(">IHIIQ", name(f.name), f.flags, 0, blob(f), 0) for f in files]
    tree = b"".join([*nodes, *leaves])
    start = 24
    offsets = (start, start + len(tree), start + len(tree) + len(blobs))
    header = b"qres" + struct.pack(">I3II", 3, *offsets, 0)
    path.write_bytes(header + tree + blobs + names)
    return path


def test_a_resource_files_pictures_and_sounds_are_read(tmp_path: Path) -> None:
    folders = {
        "resource": [File("cat.webp", b"meow"), File("Main.qml", b"code")],
        "größe": [File("dog.ogg", b"woof" * 100, ZLIB), File("cow.png", b"")],
    }
    found = dict(read_rcc(write_rcc(tmp_path / "x.rcc", folders)))
    assert found == {"cat.webp": b"meow", "dog.ogg": b"woof" * 100, "cow.png": b""}


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rcc").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"x\.rcc.*not a Qt resource file"):
        list(read_rcc(tmp_path / "x.rcc"))
    packed = write_rcc(tmp_path / "z.rcc", {"r": [File("cat.webp", b"?", ZSTD)]})
    with pytest.raises(DataError, match=r"cat\.webp is zstd-compressed"):
        list(read_rcc(packed))


def test_everyday_items_take_what_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rcc = tmp_path / "package" / "usr/share/gcompris-qt/rcc"
    rcc.mkdir(parents=True)
    everyday = Everyday.read("everyday.yaml")
    for activity in {*everyday.photographs, *everyday.sounds}:
        files = [File("nothing.webp", b"no"), File("cat.webp", b"photo"), File("cat.ogg", b"sound")]
        write_rcc(rcc / f"{activity}.rcc", {"resource": files})
    monkeypatch.setattr(items, "source", lambda _: tmp_path / "package")
    count = everyday_items(tmp_path / "out")
    found = read_items(tmp_path / "out" / "items.jsonl")
    assert len(found) == count == 2
    photo, sound = found
    assert (photo.skill, photo.media[0].kind) == ("everyday photographs", "image")
    assert (sound.skill, sound.media[0].kind) == ("everyday sounds", "audio")
    assert photo.answers == ("cat",)
    assert Path(str(photo.media[0].source)).read_bytes() == b"photo"
    assert Path(str(sound.media[0].source)).read_bytes() == b"sound"


def test_the_items_alone_are_those_of_the_whole_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "everyday_items", lambda _: 0)
    recipe = tmp_path / "world.yaml"
    recipe.write_text("{things: shapes, shard_size: 2, train: {count: 2}, validation: {count: 3}}")
    mini.items(recipe, tmp_path / "alone", workers=1)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["items"]
    build.main(recipe, tmp_path / "shards", workers=1, seed=build.SEED)
    shard_items(sorted((tmp_path / "shards").glob("validation-*.tar")), tmp_path / "items")
    alone, whole = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "alone" / "items", tmp_path / "items")
    )
    assert alone == whole
    assert len(alone) == 1 + 3
    found = read_items(tmp_path / "items" / "items.jsonl")
    assert len({item.id for item in found}) == len(found) > 5
    assert "count" in {item.skill for item in found}
    for item in found:
        assert item.answers
        assert all(Path(str(medium.source)).stat().st_size > 0 for medium in item.media)


def sample(number: int, turns: tuple[Turn, ...]) -> Sample:
    files = {"depth.png": b"depth", "image.jpg": b"image"}
    return Sample(
        id=f"s{number}", split="validation", files=files, captions={}, turns=turns, concepts={}
    )


def test_depth_alone_is_a_skill_of_its_own_and_no_skill_is_endless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "MOST_OF_A_SKILL", 3)
    turns = (
        Turn("Which is nearer?", "The cat.", "nearer", ("depth.png",), ("cat", "dog"), ("cat",)),
        Turn("Which is nearer?", "The cat.", "nearer", ("image.jpg", "depth.png")),
    )
    shard = tmp_path / "validation-000000.tar"
    write_shard(shard, [sample(number, turns) for number in range(5)])
    assert shard_items([shard], tmp_path / "out") == 6
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["skill"] for row in rows) == {"nearer": 3, "nearer (depth alone)": 3}
    assert rows[0]["choices"] == ["cat", "dog"]
    assert rows[1]["accept"] == ["The cat."], "the answer itself where nothing else is said"
    assert [medium["kind"] for medium in rows[1]["media"]] == ["image", "depth"]

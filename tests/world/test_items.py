"""Evaluation items: questions of shards, and media out of Qt resource files."""

import json
import struct
import zlib
from collections import Counter
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


def write_rcc(path: Path, folders: dict[str, list[tuple[str, bytes, int]]]) -> Path:
    """A Qt resource file: a root folder with folders of files (name, data, flags)."""
    names, blobs = bytearray(), bytearray()

    def added(to: bytearray, data: bytes) -> int:
        to.extend(data)
        return len(to) - len(data)

    def node(name: str, flags: int, *numbers: int) -> bytes:
        text = struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return struct.pack(">IHIIQ", added(names, text), flags, *numbers, 0)

    nodes = [node("", FOLDER, len(folders), 1)]
    leaves: list[bytes] = []
    for folder, files in folders.items():
        nodes.append(node(folder, FOLDER, len(files), 1 + len(folders) + len(leaves)))
        for name, data, flags in files:
            packed = struct.pack(">I", len(data)) + zlib.compress(data) if flags & ZLIB else data
            blob = added(blobs, struct.pack(">I", len(packed)) + packed)
            leaves.append(node(name, flags, 0, blob))
    tree = b"".join([*nodes, *leaves])
    offsets = (24, 24 + len(tree), 24 + len(tree) + len(blobs))
    path.write_bytes(b"qres" + struct.pack(">I3II", 3, *offsets, 0) + tree + blobs + names)
    return path


def test_a_resource_files_pictures_and_sounds_are_read(tmp_path: Path) -> None:
    folders = {
        "resource": [("cat.webp", b"meow", PLAIN), ("Main.qml", b"code", PLAIN)],
        "größe": [("dog.ogg", b"woof" * 100, ZLIB), ("cow.png", b"", PLAIN)],
    }
    found = dict(read_rcc(write_rcc(tmp_path / "x.rcc", folders)))
    assert found == {"cat.webp": b"meow", "dog.ogg": b"woof" * 100, "cow.png": b""}


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rcc").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"x\.rcc.*not a Qt resource file"):
        list(read_rcc(tmp_path / "x.rcc"))
    packed = write_rcc(tmp_path / "z.rcc", {"r": [("cat.webp", b"?", ZSTD)]})
    with pytest.raises(DataError, match=r"cat\.webp is zstd-compressed"):
        list(read_rcc(packed))


def test_everyday_items_take_what_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rcc = tmp_path / "package" / "usr/share/gcompris-qt/rcc"
    rcc.mkdir(parents=True)
    everyday = Everyday.read("everyday.yaml")
    for activity in {*everyday.photographs, *everyday.sounds}:
        pictures = [(name, b"photo", PLAIN) for name in ("nothing.webp", "cat.webp")]
        write_rcc(rcc / f"{activity}.rcc", {"r": [*pictures, ("cat.ogg", b"sound", PLAIN)]})
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


def test_depth_alone_is_a_skill_of_its_own_and_no_skill_is_endless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "MOST_OF_A_SKILL", 3)
    turns = (
        Turn("Which is nearer?", "The cat.", "nearer", ("depth.png",), ("cat", "dog"), ("cat",)),
        Turn("Which is nearer?", "The cat.", "nearer", ("image.jpg", "depth.png")),
    )
    shard = tmp_path / "validation-000000.tar"
    files = {"depth.png": b"depth", "image.jpg": b"image"}
    write_shard(shard, [Sample(f"s{i}", "validation", files, {}, turns) for i in range(5)])
    assert shard_items([shard], tmp_path / "out") == 6
    rows = list(map(json.loads, (tmp_path / "out" / "items.jsonl").read_text().splitlines()))
    assert Counter(row["skill"] for row in rows) == {"nearer": 3, "nearer (depth alone)": 3}
    assert rows[0]["choices"] == ["cat", "dog"]
    assert rows[1]["accept"] == ["The cat."], "the answer itself where nothing else is said"
    assert [medium["kind"] for medium in rows[1]["media"]] == ["image", "depth"]

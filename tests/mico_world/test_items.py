"""Evaluation items: questions of shards, and media out of Qt resource files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mico_chat.evaluation.task import read_items
from mico_training.data.sources.written import Sample, Turn, write_shard
from mico_world import build
from mico_world.mini import __main__ as mini
from mico_world.mini import items
from mico_world.mini.items import shard_items, write_real_items
from mico_world.mini.real import Item
from mico_world.mini.talks import talks


def test_real_items_are_written_with_their_media(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Item("a", "real left-right", "image", "a.jpg", b"photo", ("dog",), (), ("cat",))
    heard = Item("b", "real sounds", "audio", "b.flac", b"sound", ("dog", "bark"))
    asked = [(left, "What is on the left?"), (heard, "What do you hear?")]
    monkeypatch.setattr(items, "real_items", lambda: asked)
    monkeypatch.setattr(items, "talks", lambda *_: [])
    media = [{"kind": "image", "path": "media/a.jpg"}]
    row = {"id": "c", "skill": "unscripted", "message": "A cat?", "media": media, "accept": ["no"]}
    monkeypatch.setattr(items, "unscripted", lambda _: [row])
    assert write_real_items(tmp_path) == 3
    photo, sound, unscripted = read_items(tmp_path / "items.jsonl")
    assert (photo.question, photo.answers, photo.reject) == (asked[0][1], ("dog",), ("cat",))
    assert (sound.skill, sound.media[0].kind, sound.reject) == ("real sounds", "audio", ())
    assert (unscripted.question, unscripted.media) == ("A cat?", photo.media)
    assert Path(str(photo.media[0].source)).read_bytes() == b"photo"
    assert Path(str(sound.media[0].source)).read_bytes() == b"sound"


def stem(medium: Any) -> str:
    return Path(medium.name).stem


def test_conversations_about_real_media_ask_for_what_is_there(tmp_path: Path) -> None:
    names = [f"{word}{n}" for n in range(50) for word in ("cat", "owls")]
    shown = [
        Item(n, "real photographs", "image", f"{n}.jpg", b"", (n, f"{n}ish {n}")) for n in names
    ]
    heard = [
        Item(f"s{n}", "real sounds", "audio", f"s{n}.flac", b"", (f"bell{n}",)) for n in range(40)
    ]
    rows = list(talks([*shown, *heard], tmp_path))
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_items(tmp_path / "items.jsonl")
    assert len({item.id for item in found}) == len(found)
    of = {
        skill: [item for item in found if item.skill == skill] for skill in {i.skill for i in found}
    }
    sides = Counter(item.answers[0] for item in of["real yes or no"])
    assert sides == {"yes": 100, "no": 100}
    for item in of["real yes or no"]:
        (asked,) = (name for name in names if re.search(rf"\b{name}\b", item.question))
        assert (stem(item.media[0]) == asked) == (item.answers == ("yes",))
    for item in of["real second medium"]:
        before, now = stem(item.messages()[0].media[0]), stem(item.messages()[-1].media[0])
        assert re.sub(r"^s(\d)", r"bell\1", now) in item.answers
        assert before in item.reject
    for item in of["real earlier medium"]:
        first, _, second, _, last = item.messages()
        assert not last.media
        assert item.answers[0] == stem(first.media[0])
        assert item.reject[0] == stem(second.media[0])
    kinds = {"picture": "image", "photo": "image", "recording": "audio", "video": "video"}
    for item in of["absent medium"]:
        asked_of = {kind for word, kind in kinds.items() if word in item.question}
        assert asked_of.isdisjoint(medium.kind for medium in item.media)
    assert {len(item.messages()) for item in of["words later"]} == {3, 5}
    assert all(
        (tmp_path / "items.jsonl").parent.joinpath(f"sign-{n:02}.png").stat().st_size
        for n in range(40)
    )


def test_the_items_alone_are_those_of_the_whole_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "write_real_items", lambda _: 0)
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

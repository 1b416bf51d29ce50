"""The manifest is the same however the first job was split, and of what is alike one is kept."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mico_corpus.cutting.manifest import select
from mico_corpus.cutting.near import duplicates
from mico_corpus.places import Place
from mico_corpus.recipe import BuildRecipe, ClipsRecipe
from mico_corpus.rows import CLIP, FILE, Row

RECIPE = BuildRecipe()
ALIKE = 0x0123456789ABCDEF


def clip(start: float, hash_: int | None, reason: str = "", **measured: float) -> Row:
    held = None if hash_ is None else hash_.to_bytes(8)
    found = {"brightness": 0.5, "motion": 0.1, "loudness": -20.0, "hash": held}
    return {"start": start, "end": start + 6.0, "reason": reason, **found, **measured}


def file(name: str, clips: list[Row], content: str = "", reason: str = "") -> Row:
    number = int.from_bytes(name.encode()) * 2**40
    return {
        "id": name,
        "address": f"/videos/{name}.mp4",
        "member": "",
        "offset": 0,
        "size": 10,
        "source": "ours",
        "licence": "CC0",
        "text": "",
        "content": content or f"{number:064x}"[-64:],
        "seconds": 30.0,
        "width": 64,
        "height": 48,
        "fps": 10.0,
        "has_sound": True,
        "clips": clips,
        "reason": reason,
        "detail": "as found" if reason else "",
        "took": 0.1,
    }


def write(folder: Path, *parts: list[Row]) -> Place:
    files = folder / "build" / "files"
    files.mkdir(parents=True)
    for number, part in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(part, FILE), files / f"{number}.parquet")
    return Place(str(folder))


def manifest(place: Place) -> list[dict[str, Any]]:
    assert place.folder is not None
    table = pq.read_table(place.folder / "build" / "clips.parquet")
    assert table.schema == CLIP
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_clips_that_look_alike_are_marked_and_the_first_by_source_is_kept(tmp_path: Path) -> None:
    near, far = ALIKE ^ 0b1111, ALIKE ^ 0b11111
    place = write(
        tmp_path,
        [file("c", [clip(0, near), clip(6, far), clip(12, None), clip(18, None)])],
        [file("a", [clip(0, ALIKE, "dark"), clip(6, ALIKE)]), file("b", [clip(0, ALIKE)])],
    )
    counts = select(place, RECIPE)
    rows = manifest(place)
    found = [(Path(row["address"]).stem, row["start"], row["reason"]) for row in rows]
    assert found == [
        ("a", 0, "dark"),
        ("a", 6, ""),
        ("b", 0, "duplicate"),
        ("c", 0, "duplicate"),
        ("c", 6, ""),
        ("c", 12, ""),
        ("c", 18, ""),
    ]
    assert rows[1]["id"] in rows[2]["detail"]
    assert counts == {"dark": 1, "": 4, "duplicate": 2}
    assert len({row["id"] for row in rows}) == len(rows)


def test_near_is_a_limit_of_the_recipe(tmp_path: Path) -> None:
    rows = [file("a", [clip(0, ALIKE), clip(6, ALIKE), clip(12, ALIKE ^ 1)])]
    for near, kept in ((-1, 3), (0, 2), (1, 1)):
        place = write(tmp_path / str(near), rows)
        recipe = BuildRecipe(clips=ClipsRecipe(near=near))
        assert select(place, recipe)[""] == kept


def test_the_bytes_of_another_file_are_one_row_with_its_name(tmp_path: Path) -> None:
    clips = [clip(0, ALIKE), clip(6, ~ALIKE % 2**64)]
    place = write(
        tmp_path,
        [file("b", clips, "ab" * 32), file("a", clips, "ab" * 32)],
        [file("c", clips[:1], "ab" * 31 + "cd")],  # another file, though its hash begins alike
    )
    select(place, RECIPE)
    rows = manifest(place)
    assert [row["reason"] for row in rows] == ["", "", "same file", "duplicate"]
    assert (rows[2]["start"], rows[2]["end"], rows[2]["hash"]) == (0, 0, None)
    assert rows[2]["detail"] == "has the same bytes as /videos/a.mp4"


def test_files_that_were_left_out_are_counted(tmp_path: Path) -> None:
    bad = [file(name, [], reason="broken") | {"content": ""} for name in "abc"]
    place = write(tmp_path, [*bad, file("d", [], reason="missing") | {"content": ""}])
    assert select(place, RECIPE) == {"broken": 3, "missing": 1}
    rows = manifest(place)
    assert {row["detail"] for row in rows} == {"as found"}
    assert len({row["id"] for row in rows}) == 4


def test_a_detail_says_what_was_found_and_the_limit(tmp_path: Path) -> None:
    clips = [
        clip(0, 1, "dark", brightness=0.01),
        clip(6, 2, "still", motion=0.001),
        clip(12, 4, "too short") | {"end": 13.5},
        clip(20, 8, "silent", loudness=float("nan")),
    ]
    place = write(tmp_path, [file("a", clips)])
    select(place, BuildRecipe(clips=ClipsRecipe(quietest=-50)))
    assert [row["detail"] for row in manifest(place)] == [
        "its brightness is 0.010; the least is 0.02 (clips.darkest)",
        "its motion is 0.0010; the least is 0.002 (clips.least_motion)",
        "a scene of 1.50 s; the least is 5 (clips.shortest)",
        "it has no sound; the least is -50.0 dB (clips.quietest)",
    ]


def test_the_manifest_does_not_depend_on_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    rows = []
    for number in range(200):
        hashes = [draw.getrandbits(64) if draw.random() < 0.5 else ALIKE for _ in range(3)]
        content = f"{draw.randrange(150):064x}"
        clips = [clip(6 * i, one) for i, one in enumerate(hashes)]
        rows.append(file(f"{number:04d}", clips, content))
    one = write(tmp_path / "one", rows)
    draw.shuffle(rows)
    doubled = [rows[:70], rows[70:150], [], rows[150:], rows[:5]]  # a row that came twice is one
    many = write(tmp_path / "many", *doubled)
    assert select(one, RECIPE) == select(many, RECIPE)
    monkeypatch.setattr("mico_corpus.cutting.manifest.AT_ONCE", 16)
    sorted_on_disk = write(tmp_path / "disk", *doubled)
    select(sorted_on_disk, RECIPE)
    assert str(manifest(one)) == str(manifest(many)) == str(manifest(sorted_on_disk))


def test_nothing_at_all_is_an_empty_manifest(tmp_path: Path) -> None:
    place = write(tmp_path, [])
    assert select(place, RECIPE) == {}
    assert manifest(place) == []


def one_by_one(hashes: list[int], near: int) -> list[int]:
    kept: list[int] = []
    found = []
    for place, one in enumerate(hashes):
        alike = [k for k in kept if (one ^ hashes[k]).bit_count() <= near]
        found.append(alike[0] if alike else -1)
        if not alike:
            kept.append(place)
    return found


@pytest.mark.parametrize("near", [0, 1, 2, 4, 7, 10])
def test_duplicates_are_those_that_a_comparison_of_all_pairs_finds(near: int) -> None:
    draw = random.Random(near)
    hashes = [draw.getrandbits(64) for _ in range(40)] + [0, 2**64 - 1]
    for _ in range(400):
        flips = sum(1 << draw.randrange(64) for _ in range(draw.randrange(near + 3)))
        hashes.append((draw.choice(hashes) ^ flips) % 2**64)
    draw.shuffle(hashes)
    found = duplicates(np.array(hashes, np.uint64), near).tolist()
    assert found == one_by_one(hashes, near)
    assert -1 in found
    assert max(found) >= 0


def test_100_000_hashes_are_compared_in_seconds() -> None:
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 100_000, dtype=np.uint64)
    hashes[50_000:] = hashes[:50_000] ^ np.uint64(0b101 << 20)
    found = duplicates(hashes, 4)
    assert (found[50_000:] == np.arange(50_000)).all()
    assert (found[:50_000] == -1).all()

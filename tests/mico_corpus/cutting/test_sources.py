"""Files, folders, lists, addresses and shards become rows, each file once."""

import io
import json
import logging
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mico_chat.errors import ConfigError, DataError
from mico_corpus.cutting.sources import Seen, rows_of
from mico_corpus.recipe import BuildRecipe
from mico_corpus.rows import SOURCE, Row

RECIPE = BuildRecipe(source="ours", licence="CC0")


def rows(*sources: str | Path) -> list[Row]:
    found = list(rows_of([str(one) for one in sources], RECIPE))
    assert pa.Table.from_pylist(found, SOURCE).num_rows == len({row["id"] for row in found})
    return found


def names(*sources: str | Path) -> list[str]:
    return [Path(row["member"] or row["address"]).name for row in rows(*sources)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    videos = tmp_path / "videos"
    for name in ("late", "deep", "empty"):
        (videos / name).mkdir(parents=True)
    for name in (
        "b.mp4",
        "a.MKV",
        "late/d.avi",
        "deep/c.webm",
        "song.flac",
        "notes.txt",
        "page.html",
        "bare",
    ):
        (videos / name).write_bytes(b"12345")
    return videos


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for name in ("a.mp4", "deep/b.webm", "c.txt", "list.jsonl"):
        system.pipe(f"/bucket/{name}", b"1234")
    system.pipe("/bucket/list.jsonl", b'{"path": "a.mp4"}\n{"url": "memory://other/x"}\n')
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_a_folder_gives_its_media_in_order(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert names(folder) == ["a.MKV", "b.mp4", "song.flac", "c.webm", "d.avi"]
    assert "3 files are no videos" in caplog.text
    (row, *_) = rows(folder / "b.mp4")
    about = {"source": "ours", "licence": "CC0", "text": "", "member": "", "offset": 0, "size": 5}
    about |= {"category": "", "spans": [], "fault": ""}
    assert row == about | {"id": row["id"], "address": str(folder / "b.mp4")}


def test_a_file_that_is_named_twice_is_one_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert names(folder / "b.mp4", folder, "b.mp4", f"{folder}/deep/../b.mp4") == [
        "b.mp4", "a.MKV", "song.flac", "c.webm", "d.avi",
    ]  # fmt: skip


def test_a_pattern_gives_what_it_matches(folder: Path) -> None:
    assert names(f"{folder}/[ab].*") == ["a.MKV", "b.mp4"]
    odd = folder / "take[*].mp4"
    odd.write_bytes(b"1")
    assert names(odd) == ["take[*].mp4"]


@pytest.mark.parametrize("source", ["gone.mp4", "gone", "no-*.mp4", "memory://bucket/gone.mp4"])
def test_a_source_that_does_not_exist_is_an_error(tmp_path: Path, source: str) -> None:
    given = source if "://" in source else str(tmp_path / source)
    with pytest.raises(ConfigError, match=r"no such file|no video"):
        rows(given)


def test_a_folder_without_media_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="no video, sound or tar is among its 1 files"):
        rows(tmp_path)


def test_an_address_without_a_reader_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing reads nope://"):
        rows("nope://bucket/a.mp4")


LISTS = {
    "a.txt": "b.mp4\n\n  deep/c.webm \ngone.mp4\nmemory://x/y.mp4\n",
    "a.jsonl": (
        '{"path": "b.mp4", "caption": "A cat.", "license": "MIT", "source": "theirs"}\n'
        '{"video": "deep/c.webm", "text": "A dog.", "caption": ""}\n\n'
        '{"url": "gone.mp4", "caption": 3}\n{"path": "memory://x/y.mp4"}'
    ),
    "a.csv": (
        "path,caption,licence,source\nb.mp4,A cat.,MIT,theirs\n"
        '"deep/c.webm","A dog.",,\ngone.mp4,,,\nmemory://x/y.mp4,,,\n'
    ),
}


@pytest.mark.parametrize("name", [*LISTS, "a.parquet"])
def test_a_list_names_files_and_what_is_known_of_them(folder: Path, name: str) -> None:
    path = folder / name
    if name == "a.parquet":
        lines = [json.loads(line) for line in LISTS["a.jsonl"].splitlines() if line]
        columns = ("path", "video", "url", "caption", "text", "license", "source", "more")
        lines[2]["caption"] = None
        table = [{column: line.get(column) for column in columns} for line in lines]
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        path.write_text(LISTS[name])
    found = rows(path)
    addresses = [str(folder / x) for x in ("b.mp4", "deep/c.webm", "gone.mp4")]
    assert [row["address"] for row in found] == [*addresses, "memory://x/y.mp4"]
    assert [row["size"] for row in found] == [5, 5, 0, 0]
    if name != "a.txt":
        assert [row["text"] for row in found] == ["A cat.", "A dog.", "", ""]
        assert [row["licence"] for row in found] == ["MIT", "CC0", "CC0", "CC0"]
        assert [row["source"] for row in found] == ["theirs", "ours", "ours", "ours"]


BAD_LISTS: dict[str, tuple[str | bytes, str]] = {
    "a.jsonl": ('{"path": "x.mp4"}\n{"path"\n', "a.jsonl:2: not JSON"),
    "b.jsonl": ("[1]\n", "b.jsonl:1: a line is an object, not list"),
    "c.jsonl": ('{"file": "x.mp4"}\n', "c.jsonl:1: names no file; one of path, video, url"),
    "d.csv": ("name,caption\nx.mp4,hello\n", "d.csv:2: names no file"),
    "e.parquet": ("PAR1", "e.parquet: not Parquet"),
    "f.txt": (b"\xff\xfe\xfa", "f.txt: is not UTF-8"),
    "g.csv": ("path\n" + "x" * 200_000, "g.csv:1: not CSV"),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_wrong_line_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_LISTS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        rows(path)


def test_a_tar_gives_its_videos_with_their_captions(tmp_path: Path) -> None:
    about: Row = {"caption": "From JSON.", "license": "MIT", "url": "https://example.org/x"}
    about["yt_meta_dict"] = {"info": {"categories": ["Gaming"], "title": "x"}}
    path = tar(
        tmp_path / "00000.tar",
        {
            "0001.mp4": b"first",
            "0001.txt": b" A cat. \n",
            "0001.json": json.dumps(about).encode(),
            "0002.json": json.dumps(about).encode(),
            "0002.webm": b"second",
            "0003.jpg": b"picture",
            "0003.txt": b"a picture",
            "0004.mp4": b"third",
            "0004.json": b"not JSON",
        },
    )
    found = rows(path)
    assert [row["member"] for row in found] == ["0001.mp4", "0002.webm", "0004.mp4"]
    assert [row["text"] for row in found] == ["A cat.", "From JSON.", ""]
    assert [row["licence"] for row in found] == ["MIT", "MIT", "CC0"]
    assert [row["category"] for row in found] == ["Gaming", "Gaming", ""]
    data = path.read_bytes()
    parts = [data[row["offset"] : row["offset"] + row["size"]] for row in found]
    assert parts == [b"first", b"second", b"third"]
    listed = tmp_path / "shards.txt"
    listed.write_text("00000.tar\n")
    assert rows(listed) == rows(tmp_path) == rows(f"{tmp_path}/*.tar") == found


def test_a_damaged_tar_gives_what_it_holds_and_a_row_of_its_own(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"1.mp4": b"x" * 2000, "2.mp4": b"y" * 2000})
    path.write_bytes(path.read_bytes()[:3500])
    (tmp_path / "b.tar").write_text("no tar at all, of a few words" * 40)
    assert names(tmp_path) == ["1.mp4", "a.tar", "b.tar"]


def test_addresses_are_walked_matched_and_read(memory: str) -> None:
    everything = [f"{memory}/a.mp4", f"{memory}/deep/b.webm"]
    assert [row["address"] for row in rows(memory)] == everything
    assert [row["address"] for row in rows(f"{memory}/*.mp4")] == everything[:1]
    listed = [row["address"] for row in rows(f"{memory}/list.jsonl")]
    assert listed == [f"{memory}/a.mp4", "memory://other/x"]


def test_rows_are_made_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"{number}.mp4\n" for number in range(3)))
    found = rows_of([str(path), str(tmp_path / "gone.mp4")], RECIPE)
    assert Path(next(found)["address"]).name == "0.mp4"


def test_a_set_of_keys_knows_what_it_holds() -> None:
    draw = random.Random(0)
    seen, keys = Seen(), [draw.getrandbits(64) for _ in range(10_000)] + [0, 2**64 - 1]
    keys += draw.sample(keys, 1000)
    assert [seen.add(key) for key in keys].count(False) == len(keys) - len(set(keys))
    assert not any(seen.add(key) for key in keys)
    assert seen.add(draw.getrandbits(64))


HDVILA = (
    b'{"video_id": "QMi8", "url": "https://www.youtube.com/watch?v=QMi8", "clip": [{"clip_id": '
    b'"QMi8.1.mp4", "span": ["00:00:17.759", "00:00:23.279"]}, {"clip_id": "QMi8.16.mp4", "span": '
    b'["01:04:52.140", "01:05:03.350"]}], "category": "music"}\n'
    b'{"video_id": "b", "url": "x", "clip": []}\n'
    b'{"url": "x", "clip": []}\n\n'
    b'{"video_id": "c", "clip": [{"span": ["00:00:07.000", "00:00:03.000"]}]}\n'
    b'{"video_id": "d", "clip": [{"span": ["now"]}]}\n'
    b'[1]\n{"video_id": "e", "clip'
)


def test_the_list_of_hd_vila_has_spans_and_rows_with_faults(folder: Path) -> None:
    (folder / "QMi8.mp4").write_bytes(b"12345")
    (folder / "hdvila_part0.jsonl").write_bytes(HDVILA)
    recipe = BuildRecipe(kind="hdvila")
    found = list(rows_of([str(folder / "hdvila_part0.jsonl")], recipe))
    assert pa.Table.from_pylist(found, SOURCE).num_rows == 7
    assert [row["address"] for row in found[:2]] == [
        str(folder / f"{x}.mp4") for x in ("QMi8", "b")
    ]
    assert (found[0]["category"], found[0]["size"], found[1]["spans"]) == ("music", 5, [])
    first, last = found[0]["spans"]
    assert (first["start"], first["end"]) == pytest.approx((17.759, 23.279))
    assert (last["start"], last["end"]) == pytest.approx((3892.140, 3903.350))
    faults = {row["address"].rpartition(":")[2]: row["fault"] for row in found[2:]}
    assert faults == {
        "3": "the record lacks video_id",
        "5": "its span ['00:00:07.000', '00:00:03.000'] has no beginning before its end",
        "6": "its span ['now'] is not two times",
        "7": "a line is an object, not list",
        "8": faults["8"],
    }
    assert faults["8"].startswith("not JSON")
    # MiCo's own table of the same has seconds.
    table = pa.table({"video_id": ["QMi8"], "url": ["x"], "clips": [[[17.759, 23.279]]]})
    pq.write_table(table, folder / "hd_vila.parquet")
    (row,) = rows_of([str(folder / "hd_vila.parquet")], recipe)
    assert row["spans"] == [{"start": 17.759, "end": 23.279}]

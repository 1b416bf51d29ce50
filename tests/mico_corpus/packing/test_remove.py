"""Clips are taken out of finished shards, at once or after an interruption, and for good."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mico_chat.errors import ConfigError, DataError
from mico_corpus.build import sweep
from mico_corpus.packing import remove as removing
from mico_corpus.packing.remove import Removal, read_ids, remove
from mico_corpus.places import Place, known_ids
from mico_corpus.rows import CLIPS, INDEXES
from mico_corpus.run import Job, count_to_do
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import Sample, read_shard
from tests.mico_corpus.made import build, digest

N = 12


def ids(*numbers: int) -> list[str]:
    return [digest(f"clip {number}") for number in numbers]


def asked(*numbers: int, more: tuple[str, ...] = ()) -> Removal:
    return Removal(np.unique(np.array([*ids(*numbers), *more], dtype="S")))


def samples(output: Path) -> dict[str, Sample]:
    return {sample.id: sample for path in output.glob("*.tar") for sample in read_shard(path)}


def rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(output / "build" / "index").to_pylist()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips 0 to 4, 5 to 9 and 10 to 11 share a shard; the cutting left 12 and 13 out, an
    annotator 14."""
    return build(tmp_path_factory.mktemp("made"), N)


@pytest.fixture(autouse=True)
def without_report(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A report takes seconds; one test reads it."""
    if request.function is not test_clips_go_and_all_others_stay_as_they_are:
        monkeypatch.setattr(removing, "write_report", lambda output: None)


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_clips_go_and_all_others_stay_as_they_are(output: Path) -> None:
    before, about = samples(output), rows(output)
    untouched = output / about[ids(5)[0]]["shard"]
    state = untouched.stat()
    assert len(ShardSource(f"{output}/*.tar", "caption")) == N, "each shard has its index file"
    gone = ids(1, 3, 10)
    done = remove(str(output), asked(1, 3, 10, 13, more=("nobody",)))
    assert (done.clips, done.shards, done.known, done.missing) == (3, 2, 4, ("nobody",))
    after = samples(output)
    assert after == {key: sample for key, sample in before.items() if key not in gone}
    assert untouched.stat() == state
    now = rows(output)
    assert now.keys() == about.keys()
    for key, row in now.items():
        if key in gone:
            assert (row["reason"], row["shard"], row["files"]) == ("removed", "", [])
            assert row["annotations"] == []
        else:
            assert str(row) == str(about[key])
    assert len(ShardSource(f"{output}/*.tar", "caption")) == N - 3
    assert "| removed | 3 |" in (output / "build" / "report.md").read_text()


def test_a_shard_without_clips_goes(output: Path) -> None:
    shard = rows(output)[ids(10)[0]]["shard"]
    ShardSource(f"{output}/*.tar", "caption")
    remove(str(output), asked(10, 11))
    assert not list(output.glob(f"{shard}*"))
    assert len(samples(output)) == 10


def test_all_clips_of_a_source_or_a_licence(output: Path) -> None:
    done = remove(str(output), Removal(sources=("films",)))
    assert done.clips == 6
    assert {row["source"] for row in rows(output).values() if not row["reason"]} == {"phones"}
    assert remove(str(output), Removal(sources=("no such",), licences=("CC0-1.0",))).clips == 6
    assert samples(output) == {}


@pytest.mark.parametrize("stop", range(1, 7))
def test_an_interrupted_run_ends_the_same(
    output: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(output, tmp_path / "whole"))
    remove(str(whole), asked(0, 6, 7, 10, 11))
    steps = 0

    class Killed(BaseException): ...

    def dying(method: Any) -> Any:
        def call(self: Place, *arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == stop:
                raise Killed
            return method(self, *arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Place, "put", dying(Place.put))
        patch.setattr(Place, "remove", dying(Place.remove))
        with pytest.raises(Killed):
            remove(str(output), asked(0, 6, 7, 10, 11))
    remove(str(output), asked(0, 6, 7, 10, 11))
    assert samples(output) == samples(whole)
    assert str(rows(output)) == str(rows(whole))
    for path in whole.glob("*.tar"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_later_build_does_not_bring_them_back(output: Path) -> None:
    """Not even those that the build had not made yet."""
    place = Place(str(output))
    shutil.move(output / "build" / "index" / "10.parquet", output.parent / "10.parquet")
    place.remove(pq.read_table(output.parent / "10.parquet")["shard"][0].as_py())
    remove(str(output), asked(2, 10))
    clips = {row["id"]: row["reason"] for row in pq.read_table(output / CLIPS).to_pylist()}
    assert [clips[key] for key in ids(2, 10, 11, 12)] == ["", "removed", "", "dark"]
    assert count_to_do(place, CLIPS, known_ids(place, INDEXES)) == 1
    before = samples(output)
    sweep(place, Job("clips", CLIPS, INDEXES, (), 1, 1))
    assert samples(output) == before


def test_lists_of_ids(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("b\n\na\r\nb\n")
    (tmp_path / "ids.csv").write_text("name,id\nx,007\ny,b\n")
    pq.write_table(pa.table({"id": ["c", None, "a"]}), tmp_path / "ids.parquet")
    assert read_ids(tmp_path / "ids.txt").tolist() == [b"a", b"b"]
    assert read_ids(tmp_path / "ids.csv").tolist() == [b"007", b"b"], "ids are no numbers"
    assert read_ids(tmp_path / "ids.parquet").tolist() == [b"a", b"c"]
    pq.write_table(pa.table({"key": ["c"]}), tmp_path / "keys.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    for name, reason in (
        ("keys.parquet", "it has no column id; its columns are key"),
        ("broken.parquet", "its ids cannot be read"),
        ("none.txt", "it has no id"),
        ("latin.txt", "its ids cannot be read"),
        ("missing.csv", "its ids cannot be read"),
    ):
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            read_ids(tmp_path / name)
    with pytest.raises(ConfigError, match=r"ids are read from .txt, .csv or .parquet"):
        read_ids(tmp_path / "ids.json")
    with pytest.raises(DataError, match="no build is there"):
        removing.remove(str(tmp_path), asked(1))

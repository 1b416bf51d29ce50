"""The store: records are read again, a torn last line is removed, another run is refused."""

from pathlib import Path

import pytest

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.store import PREDICTIONS, Store, read_store

HEADER = {"task": "t", "frames": 8, "names": ("a", "b")}


def test_records_are_there_again_and_go_on(tmp_path: Path) -> None:
    with Store(tmp_path, HEADER) as store:
        store.add([{"kind": "a", "text": "é\ud800\n"}, {"kind": "b"}])
    with Store(tmp_path, HEADER) as store:
        assert store.records == [{"kind": "a", "text": "é\ud800\n"}, {"kind": "b"}]
        store.add([{"kind": "c"}])
    header, records = read_store(tmp_path)
    assert header == {"format": 1, "task": "t", "frames": 8, "names": ["a", "b"]}
    assert [record["kind"] for record in records] == ["a", "b", "c"]


@pytest.mark.parametrize("torn", [b'{"kind": "x', b'{"kind": "x"}', b"\xff"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / PREDICTIONS).write_bytes(torn)  # a torn header
    with Store(tmp_path, HEADER) as store:
        store.add([{"kind": "a"}])
    with (tmp_path / PREDICTIONS).open("ab") as file:
        file.write(torn)
    assert read_store(tmp_path)[1] == [{"kind": "a"}]
    with Store(tmp_path, HEADER) as store:
        store.add([{"kind": "b"}])
    assert [record["kind"] for record in read_store(tmp_path)[1]] == ["a", "b"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({**HEADER, "frames": 16}, "made with frames 8, but this run has 16"),
        ({"task": "t", "frames": 8}, r"made with names \[\"a\", \"b\"\], but this run has null"),
        ({**HEADER, "limit": 3}, "made with limit null, but this run has 3"),
    ],
)
def test_another_setting_is_refused_and_nothing_is_lost(
    tmp_path: Path, other: dict[str, object], said: str
) -> None:
    with Store(tmp_path, HEADER) as store:
        store.add([{"kind": "a"}])
    before = (tmp_path / PREDICTIONS).read_bytes()
    with pytest.raises(ConfigError, match=said):
        Store(tmp_path, other)
    assert (tmp_path / PREDICTIONS).read_bytes() == before
    with Store(tmp_path, HEADER), pytest.raises(ConfigError, match="another evaluation is writing"):
        Store(tmp_path, HEADER)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    with Store(tmp_path, HEADER) as store:
        store.add([{"kind": "a"}])
    with (tmp_path / PREDICTIONS).open("ab") as file:
        file.write(b'{"kind"\n{"kind": "b"}\n')
    with pytest.raises(DataError, match=rf"{PREDICTIONS}:3: not JSON"):
        Store(tmp_path, HEADER)
    with pytest.raises(DataError, match="no such file"):
        read_store(tmp_path / "none")
    (tmp_path / PREDICTIONS).write_text('{"kind": "a"}\n')
    with pytest.raises(DataError, match="lacks a header of format 1"):
        read_store(tmp_path)

"""The answers of a run in a JSON Lines file, with which a killed run can continue.

The first line, the header, names the task, the model and the settings; a run with another header is
refused. A killed run leaves at most one incomplete line, which the next run removes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from mico_chat.errors import ConfigError, DataError

FORMAT = 1
PREDICTIONS = "predictions.jsonl"
VERDICTS = "verdicts.jsonl"

Record = dict[str, Any]


class UnfinishedError(DataError):
    def __init__(self, folder: Path) -> None:
        why = "the run has not finished; run the same command again to continue it"
        super().__init__(folder / PREDICTIONS, None, why)


class Store:
    """The records of a task, in the file ``name`` of its folder; :meth:`add` appends to them."""

    def __init__(self, folder: Path, header: Record, name: str = PREDICTIONS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self._lock = FileLock(folder / f"{name}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConfigError(f"{folder}: another evaluation is writing to this folder") from error
        try:
            whole = json.loads(json.dumps({"format": FORMAT, **header}))
            self.records = self._resume(whole)
        except BaseException:
            self._lock.release()
            raise

    def add(self, records: Sequence[Record]) -> None:
        with self.path.open("ab") as file:
            file.write("".join(map(_line, records)).encode())
        self.records += records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def _resume(self, header: Record) -> list[Record]:
        if not self.path.is_file() or b"\n" not in self.path.read_bytes():
            self.path.write_text(_line(header), encoding="utf-8")
            return []
        kept, whole = _read(self.path)
        there = kept[0]
        for key in {**header, **there}:
            if header.get(key) != there.get(key):
                raise ConfigError(
                    f"{self.path} was made with {key} {json.dumps(there.get(key))}, but this run "
                    f"has {json.dumps(header.get(key))}: give another --output, or remove that file"
                )
        if whole < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(whole)
        return kept[1:]


def read_store(folder: Path, name: str = PREDICTIONS) -> tuple[Record, list[Record]]:
    """The header and the records of a folder."""
    path = folder / name
    if not path.is_file():
        raise DataError(path, None, "no such file")
    records, _ = _read(path)
    if not records or records[0].get("format") != FORMAT:
        raise DataError(path, 1, f"the file lacks a header of format {FORMAT}")
    return records[0], records[1:]


def _read(path: Path) -> tuple[list[Record], int]:
    """The records of the complete lines, and the number of bytes of these lines."""
    records: list[Record] = []
    whole, newline, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if newline else (), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise DataError(path, number, "not JSON; the file is damaged") from error
    return records, len(whole + newline)


def _line(record: Record) -> str:
    return json.dumps(record, sort_keys=True) + "\n"

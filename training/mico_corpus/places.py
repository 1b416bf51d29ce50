"""Where a build is written: a folder, or an address that fsspec opens; each file in one step."""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mico_chat.errors import DataError
from mico_chat.media.addresses import file_system, located
from mico_corpus.rows import Row

PARTIAL = "build/partial"
"""Files that are being written lie here, on the disk that holds the folder."""
ROWS = 4096
"""So many rows are in memory at once, and in a row group of Parquet."""


T = TypeVar("T")


def batched(things: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of ``n`` things, the last one shorter; no more are taken than asked for."""
    taken = iter(things)
    while some := list(islice(taken, n)):
        yield some


class Place:
    """A folder or an address, and the files below it by their names (``build/clips.parquet``)."""

    def __init__(self, location: str) -> None:
        found = located(location)
        self.folder = found.absolute() if isinstance(found, Path) else None
        self.address = location.rstrip("/") if self.folder is None else str(self.folder)
        self.system, self.root = file_system(self.address)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def names(self, below: str = "", ending: str = "") -> list[str]:
        self.system.invalidate_cache()
        try:
            found = self.system.ls(self.path(below).rstrip("/"), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        bare = (one["name"].rpartition("/")[2] for one in found if one["type"] == "file")
        folder = f"{below}/" if below else ""
        return sorted(folder + name for name in bare if name.endswith(ending))

    def exists(self, name: str) -> bool:
        return bool(self.system.isfile(self.path(name)))

    def read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(self.path(name)))

    def remove(self, name: str) -> None:
        self.system.rm_file(self.path(name))

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A file to fill, for :meth:`put`; it is gone when the block ends."""
        if self.folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary) / "file"
            return
        path = self.folder / PARTIAL / uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def put(self, file: Path, name: str) -> None:
        """Move a whole file to its name: nobody ever reads a part of it."""
        if self.folder is None:
            self.system.put_file(str(file), self.path(name))
            return
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)

    def write_rows(self, name: str, schema: pa.Schema, rows: Iterable[Row]) -> int:
        """Write a Parquet file; returns the number of rows."""
        count = 0
        with self.scratch() as path:
            with pq.ParquetWriter(path, schema) as writer:
                for some in batched(rows, ROWS):
                    writer.write_table(pa.Table.from_pylist(some, schema=schema))
                    count += len(some)
            self.put(path, name)
        return count

    def tables(self, name: str) -> list[str]:
        """The files of a table: one Parquet file, or all in a folder."""
        if name.endswith(".parquet"):
            return [name] if self.exists(name) else []
        return self.names(name, ".parquet")

    def parquet(self, name: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path(name), filesystem=self.system)
        except pa.ArrowInvalid as error:
            path = f"{self.address}/{name}"
            raise DataError(path, None, "this is no Parquet file that can be read") from error

    def count(self, table: str) -> int:
        n = 0
        for name in self.tables(table):
            with self.parquet(name) as file:
                n += file.metadata.num_rows
        return n

    def columns(self, name: str) -> list[str]:
        with self.parquet(name) as file:
            return list(file.schema_arrow.names)

    def batches(self, table: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of a table; of some columns more at once."""
        for name in self.tables(table):
            with self.parquet(name) as file:
                yield from file.iter_batches(
                    ROWS if columns is None else 16 * ROWS, columns=columns
                )


def name_of(ids: Iterable[str]) -> str:
    """A name for a set of rows: the same rows have the same name."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:32]


def known_ids(place: Place, below: str) -> NDArray[Any]:
    """The ids of all rows of the Parquet files in a folder, sorted: bytes of one length."""
    parts = [
        np.array(batch.column(0).to_pylist(), dtype="S") for batch in place.batches(below, ["id"])
    ]
    return np.sort(np.concatenate(parts)) if parts else np.array([], dtype="S")


def among(ids: pa.Array, known: NDArray[Any]) -> NDArray[np.bool_]:
    if not len(known):
        return np.zeros(len(ids), bool)
    asked = np.array(ids.to_pylist(), dtype="S")
    places = np.searchsorted(known, asked).clip(max=len(known) - 1)
    found: NDArray[np.bool_] = known[places] == asked
    return found

"""The tables of a build, read a batch of rows at a time: memory does not grow with the build."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mico_chat.errors import DataError
from mico_corpus.places import Place


def tables(place: Place, table: str) -> list[str]:
    if table.endswith(".parquet"):
        return [table] if place.exists(table) else []
    return place.names(table, ".parquet")


def opened(place: Place, name: str) -> pq.ParquetFile:
    try:
        return place.parquet(name)
    except pa.ArrowInvalid as error:
        path = f"{place.address}/{name}"
        raise DataError(path, None, "this is no Parquet file that can be read") from error


def count(place: Place, table: str) -> int:
    return sum(rows_in(place, name) for name in tables(place, table))


def rows_in(place: Place, name: str) -> int:
    with opened(place, name) as file:
        return int(file.metadata.num_rows)


def batches(place: Place, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with opened(place, name) as file:
        yield from file.iter_batches(columns=list(columns))


def all_batches(place: Place, table: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for name in tables(place, table):
        yield from batches(place, name, columns)


def rows_at(place: Place, name: str, places: NDArray[np.int64]) -> pa.Table:
    """The rows at some places of a file, in order of place; only their row groups are read."""
    with opened(place, name) as file:
        about = file.metadata
        sizes = np.array([about.row_group(n).num_rows for n in range(about.num_row_groups)])
        ends = np.cumsum(sizes)
        groups = np.unique(ends.searchsorted(places, side="right"))
        firsts = (ends - sizes)[groups]
        read_before = np.cumsum([0, *sizes[groups]])
        which = firsts.searchsorted(places, side="right") - 1
        read = file.read_row_groups(groups.tolist())
        return read.take(read_before[which] + places - firsts[which])


def texts(batch: pa.RecordBatch, column: str) -> pa.Array:
    return pc.fill_null(batch.column(column), "")


def elements(batch: pa.RecordBatch, column: str) -> tuple[NDArray[np.int64], dict[str, pa.Array]]:
    """The structs of a column of lists: each one's row in the batch, and its fields."""
    lists = batch.column(column)
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(lists)
    fields = {field.name: pc.struct_field(flat, field.name) for field in flat.type}
    return rows.astype(np.int64), fields

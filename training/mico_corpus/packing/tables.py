"""Parts of a build's tables: some rows, texts, and the elements of lists."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mico_corpus.places import Place


def rows_at(place: Place, name: str, places: NDArray[np.int64]) -> pa.Table:
    """The rows at some places of a file, in order of place; only their row groups are read."""
    with place.parquet(name) as file:
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
    """A column's texts; empty ones for a column that the table lacks."""
    if column not in batch.schema.names:
        return pa.array([""] * len(batch), pa.string())
    return pc.fill_null(batch.column(column), "")


def elements(batch: pa.RecordBatch, column: str) -> tuple[NDArray[np.int64], dict[str, pa.Array]]:
    """The structs of a column of lists: each one's row in the batch, and its fields."""
    lists = batch.column(column)
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
    flat = pc.list_flatten(lists)
    fields = {field.name: pc.struct_field(flat, field.name) for field in flat.type}
    return rows.astype(np.int64), fields

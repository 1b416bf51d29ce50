"""``mico-chat data remove``: takes clips out of finished shards.

First the shards are written anew, each in one step, then the rows of the index. So a run that ends
at any point leaves rows that the next run finds again. A removed clip keeps a row with the reason
"removed", so that a later build does not make it again.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mico_chat.errors import ConfigError, DataError
from mico_corpus.build import alone
from mico_corpus.looking.report import write_report
from mico_corpus.packing.tables import texts
from mico_corpus.packing.tars import copy, finish, opened, places_in
from mico_corpus.places import Place, among, known_ids
from mico_corpus.rows import CLIPS, INDEXES
from mico_training.data.sources.index import SUFFIX

REMOVED = "removed"
COLUMNS = ["id", "source", "licence", "reason"]


@dataclass(frozen=True)
class Removal:
    """The clips that have one of the ``ids``, or are of a source or a licence."""

    ids: NDArray[Any] = field(default_factory=lambda: np.array([], dtype="S1"))
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()

    def of(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        found = among(batch.column("id"), self.ids)
        for column, names in (("source", self.sources), ("licence", self.licences)):
            if names:
                named = pc.is_in(texts(batch, column), pa.array(names))
                found |= named.to_numpy(zero_copy_only=False)
        return found


@dataclass(frozen=True)
class Removed:
    """``clips`` taken out of ``shards``; ``known``: ids that the build has; ``missing``: others."""

    clips: int
    shards: int
    known: int
    missing: tuple[str, ...]


def read_ids(path: Path) -> NDArray[Any]:
    """The ids of a text file, one a line, or of the column ``id`` of Parquet or CSV; sorted."""
    try:
        if path.suffix == ".txt":
            ids = path.read_text(encoding="utf-8").split()
        elif path.suffix in (".parquet", ".csv"):
            if path.suffix == ".csv":
                as_text = pa.csv.ConvertOptions(column_types={"id": pa.string()})
                table = pa.csv.read_csv(path, convert_options=as_text)
            else:
                table = pq.read_table(path)
            if "id" not in table.column_names:
                names = ", ".join(table.column_names)
                raise DataError(path, None, f"it has no column id; its columns are {names}")
            ids = [one for one in table.column("id").cast(pa.string()).to_pylist() if one]
        else:
            raise ConfigError(f"{path}: ids are read from .txt, .csv or .parquet")
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(path, None, f"its ids cannot be read: {error}") from error
    if not ids:
        raise DataError(path, None, "it has no id")
    return np.unique(np.array([one.encode() for one in ids]))


def remove(shards: str, asked: Removal) -> Removed:
    """Take clips out of a build.

    Raises:
        DataError: no build is there.
        ConfigError: another process works on it.
    """
    place = Place(shards)
    if not place.tables(INDEXES):
        raise DataError(shards, None, f"no build is there: it has no {INDEXES}/*.parquet")
    with alone(place):
        targets, known = _found(place, asked)
        for shard, ids in targets.items():
            _without(place, shard, ids)
        for name in place.tables(INDEXES):
            _rewrite(place, name, asked.of)
        # The clips of the manifest that no shard has yet must not come into one.
        built = known_ids(place, INDEXES)
        for name in place.tables(CLIPS):
            _rewrite(place, name, lambda b: asked.of(b) & ~among(b.column("id"), built))
        write_report(shards)
    missing = asked.ids[~np.isin(asked.ids, known)]
    return Removed(
        sum(map(len, targets.values())),
        len(targets),
        len(asked.ids) - len(missing),
        tuple(one.decode() for one in missing.tolist()),
    )


def _found(place: Place, asked: Removal) -> tuple[dict[str, set[str]], NDArray[Any]]:
    """The clips to take out of each shard, and those of the asked ids that the build knows."""
    targets: dict[str, set[str]] = defaultdict(set)
    known: list[NDArray[Any]] = [np.array([], dtype="S1")]
    for table, more in ((INDEXES, ["shard"]), (CLIPS, [])):
        for batch in place.batches(table, [*COLUMNS, *more]):
            named = batch.column("id").filter(pa.array(among(batch.column("id"), asked.ids)))
            known.append(np.array(named.to_pylist(), dtype="S"))
            if table == INDEXES:
                for row in batch.filter(pa.array(_going(batch, asked.of))).to_pylist():
                    targets[row["shard"]].add(row["id"])
    return dict(targets), np.unique(np.concatenate(known))


def _without(place: Place, shard: str, ids: set[str]) -> None:
    """Write a shard anew without some samples; a shard without samples goes."""
    if not place.exists(shard):
        return  # a run that was interrupted has removed it
    found = places_in(place, shard)
    if not found.keys() & ids:
        return
    if place.exists(shard + SUFFIX):
        place.remove(shard + SUFFIX)
    if found.keys() <= ids:
        place.remove(shard)
        return
    with place.scratch() as path:
        with opened(place, shard) as source, path.open("wb") as target:
            copy(source, target, (part for key, part in found.items() if key not in ids))
            finish(target)
        place.put(path, shard)


def _rewrite(place: Place, name: str, of: Callable[[pa.RecordBatch], NDArray[np.bool_]]) -> None:
    """Write a table anew, in one step, whose rows of some clips say that they were removed."""
    if not any(_going(batch, of).any() for batch in place.batches(name, COLUMNS)):
        return
    with place.parquet(name) as file, place.scratch() as path:
        with pq.ParquetWriter(path, file.schema_arrow) as writer:
            for batch in file.iter_batches():
                writer.write_batch(_marked(batch, _going(batch, of)))
        place.put(path, name)


def _going(
    batch: pa.RecordBatch, of: Callable[[pa.RecordBatch], NDArray[np.bool_]]
) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = pc.equal(texts(batch, "reason"), "").to_numpy(zero_copy_only=False)
    return kept & of(batch)


def _marked(batch: pa.RecordBatch, going: NDArray[np.bool_]) -> pa.RecordBatch:
    empty: dict[str, Any] = {"reason": REMOVED, "files": [], "annotations": []}
    empty |= dict.fromkeys(("detail", "shard"), "")
    for column, value in empty.items():
        if column in batch.schema.names:
            index = batch.schema.get_field_index(column)
            kind = batch.schema.field(index).type
            some = pa.array([value], kind).take(pa.array(np.zeros(len(batch), np.int32)))
            changed = pc.if_else(pa.array(going), some, batch.column(index))
            batch = batch.set_column(index, batch.schema.field(index), changed)
    return batch

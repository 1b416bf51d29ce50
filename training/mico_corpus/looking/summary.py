"""What happened in a build, counted from its tables."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mico_corpus.packing.tables import elements, texts
from mico_corpus.places import Place
from mico_corpus.rows import CLIPS, FILES, INDEXES, SOURCES

SHOWN = 5
"""A reason or an annotator gets so many examples."""
SAMPLED = 100_000
"""A histogram is drawn from so many values, or at most twice as many."""
WHERE = ("address", "member", "source", "licence")
CUTTING = "reading and cutting"


class Spread:
    """Some of the values of a long column, evenly taken from it; their count and mean are exact."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0
        self._step = 1
        self._kept: NDArray[np.float64] = np.zeros(0)

    def add(self, values: NDArray[np.float64]) -> None:
        values = values[np.isfinite(values)]
        first = -self.count % self._step
        self._kept = np.concatenate([self._kept, values[first :: self._step]])
        self.count += len(values)
        self.sum += float(values.sum())
        while len(self._kept) > 2 * SAMPLED:
            self._kept = self._kept[::2]
            self._step *= 2

    @property
    def values(self) -> NDArray[np.float64]:
        return self._kept

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else float("nan")


@dataclass
class Amount:
    count: int = 0
    seconds: float = 0.0

    def add(self, count: int, seconds: float | None) -> None:
        self.count += count
        self.seconds += seconds or 0.0


@dataclass
class Reason:
    """How many were left out for it; the names of the first ones, with details."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Annotated:
    """What one annotator said in one role of one medium."""

    clips: int = 0
    count: int = 0
    scores: Spread = field(default_factory=Spread)
    examples: list[str] = field(default_factory=list)


@dataclass
class Summary:
    """``files``, ``cut`` and ``written`` are by (source, licence): the files that were given, the
    clips that were cut from them, and those in the shards. ``lost`` is by "file" or "clip", then by
    reason. ``measures`` are by name, then for clips that the cutting kept (True) or left out."""

    sources: int = 0
    files: dict[tuple[str, str], Amount] = field(default_factory=lambda: defaultdict(Amount))
    cut: Amount = field(default_factory=Amount)
    chosen: Amount = field(default_factory=Amount)
    annotated: int = 0
    written: dict[tuple[str, str], Amount] = field(default_factory=lambda: defaultdict(Amount))
    shards: set[str] = field(default_factory=set)
    lost: dict[str, dict[str, Reason]] = field(default_factory=lambda: {"file": {}, "clip": {}})
    annotators: dict[tuple[str, str, str, str], Annotated] = field(
        default_factory=lambda: defaultdict(Annotated)
    )
    stages: dict[str, Amount] = field(default_factory=lambda: defaultdict(Amount))
    measures: dict[str, dict[bool, Spread]] = field(
        default_factory=lambda: defaultdict(lambda: {True: Spread(), False: Spread()})
    )


def summarize(place: Place) -> Summary:
    found = Summary(sources=place.count(SOURCES))
    columns = [*WHERE, "seconds", "reason", "detail", "took"]
    for batch in place.batches(FILES, columns):
        _add_amounts(found.files, batch, batch.column("seconds"))
        _add_reasons(found.lost["file"], batch)
        took = batch.column("took")
        found.stages[CUTTING].add(len(batch), pc.sum(took).as_py())
    columns = [*WHERE, "start", "end", "reason", "detail", "brightness", "loudness"]
    for batch in place.batches(CLIPS, columns):
        # A file without clips has a row of no length. Why was told above, but of the same bytes.
        files = batch.filter(pc.equal(batch.column("end"), 0.0))
        same = files.filter(pc.equal(texts(files, "reason"), "same file"))
        _add_reasons(found.lost["file"], same.drop_columns(["start", "end"]))
        batch = batch.filter(pc.greater(batch.column("end"), 0.0))
        seconds = pc.subtract(batch.column("end"), batch.column("start"))
        kept = pc.equal(texts(batch, "reason"), "")
        found.cut.add(len(batch), pc.sum(seconds).as_py())
        found.chosen.add(pc.sum(kept).as_py() or 0, pc.sum(pc.filter(seconds, kept)).as_py())
        _add_reasons(found.lost["clip"], batch)
        _add_measures(found, batch, seconds, kept)
    columns = [*WHERE, "start", "end", "reason", "detail", "annotations", "stages", "shard"]
    for batch in place.batches(INDEXES, columns):
        found.annotated += len(batch)
        _add_reasons(found.lost["clip"], batch)
        _add_annotations(found, batch)
        _add_stages(found.stages, batch)
        kept = batch.filter(pc.equal(texts(batch, "reason"), ""))
        found.shards.update(pc.unique(texts(kept, "shard")).to_pylist())
        length = pc.subtract(kept.column("end"), kept.column("start"))
        _add_amounts(found.written, kept, length)
    return found


def _add_amounts(
    amounts: dict[tuple[str, str], Amount], batch: pa.RecordBatch, seconds: pa.Array
) -> None:
    rows = pa.table(
        {"source": texts(batch, "source"), "licence": texts(batch, "licence"), "seconds": seconds}
    )
    groups = rows.group_by(["source", "licence"]).aggregate([("seconds", "sum"), ([], "count_all")])
    for row in groups.to_pylist():
        amounts[row["source"], row["licence"]].add(row["count_all"], row["seconds_sum"])


def _add_reasons(reasons: dict[str, Reason], batch: pa.RecordBatch) -> None:
    reason = texts(batch, "reason")
    for found in pc.value_counts(reason).to_pylist():
        if name := found["values"]:
            known = reasons.setdefault(name, Reason())
            known.count += found["counts"]
            if (missing := SHOWN - len(known.examples)) > 0:
                first = batch.filter(pc.equal(reason, name)).slice(0, missing)
                known.examples += [(name_of(row), row["detail"] or "") for row in first.to_pylist()]


def name_of(row: dict[str, Any]) -> str:
    """A file, or a clip of it: ``videos/a.mp4, 12.0 to 20.5 s``."""
    name = " in ".join(part for part in (row["member"], row["address"]) if part)
    return f"{name}, {row['start']:.1f} to {row['end']:.1f} s" if "start" in row else name


def _add_measures(found: Summary, batch: pa.RecordBatch, seconds: pa.Array, kept: pa.Array) -> None:
    columns = {
        "length": seconds,
        "brightness": batch.column("brightness"),
        "loudness": batch.column("loudness"),
    }
    chosen = kept.to_numpy(zero_copy_only=False)
    for name, column in columns.items():
        values = _numbers(column)
        for which in (True, False):
            found.measures[name][which].add(values[chosen == which])


def _numbers(column: pa.Array) -> NDArray[np.float64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)


def _add_annotations(found: Summary, batch: pa.RecordBatch) -> None:
    rows, fields = elements(batch, "annotations")
    if not len(rows):
        return
    keys = ("annotator", "version", "role", "medium")
    said = pa.table(
        {key: pc.fill_null(fields[key], "") for key in keys}
        | {"text": fields["text"], "score": fields["score"], "row": rows}
    )
    groups = said.group_by(list(keys)).aggregate([("row", "count_distinct"), ([], "count_all")])
    for group in groups.to_pylist():
        known = found.annotators[tuple(group[key] for key in keys)]
        known.clips += group["row_count_distinct"]
        known.count += group["count_all"]
        same = said
        for key in keys:
            same = same.filter(pc.equal(same[key], group[key]))
        known.scores.add(_numbers(same["score"]))
        if (missing := SHOWN - len(known.examples)) > 0:
            new = dict.fromkeys(text for text in same["text"].slice(0, 100).to_pylist() if text)
            known.examples += [text for text in new if text not in known.examples][:missing]


def _add_stages(stages: dict[str, Amount], batch: pa.RecordBatch) -> None:
    rows, fields = elements(batch, "stages")
    if not len(rows):
        return
    said = pa.table({"stage": fields["stage"], "seconds": fields["seconds"]})
    groups = said.group_by("stage").aggregate([("seconds", "sum"), ([], "count_all")])
    for row in groups.to_pylist():
        stages[row["stage"] or ""].add(row["count_all"], row["seconds_sum"])

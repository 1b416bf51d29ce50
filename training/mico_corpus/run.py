"""The jobs of a build in one process, without Ray.

A job takes rows of one table and gives as many of another, in parts: Parquet files that are each
written in one step. A row is finished when a part holds it. So a run that was killed goes on where
the parts end, and repeats what no part holds.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from mico_corpus.places import PARTIAL, Place, among, batched, known_ids, name_of
from mico_corpus.rows import Row

Work = Callable[[Iterable[Row]], Iterable[Row]]
"""It gives one row for each row that it takes, in order; rows come and go one by one."""

PART_SECONDS = 60.0
"""A part is closed when it is so old, or when it has ``Job.part`` rows."""
PENDING = ".pending.parquet"
"""Ray Data ends the name of the file that says that a part is being written with this."""


@dataclass(frozen=True)
class JobStep:
    """``make`` gives the work, in the process that does it; it must be importable there.

    With Ray, ``batch`` rows are one call. ``actors``: processes (least and most) that keep what
    ``make`` gave; None: any process, which makes it for every call.
    """

    name: str
    make: Callable[[], Work]
    schema: pa.Schema
    batch: int
    actors: tuple[int, int] | None = None
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True)
class Job:
    """``source``: a table in ``build/``; ``output``: the folder of parts beside it.

    ``unit``: rows that the steps get as one; ``part``: rows of a part, made of whole units.
    """

    title: str
    source: str
    output: str
    steps: tuple[JobStep, ...]
    unit: int
    part: int

    @property
    def checkpoint(self) -> str:
        """The folder in which Ray Data keeps the ids of finished rows."""
        return f"{self.output}-checkpoint"


def run_job(place: Place, job: Job) -> None:
    known = known_ids(place, job.output)
    total = count_to_do(place, job.source, known)
    if not total:
        return
    rows = rows_to_do(place, job.source, known)
    with (
        ExitStack() as held,
        tqdm(rows, job.title, total, unit=" rows", disable=None, smoothing=0.05) as bar,
    ):
        works = [step.make() for step in job.steps]
        for work in works:
            if close := getattr(work, "close", None):
                held.callback(close)
        for part in _parts(_units(bar, job, works), job.part):
            name = f"{job.output}/{name_of(row['id'] for row in part)}.parquet"
            place.write_rows(name, job.steps[-1].schema, part)


def _units(rows: Iterable[Row], job: Job, works: list[Work]) -> Iterator[list[Row]]:
    for unit in batched(rows, job.unit):
        given: Iterable[Row] = unit
        for work in works:
            given = work(given)
        yield list(given)


def _parts(units: Iterable[list[Row]], most: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    began = time.monotonic()
    for unit in units:
        part += unit
        if len(part) >= most or time.monotonic() - began > PART_SECONDS:
            yield part
            part, began = [], time.monotonic()
    if part:
        yield part


def rows_to_do(place: Place, name: str, known: NDArray[Any]) -> Iterator[Row]:
    """The rows of a table without a reason that are not among the known ids."""
    for batch in place.batches(name):
        yield from batch.filter(_wanted(batch, known)).to_pylist()


def count_to_do(place: Place, name: str, known: NDArray[Any]) -> int:
    columns: list[str] = [c for c in ("id", "reason") if c in place.columns(name)]
    return sum(_wanted(batch, known).true_count for batch in place.batches(name, columns))


def _wanted(batch: pa.RecordBatch, known: NDArray[Any]) -> pa.Array:
    wanted = ~among(batch.column("id"), known)
    if "reason" in batch.schema.names:
        kept = pc.equal(pc.fill_null(batch.column("reason"), ""), "")
        wanted &= kept.to_numpy(zero_copy_only=False)
    return pa.array(wanted)


def clean(place: Place, job: Job) -> None:
    """Remove what a killed run left behind of a job: files and parts that were not finished."""
    for name in place.names(PARTIAL):
        place.remove(name)
    for pending in place.names(job.checkpoint, PENDING):
        began = f"{job.output}/{pending.rpartition('/')[2].removesuffix(PENDING)}"
        for part in place.names(job.output, ".parquet"):
            if part.startswith(began):
                place.remove(part)
        place.remove(pending)

"""The jobs of a build on Ray Data: on several processes, or on a cluster (``RAY_ADDRESS``).

The same steps as in one process (:mod:`.run`). Ray Data keeps memory bounded: a step that is slow
holds those before it back. It marks rows as finished in two phases: the ids of a part are written
as pending, then the part, and then the ids are renamed. So both kinds of run can go on with what
the other has left.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from mico_chat.errors import ConfigError, MicoError, MissingExtraError, ModelError
from mico_corpus.places import Place, known_ids
from mico_corpus.run import Job, JobStep, Work, count_to_do

try:
    import ray
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, Dataset
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.expressions import col
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise MissingExtraError("mico-chat data build with workers", "ray") from error

MOST_ROWS = 64
"""One task works on a block of at most so many rows."""
LEAST_ROWS = 8
BLOCK_BYTES = 64 * 2**20
FILTER_BYTES = 64 * 2**20
"""Ray sets at least so much memory aside for the process that leaves finished rows out."""


@contextmanager
def cluster(workers: int, jobs: tuple[Job, ...]) -> Iterator[None]:
    """Ray for the time of a block: the cluster at ``RAY_ADDRESS``, or processes of this machine.

    On this machine, ``workers`` processes read, cut and pack. The actors come on top, and so does
    a place for the process that leaves finished rows out: else each could wait for the others.
    """
    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    asked: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        actors = (step.cpus * step.actors[1] for j in jobs for step in j.steps if step.actors)
        asked |= {"num_cpus": workers + math.ceil(sum(actors)) + 1, "include_dashboard": False}
    try:
        ray.init(**asked)
    except ConnectionError as error:
        raise ConfigError(
            f"RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')}, where no cluster of Ray answers"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run_job(place: Place, job: Job) -> None:
    """Do what no part holds yet; a cluster is there."""
    known = known_ids(place, job.output)
    total = count_to_do(place, job.source, known)
    if not total:
        return
    adopt(place, job)
    if place.folder is None:
        system: FileSystem = PyFileSystem(FSSpecHandler(place.system))
    else:
        system = LocalFileSystem()
    with DataContext.current(context(place, job, system)):
        rows = ray.data.read_parquet(place.path(job.source), filesystem=system)
        if "reason" in place.columns(job.source):
            rows = rows.filter(expr=col("reason") == "")
        n = block_rows(job, total, int(ray.cluster_resources().get("CPU", 1)))
        rows = rows.repartition(target_num_rows_per_block=n, strict=True)
        for step in job.steps:
            rows = add(rows, step)
        try:
            rows.write_parquet(place.path(job.output), filesystem=system)
        except Exception as error:
            raise own(error) from error


def context(place: Place, job: Job, system: FileSystem) -> DataContext:
    settings: DataContext = DataContext.get_current().copy()
    settings.target_max_block_size = BLOCK_BYTES
    settings.enable_progress_bars = sys.stderr.isatty()
    settings.use_datasource_v2 = False  # it starts processes to read what is one small file
    settings.checkpoint_config = CheckpointConfig(
        "id",
        place.path(job.checkpoint),
        delete_checkpoint_on_success=False,
        override_filesystem=system,
    )
    settings.checkpoint_config.checkpoint_actor_memory_bytes = FILTER_BYTES
    return settings


def block_rows(job: Job, total: int, processes: int) -> int:
    """Rows of a block: few enough for all processes, and a whole part is made of whole blocks."""
    most = max(1, min(MOST_ROWS, job.part, total // (4 * processes)))
    even = next(n for n in range(most, 0, -1) if job.part % n == 0)
    return even if even >= min(most, LEAST_ROWS) else most


def add(rows: Dataset, step: JobStep) -> Dataset:
    about: dict[str, Any] = {
        "batch_size": step.batch,
        "batch_format": "pyarrow",
        "num_cpus": step.cpus,
        "num_gpus": step.gpus or None,
    }
    if step.actors is None:
        return rows.map_batches(partial(once, step=step), **about)
    least, most = step.actors
    pool = ActorPoolStrategy(min_size=least, max_size=most)
    return rows.map_batches(Actor, fn_constructor_args=(step,), compute=pool, **about)


def once(table: pa.Table, step: JobStep) -> pa.Table:
    """A step on a table. Rows that the schema lacks are left out, such as a row group's number."""
    return pa.Table.from_pylist(list(step.make()(table.to_pylist())), schema=step.schema)


class Actor:
    def __init__(self, step: JobStep) -> None:
        self.step = replace(step, make=partial(same, step.make()))

    def __call__(self, table: pa.Table) -> pa.Table:
        return once(table, self.step)


def same(work: Work) -> Work:
    return work


def adopt(place: Place, job: Job) -> None:
    """Tell Ray Data of the parts that a run without it wrote."""
    told = set(place.names(job.checkpoint, ".parquet"))
    for part in place.names(job.output, ".parquet"):
        stem = part.rpartition("/")[2].removesuffix(".parquet").removesuffix("-0")
        name = f"{job.checkpoint}/{stem}.parquet"
        if name not in told:
            rows = (row for batch in place.batches(part, ["id"]) for row in batch.to_pylist())
            place.write_rows(name, pa.schema({"id": pa.string()}), rows)


def own(error: BaseException) -> BaseException:
    """The project's error that a worker met, out of those that Ray wraps it in."""
    at: BaseException | None = error
    while at is not None:
        for found in (at, getattr(at, "cause", None)):
            if isinstance(found, MicoError) and not isinstance(found, RayError):
                return found
        at = at.__cause__
    return ModelError(f"a worker failed: {' '.join(str(error).split())[-500:]}")

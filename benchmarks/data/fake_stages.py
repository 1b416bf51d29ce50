"""Stages without media for :mod:`benchmarks.data.engine`: they wait, or do nothing at all.

Each process of a build imports this file, so it imports little.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from mico_corpus.describing.base import Annotation, Clip
from mico_corpus.places import Place, name_of
from mico_corpus.rows import ANNOTATED, CLIP, INDEX, Row
from mico_corpus.run import Job, JobStep, Work

TABLE = "build/clips.parquet"


class Numbered:
    """An annotator that captions a clip by its id."""

    name = "numbered"
    version = "1"

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [
            [Annotation(self.name, self.version, "caption", "video", f"clip {clip.id}")]
            for clip in clips
        ]


def wait(rows: Iterable[Row], seconds: float) -> Iterator[Row]:
    """Wait for each row, as if a model or an encoder were at work on it."""
    for row in rows:
        if seconds:
            time.sleep(seconds)
        yield row


def waiting(seconds: float) -> Work:
    return partial(wait, seconds=seconds)


def write_manifest(place: Place, rows: int) -> None:
    def row(number: int) -> Row:
        about = {"id": name_of([str(number)]), "address": f"/videos/{number // 8:08d}.mp4"}
        times = {"reason": "", "start": 8.0 * (number % 8), "end": 8.0}
        return dict.fromkeys(CLIP.names) | about | times

    place.write_rows(TABLE, CLIP, map(row, range(rows)))


def job(describe: float, pack: float, actors: int, samples: int, gpus: float = 0.0) -> Job:
    """A job with a model, ``describe`` seconds a row on each of its processes, and an encoder."""
    pool = (actors, actors)
    steps = (
        JobStep("describe", partial(waiting, describe), ANNOTATED, 8, pool, 1.0 - gpus, gpus),
        JobStep("pack", partial(waiting, pack), INDEX, samples),
    )
    return Job("rows", TABLE, "build/index", steps, unit=samples, part=samples)

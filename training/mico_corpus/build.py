"""A build from beginning to end: sources, clips, annotations, shards, report.

Each step leaves a table in ``build/`` beside the shards (:mod:`.rows`). A step that is done is not
done again, so the same command goes on after an end of any kind. ``build/recipe.yaml`` says what
a build was begun with.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import yaml
from filelock import FileLock, Timeout

from mico_chat.errors import ConfigError
from mico_chat.late import late
from mico_chat.media.addresses import located
from mico_corpus.cutting.cuts import crashed, cut
from mico_corpus.cutting.isolated import Isolated
from mico_corpus.cutting.manifest import select
from mico_corpus.cutting.sources import rows_of
from mico_corpus.describing.annotating import Annotating
from mico_corpus.describing.base import check_options
from mico_corpus.looking.report import write_report
from mico_corpus.packing.pack import SHARD, STAGE, Packer
from mico_corpus.places import Place
from mico_corpus.recipe import BuildRecipe
from mico_corpus.rows import ANNOTATED, CLIPS, FILE, FILES, INDEX, INDEXES, SOURCE, SOURCES
from mico_corpus.run import Job, JobStep, Work, clean, run_job
from mico_training.recipe import changes

with late():
    from mico_corpus import ray_run

RECIPE = "build/recipe.yaml"
AT_ONCE = 64
"""A part has at most this many files, even if each is cut at once."""


@dataclass(frozen=True)
class BuildResult:
    """``counts`` says how often each reason left something out; ``seconds`` are this run's."""

    clips: int
    shards: int
    counts: dict[str, int]
    seconds: float


def build(recipe: BuildRecipe, sources: Sequence[str], output: str) -> BuildResult:
    """Make shards of ``sources`` in a folder or at an address, or go on with them.

    Raises:
        ConfigError: ``output`` holds a build of another recipe or other sources, or another
            process works on it; or an annotator cannot be imported.
        MissingExtraError: there are workers, and no Ray.
    """
    began = time.monotonic()
    for annotator in recipe.annotators:
        check_options(annotator.use, annotator.options)
    place = Place(output)
    cutting, packing = jobs(recipe, output)
    with alone(place), runner(recipe, cutting, packing) as run:
        begin(place, recipe, sources)
        sweep(place, cutting, packing)
        if not place.exists(SOURCES):
            place.write_rows(SOURCES, SOURCE, rows_of(sources, recipe))
        if not place.exists(CLIPS):
            run(place, cutting)
            select(place, recipe)
        run(place, packing)
        sweep(place, cutting, packing)
        write_report(output)
        return count(place, time.monotonic() - began)


@contextmanager
def runner(recipe: BuildRecipe, *jobs: Job) -> Iterator[Callable[[Place, Job], None]]:
    if not recipe.workers and not os.environ.get("RAY_ADDRESS"):
        yield run_job
        return
    with ray_run.cluster(recipe.workers, jobs):
        yield ray_run.run_job


def jobs(recipe: BuildRecipe, output: str) -> tuple[Job, Job]:
    cutting = JobStep("cut", partial(cutter, recipe), FILE, batch=1)
    annotate = [
        JobStep(
            one.use,
            partial(Annotating, one, recipe.shards.unsafe, recipe.shards.images),
            ANNOTATED,
            one.batch_size,
            one.actors if isinstance(one.actors, tuple) else (one.actors, one.actors),
            one.cpus,
            one.gpus,
        )
        for one in recipe.annotators
    ]
    n = recipe.shards.samples
    pack = JobStep(STAGE, partial(Packer, recipe.shards, output), INDEX, n)
    return (
        Job("files", SOURCES, FILES, (cutting,), unit=1, part=AT_ONCE),
        Job("clips", CLIPS, INDEXES, (*annotate, pack), unit=n, part=n),
    )


def cutter(recipe: BuildRecipe) -> Work:
    return Isolated(partial(cut, recipe=recipe), crashed)


def begin(place: Place, recipe: BuildRecipe, sources: Sequence[str]) -> None:
    """Write what a build is made of; of one that was begun before, check it."""
    found = [located(one) for one in sources]
    paths = [str(one.absolute() if isinstance(one, Path) else one) for one in found]
    # How many processes do the work changes nothing about the result.
    now = {"sources": paths, "recipe": recipe.model_dump(mode="json", exclude={"workers"})}
    if place.exists(RECIPE):
        before = yaml.safe_load(place.read(RECIPE))
        then_made = BuildRecipe.model_validate(before["recipe"])  # with the keys that are new
        before["recipe"] = then_made.model_dump(mode="json", exclude={"workers"})
        for key, (then, value) in changes(before, now).items():
            raise ConfigError(
                f"{place.address} was begun with {key} {then}, not {value}: give another --output, "
                f"or the recipe and the sources of {place.address}/{RECIPE}"
            )
        return
    if strange := [name for name in place.names() if SHARD.fullmatch(name)]:
        raise ConfigError(
            f"{place.address} holds {strange[0]}, but no {RECIPE}: give another --output"
        )
    with place.scratch() as path:
        path.write_text(yaml.safe_dump(now, allow_unicode=True), encoding="utf-8")
        place.put(path, RECIPE)


@contextmanager
def alone(place: Place) -> Iterator[None]:
    """Let no other process of this machine work on a folder meanwhile."""
    if place.folder is None:
        yield
        return
    (place.folder / "build").mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.folder / "build/lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{place.address}: another build writes here; let it end") from error
    try:
        yield
    finally:
        lock.release()


def sweep(place: Place, *jobs: Job) -> None:
    """Remove what a run that was killed left behind: partial files, and shards without rows."""
    for job in jobs:
        clean(place, job)
    known = shards_of(place)
    for name in place.names(ending=".tar"):
        if SHARD.fullmatch(name) and name not in known:
            place.remove(name)


def shards_of(place: Place) -> set[str]:
    found: set[str] = set()
    for batch in place.batches(INDEXES, ["shard"]):
        found.update(pc.unique(batch.column("shard")).to_pylist())
    return found - {"", None}


def count(place: Place, seconds: float) -> BuildResult:
    """Count the manifest's rows; a file that gave no clips has a row there, too."""
    reasons = _reasons(place, CLIPS)
    del reasons[""]
    reasons.update(_reasons(place, INDEXES))
    clips = reasons.pop("", 0)
    return BuildResult(clips, len(shards_of(place)), dict(reasons.most_common()), seconds)


def _reasons(place: Place, name: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for batch in place.batches(name, ["reason"]):
        for one in pc.value_counts(pc.fill_null(batch.column(0), "")).to_pylist():
            found[one["values"]] += one["counts"]
    return found

"""``python -m mico_research.ablations``: the paper's ablations, small, on our world.

Trains every cell of Tables 1 and 7 with several seeds, evaluates text-to-medium retrieval on
held-out samples, and writes the tables beside the paper's, loss curves as figure 6 and a bar chart.
What is done is not done again: after a break the same command goes on.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mico_chat.errors import MicoError
from mico_research.ablations.grid import TABLES, cells, listed
from mico_research.ablations.report import report
from mico_research.ablations.run import Settings, all_results, described, prepare, side_by_side
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.records import result_of

logger = logging.getLogger(__name__)
RECIPE = Path("training/recipes/ablations.yaml")
SHARDS = "train-0000[0-3]?.tar"
"""The cells train on forty of the world's shards, which hold 20,000 samples."""

UNSEEN = "train-0000[4-7]?.tar"
"""Of the other thirty-two shards, only the media that are ranked get features."""


CURVE = "train-000040.tar"
"""The curve of R@1 over the steps is of this shard's samples."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mico_training.data.media").setLevel(logging.INFO)
    try:
        _main(options)
    except MicoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main(options: argparse.Namespace) -> None:
    changed = [] if options.steps is None else [f"train.steps={options.steps}"]
    if load_recipe(Stage1Run, options.config, options.set).eval is not None:
        changed.append(f"eval.data.0.path={options.data}/shards/{CURVE}")
    settings = Settings(
        recipe=options.config,
        overrides=(
            f"data.0.path={options.data}/shards/{SHARDS}",
            f"features.cache={options.data}/features",
            *changed,
            *options.set,
        ),
        validation=str(options.data / "shards" / options.held_out),
        output=options.output,
        pool=options.pool,
    )
    failed: list[str] = []
    chosen = cells(tuple(table for table in TABLES if table.name in options.only))
    chosen = [cell for cell in chosen if cell.name in (options.cell or [cell.name])]
    if options.grid:
        print(listed(chosen))
        return
    if not options.report:
        # All cells with the first seed, then with the next, so that an early end leaves a table.
        wanted = [(cell, seed) for seed in options.seeds for cell in chosen]
        missing = [
            (cell, seed)
            for cell, seed in wanted
            if result_of(settings.folder(cell, seed), described(settings, cell, seed)) is None
        ]
        print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done", flush=True)
        if missing:
            prepare(settings)
        started = time.monotonic()
        runs = side_by_side(settings, missing, options.processes) if missing else ()
        for n, (cell, seed, error) in enumerate(runs, 1):
            minutes = (time.monotonic() - started) / 60
            name = f"{cell.name}-{seed}"
            print(f"{n} of {len(missing)}, {minutes:.1f} min: {name}", flush=True)
            if error is not None:
                logger.error("%s failed", name, exc_info=error)
                failed.append(name)
    for path in report(all_results(settings, cells(TABLES)), options.results or options.output):
        print(path)
    if failed:
        raise MicoError(f"{len(failed)} runs failed: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mico_research.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [table.name for table in TABLES]
    add("--only", nargs="+", choices=names, default=names, help="tables to fill; default: all")
    known = [cell.name for cell in cells(TABLES)]
    add("--cell", nargs="+", choices=known, metavar="NAME", help="run these cells; default: all")
    add("--grid", action="store_true", help="print the table of the cells, and run none")
    seeds = "seeds of each run; default: 0 1 2"
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help=seeds)
    add("--steps", type=int, help="steps of each run; default: as in the recipe")
    processes = "number of runs at the same time, which share the cores; default: 1"
    add("--processes", type=int, default=1, help=processes)
    pool = "most held-out media of each kind that are ranked; default: 2000"
    add("--pool", type=int, default=2000, help=pool)
    held_out = (
        f"shards to evaluate on; default: {UNSEEN}, new scenes of things that were trained on. "
        "validation-*.tar has scenes of new things"
    )
    add("--held-out", default=UNSEEN, metavar="SHARDS", help=held_out)
    data = "folder of the shards that `make ablations` builds, and of their features"
    add("--data", type=Path, default=Path("data/ablations"), help=data)
    add("--config", type=Path, default=RECIPE, help="recipe of every run")
    override = "override a key of the recipe, as key=value"
    add("--set", action="append", default=[], help=override)
    add("--output", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    results = "folder of ablations.md and its pictures; default: that of --output"
    add("--results", type=Path, help=results)
    only = "only write the report, from the runs that are finished"
    add("--report", action="store_true", help=only)
    return parser


if __name__ == "__main__":
    sys.exit(main())

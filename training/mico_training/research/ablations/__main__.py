"""``python -m mico_training.research.ablations``: the paper's ablations, small, on our world.

Trains every cell of Tables 1 and 7 with several seeds, evaluates text-to-medium retrieval on
held-out samples, and writes the tables beside the paper's, loss curves as figure 6 and a bar chart.
What is done is not done again: after a break the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mico_chat.errors import MicoError
from mico_training.research.ablations.grid import TABLES, Cell, Table, cells
from mico_training.research.ablations.report import report
from mico_training.research.ablations.run import (
    Settings,
    all_results,
    prepare,
    result_of,
    side_by_side,
)

logger = logging.getLogger(__name__)
RECIPE = Path("training/recipes/ablations.yaml")
SHARDS = "train-0000[0-2]?.tar"
"""Thirty of the mini's 57: a run sees each of their 30,000 samples about four times."""

UNSEEN = "train-00003[0-3].tar"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then report. The exit code is 1 after an error, which is one line."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mico_training.features").setLevel(logging.INFO)
    try:
        _main(options)
    except MicoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main(options: argparse.Namespace) -> None:
    chosen = tuple(table for table in TABLES if table.name in options.only)
    settings = Settings(
        recipe=options.config,
        overrides=_overrides(options),
        validation=str(options.data / "shards" / options.held_out),
        output=options.output,
        pool=options.pool,
    )
    failed: list[str] = []
    if not options.report:
        wanted = _order(chosen, options.seeds)
        missing = [(c, s) for c, s in wanted if result_of(settings, c, s) is None]
        print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done", flush=True)
        if missing:
            prepare(settings)
            failed += _run_all(settings, missing, options.processes)
    results = all_results(settings, cells(TABLES))
    for path in report(results, options.results or options.output):
        print(path)
    if failed:
        raise MicoError(f"{len(failed)} runs failed: {', '.join(failed)}")


def _overrides(options: argparse.Namespace) -> tuple[str, ...]:
    """The recipe's overrides, from ``--data``, ``--steps`` and ``--set``."""
    found = [
        f"data.0.path={options.data}/shards/{SHARDS}",
        f"features.cache={options.data}/features",
    ]
    if options.steps is not None:
        found.append(f"train.steps={options.steps}")
    return (*found, *options.set)


def _order(tables: tuple[Table, ...], seeds: Sequence[int]) -> list[tuple[Cell, int]]:
    """All cells with the first seed, then with the next, so that an early end leaves a table."""
    return [(cell, seed) for seed in seeds for cell in cells(tables)]


def _run_all(settings: Settings, runs: Sequence[tuple[Cell, int]], processes: int) -> list[str]:
    """Do runs, print each, and return the names of those that failed."""
    started = time.monotonic()
    failed = []
    for n, (cell, seed, error) in enumerate(side_by_side(settings, runs, processes), 1):
        minutes = (time.monotonic() - started) / 60
        name = f"{cell.name}-{seed}"
        print(f"{n} of {len(runs)}, {minutes:.1f} min: {name}", flush=True)
        if error is not None:
            logger.error("%s failed", name, exc_info=error)
            failed.append(name)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mico_training.research.ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [table.name for table in TABLES]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="tables to fill; default: all"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each run; default: 0 1 2"
    )
    parser.add_argument("--steps", type=int, help="steps of each run; default: as in the recipe")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of runs at the same time, which share the cores; default: 1",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=250,
        help="number of held-out media of each kind to rank; default: 250",
    )
    parser.add_argument(
        "--held-out",
        default=UNSEEN,
        metavar="SHARDS",
        help=f"shards to evaluate on; default: {UNSEEN}, new scenes of things that were "
        "trained on. validation-*.tar has scenes of new things",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/mini"),
        help="folder of the data that `make mini` writes",
    )
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe of every run")
    parser.add_argument(
        "--set", action="append", default=[], help="override a key of the recipe, as key=value"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ablations"), help="folder of the runs"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of ablations.md and its pictures; default: that of --output",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="only write the report, from the runs that are finished",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

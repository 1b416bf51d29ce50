"""``mico-chat evaluate``: tasks of the paper's tables and files of items, together or alone.

A task asks the pretraining model (a stage 1 folder, or a chat model that keeps its text branch);
items ask the chat model. Every finished task of the output folder is in its table, also those of
earlier runs and of other models: each data set has a fine-tuned model of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico_chat.engine.load import DTYPES
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation import skills
from mico_chat.evaluation.report import read_report, write_report
from mico_chat.evaluation.tasks.datasets import DATASETS
from mico_chat.evaluation.tasks.report import row_of
from mico_chat.evaluation.tasks.report import table as tasks_table
from mico_chat.evaluation.tasks.store import PREDICTIONS
from mico_chat.evaluation.tasks.table import TASKS, task_named
from mico_chat.evaluation.tasks.task import Task


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = _parser().parse_args(list(arguments))
    if options.list:
        print(_listing())
        return 0
    files = [Path(word) for word in options.what if word.endswith(".jsonl") or Path(word).is_file()]
    names = [word for word in options.what if Path(word) not in files]
    tasks = [task_named(word) for word in dict.fromkeys(names)]
    output: Path | None = options.rescore or options.output
    if not (files or tasks or options.rescore):
        raise ConfigError("name a task or a file of items; mico-chat evaluate --list names tasks")
    if options.rescore and (files or tasks):
        raise ConfigError("--rescore computes the figures of a folder anew: name nothing else")
    if tasks and output is None:
        output = Path("runs/evaluation") / Path(options.model).name
    report: dict[str, Any] = read_report(output) if output is not None else {}
    answers: list[dict[str, Any]] = []
    _check_data(tasks, options.data)
    if files:
        found, answers = skills.run(files, options)
        report |= found
    if tasks:
        assert output is not None
        _run(tasks, output, options)
    if (tasks or options.rescore) and output is not None:
        report |= {"machine": skills.machine(), "tasks": _finished(output)}
    parts = [skills.table(report)] if "skills" in report else []
    parts += [tasks_table(report["tasks"])] if "tasks" in report else []
    print("\n\n".join(parts))
    if output is not None:
        write_report(output, report, answers, "\n\n".join(parts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mico-chat evaluate",
        description="Evaluate a model on tasks of the paper's tables, or on files of items.",
    )
    parser.add_argument("what", nargs="*", metavar="TASK|ITEMS", help="tasks, JSONL files of items")
    parser.add_argument("--list", action="store_true", help="list the tasks and end")
    parser.add_argument("--model", default="mini", help="a folder, a hub name, or mini")
    parser.add_argument("--limit", type=_count, default=0, help="items a task or skill at most")
    parser.add_argument("--batch-size", type=_positive, default=32)
    parser.add_argument("--output", type=Path, help="folder for results.json, table.md, charts")
    parser.add_argument("--dtype", choices=DTYPES, help="of a task's encoder: float32")
    group = parser.add_argument_group("tasks")
    group.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    group.add_argument("--device", help="cpu, cuda, cuda:1; the best by default")
    group.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="decoders")
    group.add_argument("--frames", type=_positive, help="of a video, and not the task's")
    group.add_argument("--slices", type=_count, help="of a sound, and not the task's")
    group.add_argument(
        "--rescore", type=Path, metavar="DIR", help="compute the figures of an output folder anew"
    )
    skills.add_options(parser)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _check_data(tasks: Sequence[Task], data: Path) -> None:
    """Refuse to start where a data set is missing: a run is long.

    Raises:
        DataError: naming all that is missing; the layouts go to standard error before.
    """
    missing: dict[str, list[str]] = {}
    for task in tasks:
        if lacking := DATASETS[task.dataset].missing(data):
            missing[task.dataset] = lacking
    for name in missing:
        print(f"{name} is to lie so:\n{DATASETS[name].layout(data)}\n", file=sys.stderr)
    if missing:
        named = "; ".join(
            f"{DATASETS[name].folder}/ lacks {', '.join(lacking)}"
            for name, lacking in missing.items()
        )
        raise DataError(data, None, f"{named} (--data names the folder of the data sets)")


def _run(tasks: Sequence[Task], output: Path, options: argparse.Namespace) -> None:
    from mico_chat.evaluation.tasks.model import EvaluatedModel
    from mico_chat.evaluation.tasks.run import RunOptions, run_task

    model = EvaluatedModel.load(options.model, options.dtype or "float32", options.device)
    settings = RunOptions(
        limit=options.limit,
        batch_size=options.batch_size,
        workers=options.workers,
        frames=options.frames,
        slices=options.slices,
    )
    for task in tasks:
        run_task(task, options.data, model, output / task.name, settings)


def _finished(output: Path) -> dict[str, Any]:
    """The rows of the finished tasks in a folder, in the order of the table.

    Raises:
        DataError: there is none.
    """
    from mico_chat.evaluation.tasks.score import UnfinishedError, score

    rows: dict[str, Any] = {}
    unfinished = []
    for name in TASKS:
        if (output / name / PREDICTIONS).is_file():
            try:
                rows[name] = row_of(score(output / name))
            except UnfinishedError as error:
                unfinished.append(str(error))
    if not rows:
        nothing = DataError(output, None, f"no TASK/{PREDICTIONS} in it")
        raise DataError(output, None, unfinished[0]) if unfinished else nothing
    for reason in unfinished:
        print(f"not in the table: {reason}", file=sys.stderr)
    return rows


def _listing() -> str:
    """The tasks, the paper's figures and where their data lie."""
    rows = [("TASK", "PAPER", "", "DATA")]
    for name, task in TASKS.items():
        paper, place = ("-", "") if task.paper is None else (
            f"{task.paper.value:.1f}",
            f"{task.paper.metric}, {task.paper.place}",
        )  # fmt: skip
        rows.append((name, paper, place, DATASETS[task.dataset].folder))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

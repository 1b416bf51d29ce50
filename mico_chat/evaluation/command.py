"""``mico-chat evaluate``: tasks of the paper's tables, suites and files of items.

A task of Table 3 asks the pretraining model (a stage 1 folder, or a chat model that keeps its text
branch); tasks whose names end in ``-chat``, suites and items ask a chat model, in this process or
behind a URL. Every finished task of the output folder is in its table, also those of earlier runs
and of other models: each data set has a fine-tuned model of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation import skills
from mico_chat.evaluation.chat.endpoint import Endpoint, key_of
from mico_chat.evaluation.chat.model import CONTROLS
from mico_chat.evaluation.chat.options import add_options, check_options, open_model
from mico_chat.evaluation.items import Item
from mico_chat.evaluation.report import machine, read_report, write_report
from mico_chat.evaluation.suite import ITEMS, SUITES
from mico_chat.evaluation.tasks.datasets import DATASETS
from mico_chat.evaluation.tasks.store import PREDICTIONS
from mico_chat.evaluation.tasks.table import TASKS, task_named
from mico_chat.evaluation.tasks.task import Task
from mico_chat.load import DTYPES
from mico_chat.settings import Parser, count, positive


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = _parser().parse_args(list(arguments))
    if options.list:
        print(_listing())
        return 0
    # From here on torch and scipy are needed: their import takes seconds.
    from mico_chat.evaluation import skill_scores
    from mico_chat.evaluation.compare import compare
    from mico_chat.evaluation.tasks.report import table as tasks_table

    if options.compare:
        print(compare(*options.compare))
        return 0
    check_options(options)
    files = [Path(word) for word in options.what if word.endswith(".jsonl") or Path(word).is_file()]
    names = list(dict.fromkeys(word for word in options.what if Path(word) not in files))
    tasks = [task_named(word) for word in names if word not in SUITES]
    if not (files or names or options.rescore):
        raise ConfigError("name a task or a file of items; mico-chat evaluate --list names tasks")
    if options.rescore and (files or names):
        raise ConfigError("--rescore computes the figures of a folder anew: name nothing else")
    chosen = (options.skills, options.limit)
    _check_judge(options)
    _check_kinds(tasks, options)
    items = {
        name: skills.chosen_items(suite.paths(options.data), *chosen, of=suite.skills)
        for name, suite in SUITES.items()
        if name in names
    }
    if files:
        items[ITEMS] = skills.chosen_items(files, *chosen)
    if items:
        _check_controls(options)
    _check_data(tasks, options.data)
    output: Path | None = options.rescore or options.output
    if names and output is None:
        output = Path("runs/evaluation") / Path(options.model).name
    with TemporaryDirectory() if output is None else nullcontext(output) as place:
        folder = Path(place)
        _ask_chat_model(items, [task for task in tasks if task.prompt], folder, options)
        _run(tasks, folder, options)
        _judge(folder, tasks, options)
        report = _finished(folder, {} if output is None else read_report(output))
        text = "\n\n".join(
            [skill_scores.table(name, row) for name, row in report.get("skills", {}).items()]
            + ([tasks_table(report["tasks"])] if "tasks" in report else [])
        )
        print(text)
        if output is not None:
            write_report(output, report, text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mico-chat evaluate",
        description="Evaluate a model on tasks of the paper's tables, on a suite, or on files of "
        "items.",
    )
    parser.add_argument(
        "what", nargs="*", metavar="TASK|SUITE|ITEMS", help="tasks, suites, JSONL files of items"
    )
    parser.add_argument("--list", action="store_true", help="list tasks and suites, and end")
    parser.add_argument(
        "--model", default="mini", help="a folder, a hub name, mini; with --base-url"
    )
    parser.add_argument("--limit", type=count, default=0, help="items a task or skill at most")
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="media, or requests, at the same time"
    )
    parser.add_argument("--output", type=Path, help="folder for results.json, table.md, charts")
    parser.add_argument("--dtype", choices=DTYPES, help="of a task's encoder: float32")
    parser.add_argument(
        "--rescore", type=Path, metavar="DIR", help="compute the figures of an output folder anew"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="DIR", help="two output folders side by side"
    )
    group = parser.add_argument_group("tasks")
    group.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    group.add_argument("--device", help="cpu, cuda, cuda:1; the best by default")
    group.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="decoders")
    group.add_argument("--frames", type=positive, help="of a video, and not the task's")
    group.add_argument("--slices", type=count, help="of a sound, and not the task's")
    group = parser.add_argument_group("suites and items")
    group.add_argument(
        "--controls", nargs="+", choices=CONTROLS, help="all but base-llm by default"
    )
    group.add_argument("--skills", nargs="+", help="of these skills alone")
    add_options(parser)
    group = parser.add_argument_group("the judge of video questions")
    group.add_argument("--judge-model", metavar="NAME", help="any chat model")
    group.add_argument("--judge-url", metavar="URL", help="up to /v1; OpenAI's by default")
    group.add_argument("--judge-api-key-env", metavar="NAME", help="variable with its key")
    return parser


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


def _check_kinds(tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Refuse what a task's kind of model has not.

    Raises:
        ConfigError: naming the task and the option.
    """
    for task in tasks:
        if options.base_url is not None and not task.prompt:
            raise ConfigError(f"{task.name} looks into a pretraining model, not behind --base-url")
        if options.slices is not None and task.prompt:
            raise ConfigError(f"--slices is not for {task.name}: a chat model takes what it takes")


def _check_controls(options: argparse.Namespace) -> None:
    """Take the model's own controls where none are asked for.

    Raises:
        ConfigError: a control that the model has not.
    """
    from mico_chat.evaluation.chat.in_process import InProcess, check_base_llm

    there = Endpoint.controls if options.base_url is not None else InProcess.controls
    if options.controls is None:
        options.controls = [control for control in there if control != "base-llm"]
    if unknown := [control for control in options.controls if control not in there]:
        raise ConfigError(
            f"the control {', '.join(unknown)} needs the model in this process; over --base-url "
            f"there are {', '.join(there)}"
        )
    if "base-llm" in options.controls:
        check_base_llm(options.model)


def _check_judge(options: argparse.Namespace) -> None:
    """Refuse half a judge.

    Raises:
        ConfigError: an address or a key without a name.
    """
    if options.judge_model is None and (options.judge_url or options.judge_api_key_env):
        raise ConfigError("--judge-url and --judge-api-key-env go with --judge-model")


def _ask_chat_model(
    sets: dict[str, list[Item]], tasks: Sequence[Task], output: Path, options: argparse.Namespace
) -> None:
    from mico_chat.evaluation.tasks.chat import run_chat_task

    if not (sets or tasks):
        return
    with closing(open_model(options)) as model:
        for task in tasks:
            run_chat_task(
                task,
                options.data,
                model,
                output / task.name,
                limit=options.limit,
                max_tokens=options.max_tokens,
            )
        for name, items in sets.items():
            skills.run(
                name,
                items,
                model,
                output / name,
                options.controls,
                max_tokens=options.max_tokens,
                limit=options.limit,
            )


def _run(tasks: Sequence[Task], output: Path, options: argparse.Namespace) -> None:
    """The tasks that look into a pretraining model."""
    from mico_chat.evaluation.tasks.model import EvaluatedModel
    from mico_chat.evaluation.tasks.run import RunOptions, run_task

    looked_into = [task for task in tasks if not task.prompt]
    if not looked_into:
        return
    model = EvaluatedModel.load(options.model, options.dtype or "float32", options.device)
    settings = RunOptions(
        limit=options.limit,
        batch_size=options.batch_size,
        workers=options.workers,
        frames=options.frames,
        slices=options.slices,
    )
    for task in looked_into:
        run_task(task, options.data, model, output / task.name, settings)


def _judge(output: Path, tasks: Sequence[Task], options: argparse.Namespace) -> None:
    """Have the answers judged: of the tasks asked for, or of a folder that is scored anew."""
    from mico_chat.evaluation.metrics.judge import Judge
    from mico_chat.evaluation.tasks.score import is_finished
    from mico_chat.evaluation.tasks.verdicts import judge_answers

    if options.judge_model is None:
        return
    named = [task.name for task in (TASKS.values() if options.rescore else tasks) if task.judged]
    there = [output / name for name in named if is_finished(output / name)]
    if not there:
        raise ConfigError(f"--judge-model: no answers for a judge in {output}")
    with Judge(
        options.judge_model,
        options.judge_url,
        key_of(options.judge_api_key_env, "--judge-api-key-env"),
        concurrency=options.batch_size,
    ) as judge:
        for folder in there:
            judge_answers(folder, judge)


def _finished(output: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report with all that is finished in a folder, in the order of the table.

    Raises:
        DataError: there is nothing.
    """
    from mico_chat.evaluation import skill_scores
    from mico_chat.evaluation.tasks.report import row_of
    from mico_chat.evaluation.tasks.score import UnfinishedError, score

    found: dict[str, dict[str, Any]] = {"skills": {}, "tasks": {}}
    unfinished = []
    for name in (ITEMS, *SUITES, *TASKS):
        if not (output / name / PREDICTIONS).is_file():
            continue
        try:
            if name in TASKS:
                found["tasks"][name] = row_of(score(output / name))
            else:
                found["skills"][name] = skill_scores.score(output / name)
        except UnfinishedError as error:
            unfinished.append(str(error))
    rows = {kind: of_it for kind, of_it in found.items() if of_it}
    if not rows:
        nothing = DataError(output, None, f"no TASK/{PREDICTIONS} in it")
        raise DataError(output, None, unfinished[0]) if unfinished else nothing
    for reason in unfinished:
        print(f"not in the table: {reason}", file=sys.stderr)
    kept = {key: value for key, value in report.items() if key not in found}
    return {**kept, "machine": machine(), **rows}


def _listing() -> str:
    """The tasks and suites, the paper's figures and where their data lie."""
    rows = [("TASK", "PAPER", "", "DATA")]
    for name, task in TASKS.items():
        paper, place = ("-", "") if task.paper is None else (
            f"{task.paper.value:.1f}",
            f"{task.paper.metric}, {task.paper.place}",
        )  # fmt: skip
        rows.append((name, paper, place, DATASETS[task.dataset].folder))
    rows += [(name, "-", "", ", ".join(suite.files)) for name, suite in SUITES.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

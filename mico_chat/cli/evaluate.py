"""``mico-chat evaluate``: tasks of the paper's tables, suites and files of items.

A task of Table 3 asks the pretraining model; tasks whose names end in ``-chat``, suites and items
ask a chat model, in this process or behind a URL. The table has every finished task of the output
folder, also those of earlier runs and of other models.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from mico_chat.cli.options import check_extra, in_columns
from mico_chat.engines.base import DTYPES, EngineOptions
from mico_chat.engines.source import Source
from mico_chat.engines.table import NAMES, QUANTIZATION_HELP, reference
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation import task as table
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.endpoint import DEFAULT_KEY, Endpoint, key_of
from mico_chat.evaluation.task import (
    CONTROLS,
    ITEMS,
    MEDIA_CONTROLS,
    OWN,
    SUITES,
    TASKS,
    Contents,
    Model,
    Task,
)
from mico_chat.late import late
from mico_chat.load import asked_quantization
from mico_chat.settings import Parser, count, positive

with late():  # torch and scipy: their import takes seconds
    from mico_chat.evaluation import chat as chat_models
    from mico_chat.evaluation import judge, pretrained, report, scores
    from mico_chat.evaluation import run as asking
    from mico_training.data import own

IN_PROCESS = (
    *("engine", "quantization", "dtype", "device", "frames", "slices"),
    *("load_in_4bit", "load_in_8bit", "trust_remote_code", "mmproj", "as_served"),
)
ENDPOINT = ("api_key_env", "video_as_frames", "audio_as_wav")


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(list(arguments))
    if options.list:
        print(_listing())
        return 0
    if options.compare:
        print(report.compare(*options.compare))
        return 0
    files = [Path(word) for word in options.what if word.endswith(".jsonl") or Path(word).is_file()]
    names = list(dict.fromkeys(word for word in options.what if Path(word) not in files))
    tasks = [table.task_named(name) for name in names]
    _check(tasks, files, options)
    items = _items(tasks, files, options)
    if files:
        tasks.append(ITEMS)
    output: Path | None = options.rescore or options.output
    if names and output is None:
        output = Path("runs/evaluation") / Path(options.model).name
    with TemporaryDirectory() if output is None else nullcontext(output) as place:
        folder = Path(place)
        for asks_chat_model in (True, False):
            alike = [task for task in tasks if bool(task.prompt) is asks_chat_model]
            _run(sorted(alike, key=lambda task: task.family == "skills"), items, folder, options)
        _judge(folder, tasks, options)
        rows, unfinished = scores.finished(
            folder, [ITEMS.name, *SUITES, *(name for name in TASKS if name not in SUITES)]
        )
        for reason in unfinished:
            print(f"not in the table: {reason}", file=sys.stderr)
        before = {} if output is None else report.read_report(output)
        kept = {key: value for key, value in before.items() if key not in ("skills", "tasks")}
        figures = {**kept, "machine": report.machine(), **rows}
        print(report.tables(figures))
        if output is not None:
            report.write_report(output, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mico-chat evaluate",
        description="Evaluate a model on tasks of the paper's tables, on a suite, or on files of "
        "items.",
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="TASK|SUITE|ITEMS", help="tasks, suites, JSONL files of items")
    add("--list", action="store_true", help="list tasks and suites, and end")
    add("--model", default="mini", help="a folder, a hub name, mini; with --base-url")
    add("--limit", type=count, default=0, help="items a task or skill at most")
    add("--batch-size", type=positive, default=32, help="media, or requests, at the same time")
    add("--output", type=Path, help="folder for results.json, table.md, charts")
    add("--dtype", choices=DTYPES, help="of a task's encoder: float32")
    add("--rescore", type=Path, metavar="DIR", help="compute the figures of an output folder anew")
    add("--compare", type=Path, nargs=2, metavar="DIR", help="two output folders side by side")
    add = parser.add_argument_group("tasks").add_argument
    add("--data", help="folder of the data sets, data by default; of own-*: file, folder, pattern")
    add("--names", help="of own-classification: cat,dog, or a file with a name a line")
    add("--device", help="cpu, cuda, cuda:1; the best by default")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="decoders")
    add("--frames", type=positive, help="of a video, and not the task's")
    add("--slices", type=count, help="of a sound, and not the task's")
    add = parser.add_argument_group("suites and items").add_argument
    add("--controls", nargs="+", choices=CONTROLS, help="all but base-llm by default")
    add("--skills", nargs="+", help="of these skills alone")
    add = parser.add_argument_group("a chat model in this process").add_argument
    add(
        "--engine",
        choices=NAMES,
        help=f"what runs it; {reference('chat')}, or {reference('gguf')} for GGUF",
    )
    add("--quantization", help=QUANTIZATION_HELP)
    add("--load-in-4bit", action="store_true", help="--quantization nf4")
    add("--load-in-8bit", action="store_true", help="--quantization int8")
    add("--mmproj", type=Path, metavar="FILE", help="the media projector of a GGUF model")
    add("--trust-remote-code", action="store_true", help="run Python code of the model's folder")
    add("--as-served", action="store_true", help="with the folder's system prompt and options")
    add = parser.add_argument_group("a chat model behind an OpenAI-compatible URL").add_argument
    add("--base-url", metavar="URL", help="http://127.0.0.1:8000/v1")
    add("--api-key-env", metavar="NAME", help=f"variable with its key; {DEFAULT_KEY} by default")
    add("--video-as-frames", type=positive, metavar="N", help="send N stills in a video's place")
    add("--audio-as-wav", action="store_true", help="send WAV where a sound is not WAV or MP3")
    add = parser.add_argument_group("answers of chat models").add_argument
    add("--max-tokens", type=positive, help="of an answer; by default the task's")
    add = parser.add_argument_group("the judge of video questions").add_argument
    add("--judge-model", metavar="NAME", help="any chat model")
    add("--judge-url", metavar="URL", help="up to /v1; OpenAI's by default")
    add("--judge-api-key-env", metavar="NAME", help="variable with its key")
    return parser


def _listing() -> str:
    rows = [("TASK", "PAPER", "", "DATA")]
    for name, task in TASKS.items():
        dataset = DATASETS[task.dataset]
        place = ", ".join(dataset.tree) if name in SUITES else dataset.folder
        place = "--data" if task.dataset == "own" else place
        figure, where = "-", ""
        if task.paper is not None:
            figure, where = f"{task.paper.figure:.1f}", f"{task.metrics[0]}, {task.paper.place}"
        rows.append((name, figure, where, place))
    return in_columns(rows)


def _check(tasks: Sequence[Task], files: Sequence[Path], options: argparse.Namespace) -> None:
    """Refuse options that do not fit each other, the tasks or the kind of model."""
    asked_quantization(options.quantization, options.load_in_4bit, options.load_in_8bit)
    over_url = options.base_url is not None
    for name in IN_PROCESS if over_url else ENDPOINT:
        if getattr(options, name) not in (None, False):
            why = "an endpoint; --base-url names one"
            if over_url:
                why = "a model in this process; --base-url names another"
            raise ConfigError(f"--{name.replace('_', '-')} is for {why}")
    if not (files or tasks or options.rescore):
        raise ConfigError("name a task or a file of items; mico-chat evaluate --list names tasks")
    if options.rescore and (files or tasks):
        raise ConfigError("--rescore computes the figures of a folder anew: name nothing else")
    if options.judge_model is None and (options.judge_url or options.judge_api_key_env):
        raise ConfigError("--judge-url and --judge-api-key-env go with --judge-model")
    for task in tasks:
        if over_url and not task.prompt:
            raise ConfigError(f"{task.name} looks into a pretraining model, not behind --base-url")
        if options.slices is not None and task.prompt and task.name not in SUITES:
            raise ConfigError(
                f"--slices is not for {task.name}: a chat model decides its slices itself"
            )
        if task.dataset == "own" and options.data is None:
            raise ConfigError(f"{task.name} needs --data: a file, a folder or a pattern")
    options.data = options.data or "data"
    if files or any(task.name in SUITES and task.prompt for task in tasks):
        _check_controls(options)
    _check_data(tasks, Path(options.data))


def _check_controls(options: argparse.Namespace) -> None:
    """Take all controls of the model but ``base-llm`` unless the command line names some."""
    there: tuple[str, ...] = CONTROLS
    why = ""
    if options.base_url is not None:
        there, why = MEDIA_CONTROLS, "needs the model in this process; over --base-url"
    elif Source.of(options.model, options.mmproj).form != "chat":
        there, why = MEDIA_CONTROLS, f"is of parts of MiCo-Chat, but for {options.model}"
    if options.controls is None:
        options.controls = [control for control in there if control != "base-llm"]
    if unknown := [control for control in options.controls if control not in there]:
        raise ConfigError(f"the control {', '.join(unknown)} {why} there are {', '.join(there)}")
    if "base-llm" in options.controls:
        chat_models.check_base_llm(options.model)


def _check_data(tasks: Sequence[Task], data: Path) -> None:
    """Refuse missing data sets; standard error shows the layouts that they need."""
    reasons = []
    for name in dict.fromkeys(task.dataset for task in tasks):
        dataset = DATASETS[name]
        if not (missing := dataset.missing(data)):
            continue
        if dataset.command:
            files = ", ".join(f"{data / part} ({dataset.tree[part]})" for part in missing)
            reasons.append(
                f"{name} needs {files}; in a checkout, `{dataset.command.format(data=data)}` "
                "makes them without the training shards"
            )
        else:
            print(f"{name} needs these files:\n{dataset.layout(data)}\n", file=sys.stderr)
            reasons.append(f"{dataset.folder}/ lacks {', '.join(missing)}")
    if reasons:
        why = f"{'; '.join(reasons)} (--data names the folder of the data sets)"
        raise DataError(data, None, why)


def _items(
    tasks: Sequence[Task], files: Sequence[Path], options: argparse.Namespace
) -> dict[str, Contents]:
    found = {}
    for task in tasks:
        if task.name in SUITES:
            whole = _contents(task, options)
            for id, reason in whole.broken[:1]:
                n = len(whole.broken)
                print(f"{task.name}: {n} items are left out; {id}: {reason}", file=sys.stderr)
            used = [i for i in whole.items if not task.skills or i.skill in task.skills]
            found[task.name] = (used, Path(options.data))
    if files:
        found[ITEMS.name] = ([item for path in files for item in table.read_items(path)], files[0])
    return {
        name: Contents(table.of_skills(items, options.skills or (), path)).first(options.limit)
        for name, (items, path) in found.items()
    }


def _contents(task: Task, options: argparse.Namespace) -> Contents:
    if task.dataset not in OWN:
        return DATASETS[task.dataset].read(Path(options.data))
    check_extra("train", task.name, own)
    place = f"{options.data}/shards/validation-*.tar" if task.dataset == "world" else options.data
    return own.own_items(task, place, options.names or "")


def _run(
    tasks: Sequence[Task], items: dict[str, Contents], output: Path, options: argparse.Namespace
) -> None:
    """Ask a model the items of tasks that all ask a chat model, or that all ask stage 1's model."""
    if not tasks:
        return
    own = {name: getattr(options, name) for name in ("frames", "slices")}
    own = {name: value for name, value in own.items() if value is not None}
    with closing(open_model(options, chat=bool(tasks[0].prompt))) as model:
        for task in tasks:
            contents = items.get(task.name)
            if contents is None:
                contents = _contents(task, options).first(options.limit)
            controls = options.controls or task.controls
            if task.family != "skills":
                controls = [c for c in task.controls if c in controls] or task.controls
            if task.family == "skills" and not task.prompt:  # stage 1's model reads a medium
                controls = ("full", "swapped")
            asking.run(
                task if task.prompt else task.model_copy(update=own),
                contents,
                model,
                output / task.name,
                controls,
                limit=options.limit,
                max_tokens=options.max_tokens,
            )


def open_model(options: argparse.Namespace, chat: bool) -> Model:
    size, workers = options.batch_size, options.workers
    if options.base_url is not None:
        key, frames = key_of(options.api_key_env), options.video_as_frames
        media = {"video_as_frames": frames, "audio_as_wav": options.audio_as_wav}
        return Endpoint(
            options.model, options.base_url, key, concurrency=size, workers=workers, **media
        )
    if not chat:
        dtype = options.dtype or "float32"
        return pretrained.PretrainedModel(
            options.model, dtype, options.device, batch_size=size, workers=workers
        )
    source = Source.of(options.model, options.mmproj)
    if source.config.get("model_type") == "mico":
        raise ConfigError(f"{options.model} is a stage 1 model: take the task without -chat")
    engine = EngineOptions(
        options.engine or reference(source.form),
        asked_quantization(options.quantization, options.load_in_4bit, options.load_in_8bit),
        options.dtype,
        options.device,
        max_running=size,
        trust_remote_code=options.trust_remote_code,
        mmproj=options.mmproj,
        chat_defaults=options.as_served,
    )
    return chat_models.ChatModel(options.model, engine, frames=options.frames, workers=workers)


def _judge(output: Path, tasks: Sequence[Task], options: argparse.Namespace) -> None:
    if options.judge_model is None:
        return
    named = [task.name for task in (TASKS.values() if options.rescore else tasks) if task.judged]
    there = [output / name for name in named if scores.is_finished(output / name)]
    if not there:
        raise ConfigError(f"--judge-model: no answers for a judge in {output}")
    key = key_of(options.judge_api_key_env, "--judge-api-key-env")
    model, url, size = options.judge_model, options.judge_url, options.batch_size
    with closing(Endpoint(model, url, key, concurrency=size)) as endpoint:
        for folder in there:
            judge.judge_answers(folder, endpoint)

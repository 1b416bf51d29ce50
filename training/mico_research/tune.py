"""``mico-chat tune``: a person's corrections become an adapter, or the model stays as it is.

Some media are held out. Stage 3 goes on with the model on the lines about the others, between drawn
shapes and, where the model has names, simulated ones, which keep its other answers. The tuned model
is written only if it is right more often about what was held out, and elsewhere no worse.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from mico_chat.checkpoints.folders import check_new, whole_folder
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.table import reference
from mico_chat.errors import DataError, TrainingError
from mico_chat.evaluation import run, scores
from mico_chat.evaluation.chat import ChatModel
from mico_chat.evaluation.task import ITEMS, Contents, Item, read_items, task_named
from mico_training import stages
from mico_training.build_model import chat_config
from mico_training.data import own, starter
from mico_training.data.sources.contents import contents
from mico_training.recipe import ModelRecipe, Stage3Run, load_recipe
from mico_world import build

LEAST, LEAST_HELD = 12, 3  # the lines are about so many media, and so many are held out
TIMES, SHARE = 20, 0.6  # a line is drawn about so often; so large a share of all draws are lines
DRAWN, WORSE = 60, 0.02  # questions about shapes; the share of the guard's that may get worse
TEXT = Path(run.__file__).with_name("text.jsonl")
KINDS = ("single", "colour", "count", "pair")
SHAPES = {"train": dict.fromkeys(KINDS, 24), "validation": dict.fromkeys(KINDS, 8)}


def tune(data: Sequence[Path], model: str, output: Path, *, keep: bool = False) -> list[str]:
    """Write the tuned model to ``output``; returns the figures before and after, in lines.

    ``data`` are files with questions and answers that training reads. The run lies in
    ``OUTPUT.tune``, where the same command goes on; at the end it goes, unless it is to ``keep``.

    A TrainingError: the tuned model is not better, or worse elsewhere. Nothing is written.
    """
    check_new(output)
    task, work = task_named("own-questions-chat"), Path(f"{output}.tune")
    given = [item for path in data for item in own.own_items(task, str(path)).items]
    trained, held = split(given)
    work.mkdir(parents=True, exist_ok=True)
    (work / "train.jsonl").write_text("".join(map(_line, trained)), "utf-8")
    if not (work / "world" / "world.json").is_file():
        build.main({"things": "shapes", **SHAPES}, work / "world", 1, 0)
    shapes = own.own_items(task, str(work / "world" / "validation-*.tar")).items
    drawn = Random(0).sample(shapes, min(DRAWN, len(shapes)))
    asked = {"held out": held, "elsewhere": [*drawn, *read_items(TEXT)]}
    before = _measured(model, asked, work / "before")
    stages.train_stage3(*_recipe(work, model, len(trained)))
    after = _measured(str(work / "trained"), asked, work / "after")
    figures, fault = zip(asked.items(), before, after, strict=True), ""
    found = [f"{n}: {was} of {len(of)} right before, {now} after" for (n, of), was, now in figures]
    if after[0] <= before[0]:
        fault = "it is not better at what was held out: give more media for each of the answers"
    elif after[1] < before[1] - WORSE * len(asked["elsewhere"]):
        fault = "it is worse elsewhere: give more answers of other kinds, or fewer lines"
    else:
        with whole_folder(output) as written:
            of_run = shutil.ignore_patterns("checkpoint-*", "*.jsonl", "recipe.json")
            shutil.copytree(work / "trained", written, ignore=of_run, dirs_exist_ok=True)
    if not keep:
        shutil.rmtree(work)
    if fault:
        raise TrainingError(f"{'; '.join(found)}. {output} is not written, as {fault}", 1)
    return found


def _line(item: Item) -> str:
    said = {"user": item.question, "assistant": item.answers[0]}
    line: dict[str, Any] = {"messages": [{"role": r, "content": t} for r, t in said.items()]}
    for one in item.media:
        place = str(one.source.absolute()) if isinstance(one.source, Path) else one.name
        line.setdefault(one.kind, []).append(place)
    return json.dumps(line) + "\n"


def split(items: Sequence[Item], seed: int = 0) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those held out; all items of a medium are on one side.

    Of the media with one answer a quarter is held out, or one of two; where these are few, others.
    """
    over: dict[str, str] = {}  # a medium -> another one beside which an item shows it

    def first(medium: str) -> str:
        while over.setdefault(medium, medium) != medium:
            medium = over[medium]
        return medium

    groups: dict[str, list[Item]] = defaultdict(list)
    media = [[sha256(m.read()).hexdigest() for m in item.media] or [item.id] for item in items]
    for shown in media:
        for medium in shown:
            over[first(medium)] = first(shown[0])
    for item, shown in zip(items, media, strict=True):
        groups[first(shown[0])].append(item)
    if len(groups) < LEAST:
        said = f"the lines are about {len(groups)} media, and {LEAST} or more are needed"
        raise DataError("tune", None, f"{said}: to learn from some, and to measure with others")
    order = Random(seed).sample(list(groups.values()), len(groups))
    alike: dict[str, list[list[Item]]] = defaultdict(list)
    for group in order:
        alike[f"{group[0].question} {group[0].answers[0]}".casefold()].append(group)
    held = {id(group) for of in alike.values() for group in of[: len(of) // 4 or len(of) > 1]}
    others = [id(group) for group in order if id(group) not in held]
    held.update(others[: max(0, LEAST_HELD - len(held))])
    sides: tuple[list[Item], list[Item]] = ([], [])
    for group in order:
        sides[id(group) in held].extend(group)
    return sides


def _measured(model: str, asked: Mapping[str, Sequence[Item]], folder: Path) -> list[int]:
    """How many answers are right of each group of items."""
    with closing(ChatModel(model, EngineOptions(reference("chat"), max_running=8))) as opened:
        for name, items in asked.items():
            task = ITEMS.model_copy(update={"name": f"{name}, {folder.name}"})
            run.run(task, Contents(list(items)), opened, folder / name)
    return [sum(one["right"] for one in scores.answers(folder / name)) for name in asked]


def _recipe(work: Path, model: str, n: int) -> tuple[Path, list[str]]:
    """The recipe that ``train init`` writes for this machine, and what tuning sets in it."""
    file, lines = work / "recipe.yaml", str(work / "train.jsonl")
    file.write_text(starter.starter(3, contents(lines), model), "utf-8")
    train = load_recipe(Stage3Run, file).train
    steps = -(-round(n * TIMES / SHARE) // (train.batch_size * train.accumulation))
    shapes = {"path": str(work / "world" / "train-*.tar"), "ratio": 1 - SHARE}
    values: dict[str, Any] = {
        "output": str(work / "trained"),
        "data": [{"path": lines, "ratio": SHARE}, shapes],
        **{"train.steps": steps, "train.warmup_steps": -(-steps // 10), "train.lr": 1e-3},
        **{"train.log_steps": 5, "train.save_steps": 5, "train.report_to": ["none"]},
    }
    if chat_config(ModelRecipe(name=model)).concept_config is not None:
        values |= {"stage3.simulate": 0.3, "train.drop": {"names": 0.2}}
    return file, [f"{key}={json.dumps(value)}" for key, value in values.items()]

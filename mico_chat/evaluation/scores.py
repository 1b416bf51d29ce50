"""The figures of a task from its stored records alone: no model and no data set is needed.

:func:`score` gives the row that ``results.json`` has for a task. A row of a task of skills has, by
skill, ``n``, ``digest``, ``chance`` (of picking evenly among an item's choices; an item without
choices counts as nothing, and ``chance`` is None where no item has any) and by control ``accuracy``
with the ends ``low`` and ``high`` of its Wilson interval, ``n`` answers, and how many items were
``refused`` or ``broken``. A row of any other task has ``figures`` by metric in per cent (captions:
times 100), as the paper has them; ``missing`` metrics and why; the counts of ``items``, of those
``broken`` and ``refused``, which no figure counts, and of answers ``unjudged``; and the ``judge``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import binomtest

from mico_chat.errors import DataError, MicoError
from mico_chat.evaluation.judge import read_verdicts
from mico_chat.evaluation.metrics import Score
from mico_chat.evaluation.metrics.answers import (
    Rule,
    clotho_aqa,
    exact_match,
    is_right,
    position,
    vqa_accuracy,
)
from mico_chat.evaluation.metrics.captions import cider, spider
from mico_chat.evaluation.metrics.recall import contrasted, recall_at_k, rerank
from mico_chat.evaluation.model import CONTROLS
from mico_chat.evaluation.retrieval import vector_of
from mico_chat.evaluation.store import PREDICTIONS, Record, UnfinishedError, read_store
from mico_chat.evaluation.task import TASKS, Task, task_named

NAMED = 20
"""Items without a figure that a row names; the kept files have all of them."""
CONFIDENCE = 0.95
CAPTION_METRICS = {"CIDEr": cider, "SPIDEr": spider}

Row = dict[str, Any]
_Figures = tuple[dict[str, float], dict[str, str]]
"""Figures by metric, and the reason for each metric that could not be computed."""


def score(folder: Path) -> Row:
    header, records = read_store(folder)
    if not any(record["kind"] == "done" for record in records):
        raise UnfinishedError(folder)
    if "skills" in header:
        return _skills_row(header, records)
    return _task_row(folder, task_named(str(header.get("task"))), header, records)


def _seconds(records: Sequence[Record]) -> float:
    return round(sum(float(record.get("seconds", 0)) for record in records), 1)


# --- skills -------------------------------------------------------------------------------------


def _skills_row(header: Record, records: Sequence[Record]) -> Row:
    finished = {r["control"] for r in records if r["kind"] == "done"}
    controls = [control for control in CONTROLS if control in finished]
    of: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "number" in record:
            of[record["skill"], record["control"]].append(record)
    rows = {}
    for skill, about in header["skills"].items():
        figures = {c: _accuracies(of[skill, c]) for c in controls if of[skill, c]}
        rows[skill] = {**about, "chance": _chance(of[skill, controls[0]]), "controls": figures}
    return {
        "model": header["model"],
        "digest": header["digest"],
        "controls": controls,
        "skills": rows,
        "refused": _without_answer(records, "refused"),
        "broken": _without_answer(records, "broken"),
        "seconds": _seconds(records),
        "run": header,
    }


def answers(folder: Path) -> list[Record]:
    """Every kept answer of a task of skills with ``right``, for people to read."""
    found = [record for record in read_store(folder)[1] if record["kind"] == "answer"]
    return [{**record, "right": _right(record)} for record in found]


def _right(record: Record) -> bool:
    return is_right(record["answer"], record["accept"], record["choices"])


def _accuracies(records: Sequence[Record]) -> Row:
    said = [record for record in records if record["kind"] == "answer"]
    right = sum(map(_right, said))
    row: Row = {"n": len(said)}
    row |= {kind: sum(r["kind"] == kind for r in records) for kind in ("refused", "broken")}
    if not said:
        return {"accuracy": None, "low": None, "high": None, **row}
    interval = binomtest(right, len(said)).proportion_ci(CONFIDENCE, "wilson")
    low, high = float(interval.low), float(interval.high)
    return {"accuracy": right / len(said), "low": low, "high": high, **row}


def _chance(records: Sequence[Record]) -> float | None:
    """The mean share of an item's choices that are right; None if no item has choices."""
    said = [record for record in records if record["kind"] == "answer"]
    shares = [
        sum(any(position(c, a) is not None for a in record["accept"]) for c in record["choices"])
        / len(record["choices"])
        for record in said
        if record["choices"]
    ]
    return sum(shares) / len(said) if shares else None


def _without_answer(records: Sequence[Record], kind: str) -> Row:
    found = [record for record in records if record["kind"] == kind]
    found.sort(key=lambda record: (CONTROLS.index(record["control"]), record["number"]))
    first = [f"{r['id']} ({r['control']}): {r['reason']}" for r in found[:NAMED]]
    return {"count": len(found), "first": first}


# --- all other tasks ----------------------------------------------------------------------------


def _task_row(folder: Path, task: Task, header: Record, records: Sequence[Record]) -> Row:
    of: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of[record["kind"]].append(record)
    kind = {"retrieval": "medium", "captioning": "caption"}.get(task.family, "answer")
    counted = of[kind]
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    unjudged: list[tuple[str, str]] = []
    judge: str | None = None
    if not counted and not of["refused"]:
        raise DataError(folder / PREDICTIONS, None, "no item could be used")
    if not counted:
        missing = dict.fromkeys(task.metrics, "the model refused every item")
    elif task.family == "retrieval":
        figures = _recalls(counted, of["text"], of["matches"])
    elif task.family == "captioning":
        figures, missing = _captions(task, counted)
    elif task.judged:
        try:
            figures, unjudged, judge = _judged(folder, counted)
        except DataError as error:
            missing = dict.fromkeys(task.metrics, str(error))
        else:
            if not figures:
                why = "no answer was judged" if judge else _no_judge(folder)
                missing = dict.fromkeys(task.metrics, why)
    elif task.dataset == "clotho-aqa":
        figures, missing = _by_rules(task, counted)
    else:
        figures = {"accuracy": 100 * _accuracy(task, counted)}
    left_out = {name: [(r["id"], r["reason"]) for r in of[name]] for name in ("broken", "refused")}
    first = task.metrics[0]
    return {
        "model": header["model"],
        "metric": first,
        "figure": figures.get(first),
        "paper": None if task.paper is None else task.paper.model_dump(),
        "figures": {name: figures[name] for name in task.metrics if name in figures},
        "missing": missing,
        "items": len(counted),
        **_counted("broken", left_out["broken"]),
        **_counted("refused", left_out["refused"]),
        **_counted("unjudged", unjudged),
        "judge": judge,
        "seconds": _seconds(records),
        "protocol": _protocol(task, header, judge),
        "run": header,
    }


def _counted(kind: str, items: Sequence[tuple[str, str]]) -> Row:
    return {
        kind: len(items),
        f"{kind}_first": [f"{id}: {reason}" for id, reason in items[:NAMED]],
    }


def _protocol(task: Task, header: Record, judge: str | None) -> str:
    """The settings of a figure, and how they differ from the paper's."""
    parts = [task.protocol]
    if task.prompt:
        parts += [header["how"], f"at most {header['max_tokens']} tokens"]
        parts += [f"the judge is {judge}"] if judge else []
    else:
        for what, wanted in (("frames", task.frames), ("slices", task.slices)):
            if header[what] != wanted:
                parts.append(f"{header[what]} {what} instead of {wanted}")
            elif wanted > 1 or (what == "slices" and wanted):
                parts.append(f"{wanted} {what}" + (" of sound" if what == "slices" else ""))
        size = f"{header['resolution']} px"
        if task.paper is not None and header["resolution"] != task.resolution:
            size += f" (the paper's model has {task.resolution})"
        parts.append(size)
    if header["limit"]:
        parts.append(f"only the first {header['limit']} items")
    return "; ".join(parts)


def _each(metrics: Sequence[str], compute: Callable[[str], Score]) -> _Figures:
    """Each metric times 100, or the reason why it cannot be computed."""
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in metrics:
        try:
            figures[name] = 100 * compute(name).mean
        except MicoError as error:  # such as a missing program of the metric's
            missing[name] = str(error)
    return figures, missing


def _captions(task: Task, records: Sequence[Record]) -> _Figures:
    candidates = {str(r["id"]): str(r["caption"]) for r in records}
    references = {str(r["id"]): list(r["references"]) for r in records}
    return _each(task.metrics, lambda name: CAPTION_METRICS[name](candidates, references))


def _accuracy(task: Task, records: Sequence[Record]) -> float:
    right = 0.0
    for record in records:
        answer, truths = str(record["answer"]), [str(text) for text in record["references"]]
        if task.dataset == "vqav2":
            right += vqa_accuracy(answer, truths)
        else:
            right += any(exact_match(answer, truth) for truth in truths)
    return right / len(records)


def _by_rules(task: Task, records: Sequence[Record]) -> _Figures:
    """ClothoAQA's accuracy by each of its rules; the row's figure is that of ``each``."""
    given = {str(r["id"]): str(r["answer"]) for r in records}
    humans = {str(r["id"]): [str(text) for text in r["references"]] for r in records}

    def by_rule(name: str) -> Score:
        rule = name.removeprefix("accuracy").strip() or "each"
        return clotho_aqa(given, humans, cast(Rule, rule))

    return _each(task.metrics, by_rule)


def _judged(
    folder: Path, records: Sequence[Record]
) -> tuple[dict[str, float], list[tuple[str, str]], str | None]:
    """Accuracy in per cent and score of 0 to 5, answers without a verdict, and the judge's name."""
    header, verdicts = read_verdicts(folder, records)
    if not verdicts:
        return {}, [], None
    right = {id: said.right for id, said in verdicts.items() if not isinstance(said, str)}
    points = {id: said.score for id, said in verdicts.items() if not isinstance(said, str)}
    unjudged = [(id, said) for id, said in verdicts.items() if isinstance(said, str)]
    if not right:
        return {}, unjudged, str(header["judge"])
    accuracy, mean = (Score.over(each, "judged answers").mean for each in (right, points))
    return {"accuracy": 100 * accuracy, "score": mean}, unjudged, str(header["judge"])


def _no_judge(folder: Path) -> str:
    command = f"mico-chat evaluate --rescore {folder.parent} --judge-url URL --judge-model NAME"
    return (
        "no judge has rated the answers yet; the answers are kept, so a judge can "
        f"still rate them: {command}"
    )


def _recalls(
    media: Sequence[Record], texts: Sequence[Record], matches: Sequence[Record]
) -> dict[str, float]:
    """R@k in per cent, both ways, with and without the matching head."""
    media = sorted(media, key=lambda record: int(record["number"]))
    number = {str(record["id"]): place for place, record in enumerate(media)}
    texts = sorted(texts, key=lambda record: int(record["text"]))
    m = torch.from_numpy(np.stack([vector_of(record) for record in media]))
    t = torch.from_numpy(np.stack([vector_of(record) for record in texts]))
    media_of_text = [{number[str(id)] for id in record["media"]} for record in texts]
    texts_of_medium: list[set[int]] = [set() for _ in media]
    for text, right in enumerate(media_of_text):
        for medium in right:
            texts_of_medium[medium].add(text)
    by_medium: dict[int, dict[int, float]] = {
        number[str(r["id"])]: dict(zip(r["texts"], r["logits"], strict=True)) for r in matches
    }
    by_text: dict[int, dict[int, float]] = defaultdict(dict)
    for medium, logits in by_medium.items():
        for text, logit in logits.items():
            by_text[text][medium] = logit
    found: dict[str, float] = {}
    for direction, queries, candidates, relevant, of_query in (
        ("", t, m, media_of_text, by_text),
        (" to text", m, t, texts_of_medium, by_medium),
    ):
        for scores, reranking in (("", True), (" contrastive", False)):
            names = {k: f"R@{k}{direction}{scores}" for k in (1, 5, 10)}
            found |= dict.fromkeys(names.values(), 0.0)
            for start, rows, top in contrasted(queries, candidates):
                if reranking:
                    rerank(rows, top, [of_query.get(start + row, {}) for row in range(len(rows))])
                recalls = recall_at_k(rows, relevant[start : start + len(rows)], tuple(names))
                for k, name in names.items():
                    found[name] += 100 * recalls[k] * len(rows) / len(queries)
    return found


def is_finished(folder: Path) -> bool:
    if not (folder / PREDICTIONS).is_file():
        return False
    return any(record["kind"] == "done" for record in read_store(folder)[1])


def finished(output: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Row]], list[str]]:
    """``skills`` and ``tasks`` of ``results.json``, and the reason for each unfinished task."""
    rows: dict[str, dict[str, Row]] = {"skills": {}, "tasks": {}}
    unfinished = []
    for name in names:
        if (output / name / PREDICTIONS).is_file():
            kind = "skills" if name not in TASKS or TASKS[name].family == "skills" else "tasks"
            try:
                rows[kind][name] = score(output / name)
            except UnfinishedError as error:
                unfinished.append(str(error))
    if not any(rows.values()):
        nothing = DataError(output, None, f"no TASK/{PREDICTIONS} in it")
        raise DataError(output, None, unfinished[0]) if unfinished else nothing
    return {kind: of_kind for kind, of_kind in rows.items() if of_kind}, unfinished

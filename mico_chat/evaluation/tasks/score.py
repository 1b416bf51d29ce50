"""A task's figures, from its stored predictions alone: no model and no data set is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mico_chat.errors import DataError, MicoError
from mico_chat.evaluation.metrics.captions import cider, spider
from mico_chat.evaluation.metrics.clotho_aqa import Rule, clotho_aqa
from mico_chat.evaluation.metrics.judge import Unjudged, judgement
from mico_chat.evaluation.metrics.retrieval import recall_at_k
from mico_chat.evaluation.metrics.vqa import exact_match, vqa_accuracy
from mico_chat.evaluation.tasks.predict import contrasted, vector_of
from mico_chat.evaluation.tasks.store import PREDICTIONS, Record, read_store
from mico_chat.evaluation.tasks.table import task_named
from mico_chat.evaluation.tasks.task import Broken, Task
from mico_chat.evaluation.tasks.verdicts import read_verdicts

CAPTION_METRICS = {"CIDEr": cider, "SPIDEr": spider}

ABOVE = 3.0
"""More than any cosine."""


class UnfinishedError(DataError):
    """Predictions of a run that was ended before its last item."""


@dataclass(frozen=True)
class Result:
    """One row: ``figures`` by metric in per cent (captions: times 100), as the paper has them.

    ``missing``: metrics that could not be computed, and why. ``items``: media of a retrieval and
    of captions, questions; those in ``broken`` are not among them, and those that a chat model
    ``refused``. ``unjudged``: answers without a verdict, which no figure counts; ``judge``: whose
    verdicts they are. ``header``: what was run.
    """

    task: Task
    figures: dict[str, float]
    missing: dict[str, str]
    items: int
    broken: tuple[Broken, ...]
    seconds: float
    header: Record
    refused: tuple[Broken, ...] = ()
    unjudged: tuple[Broken, ...] = ()
    judge: str | None = None


def is_finished(folder: Path) -> bool:
    """Whether a folder has the predictions of a run that has reached its end."""
    if not (folder / PREDICTIONS).is_file():
        return False
    return any(record["kind"] == "done" for record in read_store(folder)[1])


def score(folder: Path) -> Result:
    """The figures of a folder's predictions.

    Raises:
        UnfinishedError: the run has not finished.
        DataError: there are no predictions, or they are damaged.
    """
    header, records = read_store(folder)
    task = task_named(str(header.get("task")))
    if not any(record["kind"] == "done" for record in records):
        raise UnfinishedError(
            folder / PREDICTIONS,
            None,
            "the run has not finished; run the same command again to continue it",
        )
    of = {kind: [r for r in records if r["kind"] == kind] for kind in _KINDS}
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    unjudged: tuple[Broken, ...] = ()
    judge: str | None = None
    counted = of[_COUNTED[task.family]]
    if not counted and not of["refused"]:
        raise DataError(folder / PREDICTIONS, None, "no item could be used")
    if not counted:
        missing = dict.fromkeys(task.metrics, "the model refused every item")
    elif task.family == "retrieval":
        figures = _recalls(of["medium"], of["text"], of["matches"])
    elif task.family == "captioning":
        figures, missing = _captions(task, counted)
    elif task.judged:
        figures, missing, unjudged, judge = _judged(task, folder, counted)
    elif task.dataset == "clotho-aqa":
        figures, missing = _by_rules(task, counted)
    else:
        figures = {"accuracy": 100 * _accuracy(task, counted)}
    return Result(
        task=task,
        figures={name: figures[name] for name in task.metrics if name in figures},
        missing=missing,
        items=len(counted),
        broken=_named(of["broken"]),
        seconds=round(sum(float(r.get("seconds", 0)) for r in records), 1),
        header=header,
        refused=_named(of["refused"]),
        unjudged=unjudged,
        judge=judge,
    )


def _named(records: Sequence[Record]) -> tuple[Broken, ...]:
    return tuple(Broken(str(r["id"]), str(r["reason"])) for r in records)


_KINDS = ("caption", "answer", "medium", "text", "matches", "broken", "refused")
_COUNTED = {"retrieval": "medium", "captioning": "caption", "qa": "answer"}


def _captions(task: Task, records: Sequence[Record]) -> tuple[dict[str, float], dict[str, str]]:
    candidates = {str(r["id"]): str(r["caption"]) for r in records}
    references = {str(r["id"]): list(r["references"]) for r in records}
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in task.metrics:
        try:
            figures[name] = 100 * CAPTION_METRICS[name](candidates, references).mean
        except MicoError as error:  # such as a program of the metric's that is not there
            missing[name] = str(error)
    return figures, missing


def _accuracy(task: Task, records: Sequence[Record]) -> float:
    right = 0.0
    for record in records:
        answer, truths = str(record["answer"]), [str(text) for text in record["references"]]
        if task.dataset == "vqav2":
            right += vqa_accuracy(answer, truths)
        else:
            right += any(exact_match(answer, truth) for truth in truths)
    return right / len(records)


def _by_rules(task: Task, records: Sequence[Record]) -> tuple[dict[str, float], dict[str, str]]:
    """ClothoAQA's accuracy by each of its rules; the row's figure is that of ``each``."""
    answers = {str(r["id"]): str(r["answer"]) for r in records}
    humans = {str(r["id"]): [str(text) for text in r["references"]] for r in records}
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in task.metrics:
        rule = name.removeprefix("accuracy").strip() or "each"
        try:
            figures[name] = 100 * clotho_aqa(answers, humans, cast(Rule, rule)).mean
        except DataError as error:  # such as no question whose answers agree
            missing[name] = str(error)
    return figures, missing


def _judged(
    task: Task, folder: Path, records: Sequence[Record]
) -> tuple[dict[str, float], dict[str, str], tuple[Broken, ...], str | None]:
    """A judge's accuracy in per cent and its score of 0 to 5, what has none, and whose they are."""
    try:
        header, verdicts = read_verdicts(folder, records)
    except DataError as error:
        return {}, dict.fromkeys(task.metrics, str(error)), (), None
    if not verdicts:
        command = f"mico-chat evaluate --rescore {folder.parent} --judge-url URL --judge-model NAME"
        why = (
            "no judge has rated the answers yet; the answers are kept, so a judge can "
            f"still rate them: {command}"
        )
        return {}, dict.fromkeys(task.metrics, why), (), None
    left = {id: said for id, said in verdicts.items() if isinstance(said, Unjudged)}
    unjudged = tuple(Broken(id, said.reason) for id, said in left.items())
    judge = str(header["judge"])
    if len(left) == len(verdicts):
        return {}, dict.fromkeys(task.metrics, "no answer was judged"), unjudged, judge
    found = judgement(verdicts)
    figures = {"accuracy": 100 * found.accuracy.mean, "score": found.score.mean}
    return figures, {}, unjudged, judge


# --- retrieval ----------------------------------------------------------------------------------


def _recalls(
    media: Sequence[Record], texts: Sequence[Record], matches: Sequence[Record]
) -> dict[str, float]:
    """R@k in per cent, both ways, with and without the matching head."""
    media = sorted(media, key=lambda record: int(record["number"]))
    number = {str(record["id"]): place for place, record in enumerate(media)}
    texts = sorted(texts, key=lambda record: int(record["text"]))
    m = torch.from_numpy(np.stack([vector_of(record) for record in media]))
    t = torch.from_numpy(np.stack([vector_of(record) for record in texts]))
    right = [{number[str(id)] for id in record["media"]} for record in texts]
    told: list[set[int]] = [set() for _ in media]
    for text, of_it in enumerate(right):
        for medium in of_it:
            told[medium].add(text)
    by_medium: dict[int, dict[int, float]] = {
        number[str(r["id"])]: dict(zip(r["texts"], r["logits"], strict=True)) for r in matches
    }
    by_text: dict[int, dict[int, float]] = {}
    for medium, of_it_all in by_medium.items():
        for text, logit in of_it_all.items():
            by_text.setdefault(text, {})[medium] = logit
    found: dict[str, float] = {}
    for direction, queries, candidates, relevant, logits in (
        ("", t, m, right, by_text),
        (" to text", m, t, told, by_medium),
    ):
        for scores, reranking in (("", True), (" contrastive", False)):
            names = {k: f"R@{k}{direction}{scores}" for k in (1, 5, 10)}
            found |= dict.fromkeys(names.values(), 0.0)
            for start, rows, top in contrasted(queries, candidates):
                if reranking:
                    rerank(rows, top, [logits.get(start + row, {}) for row in range(len(rows))])
                recalls = recall_at_k(rows, relevant[start : start + len(rows)], tuple(names))
                for k, name in names.items():
                    found[name] += 100 * recalls[k] * len(rows) / len(queries)
    return found


def rerank(rows: Tensor, top: Tensor, logits: Sequence[Mapping[int, float]]) -> None:
    """Rank the top candidates (q, k) of scores (q, D) by their logits, in place.

    They stand above all others then. Of two with the same cosine at rank 50, one may have no logit:
    it stays where it is.
    """
    for row, chosen in enumerate(top.tolist()):
        known = [candidate for candidate in chosen if candidate in logits[row]]
        if known:
            values = torch.tensor([logits[row][c] for c in known], dtype=rows.dtype)
            rows[row, known] = ABOVE + values - values.min()

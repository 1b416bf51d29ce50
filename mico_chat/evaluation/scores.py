"""The figures of a task, computed from its stored records without the model and the data set.

``results.json`` has a row for each task. The row of a task of skills has for each skill its
``chance`` (the accuracy of a random choice) and, for each control, the ``accuracy`` with its Wilson
interval. If the answers have a confidence, ``confidence`` has the mark below which an answer is
unsure. The row of any other task has ``figures``: each metric times 100, as in the paper. Beside
each stands its interval, by a bootstrap over the items; on own data also the figure where each item
has the medium of another one (``swapped``) and that of a random order (``chance``).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import floor, fsum
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from mico_chat.checkpoints.marks import KINDS, kind_of
from mico_chat.errors import DataError, MicoError
from mico_chat.evaluation.datasets import datasets_in
from mico_chat.evaluation.judge import read_verdicts
from mico_chat.evaluation.metrics.answers import (
    BENCHMARKS,
    Rule,
    clotho_aqa,
    exact_match,
    is_right,
    position,
    vqa_accuracy,
    yes,
)
from mico_chat.evaluation.metrics.captions import cider, spider
from mico_chat.evaluation.retrieval import recalls, swapped
from mico_chat.evaluation.store import PREDICTIONS, Record, UnfinishedError, read_store
from mico_chat.evaluation.task import CONTROLS, OWN, Task, task_named

NAMED = 20
"""A row names at most so many broken, refused or unjudged items; the stored files name all."""
CONFIDENCE = 0.95
RIGHT = 85
"""The per cent of the answers at or above the mark that are right."""
N_BINS = 10
CAPTION_METRICS = {"CIDEr": cider, "SPIDEr": spider}

Row = dict[str, Any]


def score(folder: Path) -> Row:
    header, records = read_store(folder)
    if not _is_done(records):
        raise UnfinishedError(folder)
    if "skills" in header:
        return _skills_row(header, records)
    return _task_row(folder, task_named(str(header.get("task"))), header, records)


def _is_done(records: Sequence[Record]) -> bool:
    return any(record["kind"] == "done" for record in records)


def _seconds(records: Sequence[Record]) -> float:
    return round(sum(float(record.get("seconds", 0)) for record in records), 1)


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
    lost = {}
    for kind in ("refused", "broken"):
        found = [record for record in records if record["kind"] == kind]
        found.sort(key=lambda record: (CONTROLS.index(record["control"]), record["number"]))
        first = [f"{r['id']} ({r['control']}): {r['reason']}" for r in found[:NAMED]]
        lost[kind] = {"count": len(found), "first": first}
    return {
        "model": header["model"],
        "digest": header["digest"],
        "controls": controls,
        "skills": rows,
        "confidence": _confidence([r for r in records if r.get("control") == "full"]),
        **lost,
        "seconds": _seconds(records),
        "run": header,
    }


def answers(folder: Path) -> list[Record]:
    """The stored answers of a task of skills; ``right`` says whether an answer is right."""
    found = [record for record in read_store(folder)[1] if record["kind"] == "answer"]
    return [{**record, "right": _right(record)} for record in found]


def _right(record: Record) -> bool:
    rejected = record.get("reject", ())
    return is_right(record["answer"], record["accept"], record["choices"], rejected)


def _accuracies(records: Sequence[Record]) -> Row:
    said = [record for record in records if record["kind"] == "answer"]
    row: Row = {"n": len(said)}
    row |= {kind: sum(r["kind"] == kind for r in records) for kind in ("refused", "broken")}
    if not said:
        return {"accuracy": None, "low": None, "high": None, **row}
    right = sum(map(_right, said))
    interval = binomtest(right, len(said)).proportion_ci(CONFIDENCE, "wilson")
    low, high = float(interval.low), float(interval.high)
    return {"accuracy": right / len(said), "low": low, "high": high, **row}


def _confidence(records: Sequence[Record]) -> Row | None:
    """The mark, and how many answers are at or above it and right; None without confidences."""
    rated = [record for record in records if "confidence" in record]
    if not rated:
        return None
    mark = mark_of([(record["confidence"], _right(record)) for record in rated])

    def counts(some: Sequence[Record]) -> Row:
        kept = [r for r in some if mark is not None and r["confidence"] >= mark]
        figures = {"n": len(some), "right": sum(map(_right, some))}
        return {**figures, "kept": len(kept), "kept_right": sum(map(_right, kept))}

    of_skill: dict[str, list[Record]] = defaultdict(list)
    bins: list[list[bool]] = [[] for _ in range(N_BINS)]
    for record in rated:
        of_skill[record["skill"]].append(record)
        bins[min(int(N_BINS * record["confidence"]), N_BINS - 1)].append(_right(record))
    skills = {skill: counts(some) for skill, some in of_skill.items()}
    counted = [{"n": len(some), "right": sum(some)} for some in bins]
    answers = _of_kinds(rated)
    return {"mark": mark, **counts(rated), "skills": skills, "bins": counted, "answers": answers}


def _of_kinds(rated: Sequence[Record]) -> Row:
    """For each kind of answer its mark, and what the marks of other answers keep of it.

    The answers of every second item are judged by the marks of the others, and the other way round.
    """
    names = {pattern: name for name, pattern in KINDS.items()}
    rows: Row = {}
    halves: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for record in rated:
        two = halves[names[kind_of(record["answer"], names) or ""]]
        two[len(two[0]) > len(two[1])].append(record)

    def mark(some: Sequence[Record]) -> float | None:
        return mark_of([(record["confidence"], _right(record)) for record in some])

    for name in (name for name in KINDS if name in halves):
        first, second = halves[name]
        kept = [
            record
            for judged, others in ((first, second), (second, first))
            for record in judged
            if (least := mark(others)) is not None and record["confidence"] >= least
        ]
        figures = {"n": len(first + second), "right": sum(map(_right, first + second))}
        checked = {"kept": len(kept), "kept_right": sum(map(_right, kept))}
        rows[name] = {"mark": mark(first + second), **figures, **checked}
    return rows


def mark_of(rated: Sequence[tuple[float, bool]]) -> float | None:
    """The lowest mark at which RIGHT per cent of the answers at or above it are right.

    ``rated`` has each answer's confidence, and whether it is right. The mark has four decimals.
    It is None if there is no such mark.
    """

    def rounded_down(answer: tuple[float, bool]) -> float:
        return floor(10_000 * answer[0]) / 10_000

    mark, n, n_right = None, 0, 0
    for value, tied in groupby(sorted(rated, reverse=True), rounded_down):
        rights = [right for _, right in tied]
        n, n_right = n + len(rights), n_right + sum(rights)
        if 100 * n_right >= RIGHT * n:
            mark = value
    return mark


def _chance(records: Sequence[Record]) -> float | None:
    """The accuracy of a random choice; None if no item has choices."""
    said = [record for record in records if record["kind"] == "answer"]
    shares = [
        sum(any(position(c, a) is not None for a in record["accept"]) for c in record["choices"])
        / len(record["choices"])
        for record in said
        if record["choices"]
    ]
    return sum(shares) / len(said) if shares else None


class _Figures(NamedTuple):
    """Figures by metric, reasons of missing figures, and ids and reasons of unjudged answers."""

    figures: dict[str, float]
    missing: dict[str, str]
    unjudged: Sequence[tuple[str, str]] = ()
    judge: str | None = None
    beside: Mapping[str, Row] = {}


def interval(sums: NDArray[Any], counts: NDArray[Any]) -> list[float]:
    """The interval, in per cent, of a mean over N items with these sums and counts (N,), by 1,000
    draws of N items."""
    draw, asked = np.random.default_rng(0).integers, counts > 0
    sums, counts = sums[asked], counts[asked]
    picked = (draw(len(sums), size=len(sums)) for _ in range(1000))
    means = [sums[own].sum() / counts[own].sum() for own in picked]
    tail = (1 - CONFIDENCE) / 2
    return [100 * float(end) for end in np.quantile(means, [tail, 1 - tail])]


def _recalled(task: Task, records: Sequence[Record]) -> _Figures:
    each = recalls(records)
    beside: dict[str, Row] = {n: {"interval": interval(*of[:2])} for n, of in each.items()}
    if task.dataset in OWN:
        for name, (hits, queries, random) in recalls(records, swap=True).items():
            beside[name]["swapped"] = 100 * float(hits.sum() / queries.sum())
            beside[name]["chance"] = 100 * float(random.sum() / queries.sum())
    figures = {name: 100 * float(of[0].sum() / of[1].sum()) for name, of in each.items()}
    return _Figures(figures, {}, beside=beside)


def _task_row(folder: Path, task: Task, header: Record, records: Sequence[Record]) -> Row:
    of: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of[str(record.get("control", record["kind"]))].append(record)
    counted = of[{"retrieval": "medium", "captioning": "caption"}.get(task.family, "answer")]
    if not counted and not of["refused"]:
        raise DataError(folder / PREDICTIONS, None, "no item could be used")
    if not counted:
        found = _Figures({}, dict.fromkeys(task.metrics, "the model refused every item"))
    elif task.family == "retrieval":
        found = _recalled(task, records)
    elif task.judged:
        found = _judged(folder, task, counted)
    else:
        found = _by_people(task, counted)
        if blind := [record for record in of["withheld"] if record["kind"] == "answer"]:
            without = _by_people(task, blind).figures
            for name, row in found.beside.items():
                row["withheld"] = without.get(name)
    left_out = {kind: [(r["id"], r["reason"]) for r in of[kind]] for kind in ("broken", "refused")}
    lost: Row = {}
    for kind, items in {**left_out, "unjudged": found.unjudged}.items():
        first = [f"{id}: {reason}" for id, reason in items[:NAMED]]
        lost |= {kind: len(items), f"{kind}_first": first}
    return {
        "model": header["model"],
        "metric": task.metrics[0],
        "figure": found.figures.get(task.metrics[0]),
        "paper": None if task.paper is None else task.paper.model_dump(),
        "peers": {model: peer.model_dump() for model, peer in task.peers.items()},
        "figures": {name: found.figures[name] for name in task.metrics if name in found.figures},
        "beside": found.beside,
        "missing": found.missing,
        "items": len(counted),
        **lost,
        "judge": found.judge,
        "trained_on": _trained_on(task, header),
        "seconds": _seconds(records),
        "protocol": _protocol(task, header, found.judge),
        "run": header,
    }


def _trained_on(task: Task, header: Record) -> list[str] | None:
    """The stages and paths of the model's training that hold the task's data set; None: unknown."""
    known = [(e["stage"], path) for e in header.get("trained_on", ()) for path in e["data"] or ()]
    found = [f"{stage}: {path}" for stage, path in known if task.dataset in datasets_in(path)]
    whole = "trained_on" in header and all(e["data"] is not None for e in header["trained_on"])
    return found if found or (whole and task.dataset not in OWN) else None


def _protocol(task: Task, header: Record, judge: str | None) -> str:
    """The settings of a figure, and their differences from the paper's."""
    parts = [part for part in (task.protocol, task.how) if part]
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


def _of_benchmark(task: Task, name: str, records: Sequence[Record]) -> dict[str, float]:
    """The values of a public benchmark's metric, such as "accuracy: music", whose mean it is."""
    name, _, group = name.partition(": ")
    kept = [record for record in records if group in ("", record.get("skill"))]
    if name == "yes ratio":
        return {r["id"]: yes(r["answer"]) for r in kept}
    rule = BENCHMARKS[task.dataset]
    each = {r["id"]: float(rule(r["answer"], r["references"], r)) for r in kept}
    if name == "F1":  # 2 TP / (2 TP + FP + FN): what is rightly yes counts twice
        truly = {r["id"]: r["references"][0] == "yes" for r in kept}
        twice = {f"{id} again": right for id, right in each.items() if truly[id] and right}
        return {id: right for id, right in each.items() if truly[id] or not right} | twice
    if name == "CircularEval":  # right under all turns of the choices, whose ids differ by millions
        wrong = {int(id) % 10**6 for id, right in each.items() if not right}
        return {id: int(id) not in wrong for id in each if int(id) < 10**6}
    return each


def _by_people(task: Task, records: Sequence[Record]) -> _Figures:
    """Captions or answers compared with those of people, by each metric of the task."""
    said = {r["id"]: r["caption" if task.family == "captioning" else "answer"] for r in records}
    people = {r["id"]: r["references"] for r in records}

    def compute(name: str, people: Mapping[str, Sequence[str]]) -> dict[str, float]:
        if task.dataset in BENCHMARKS:
            return _of_benchmark(task, name, records)
        if name in CAPTION_METRICS:
            return CAPTION_METRICS[name](said, people)
        if task.dataset == "clotho-aqa":
            rule = name.removeprefix("accuracy").strip() or "each"
            return clotho_aqa(said, people, cast(Rule, rule))
        if task.dataset == "vqav2":
            return {id: vqa_accuracy(text, people[id]) for id, text in said.items()}
        return {id: any(exact_match(text, t) for t in people[id]) for id, text in said.items()}

    ids = list(people)
    others = {id: people[ids[place]] for id, place in zip(ids, swapped(len(ids)), strict=True)}
    figures: dict[str, float] = {}
    missing: dict[str, str] = {}
    beside: dict[str, Row] = {}
    for name in task.metrics:
        try:
            if not (each := list(compute(name, people).values())):
                missing[name] = "the rule counts none of these questions"
                continue
            figures[name] = 100 * fsum(each) / len(each)
            beside[name] = {"interval": interval(np.array(each), np.ones(len(each)))}
            if task.dataset in OWN:
                beside[name]["swapped"] = 100 * fsum(compute(name, others).values()) / len(ids)
        except MicoError as error:  # such as a missing program of the metric
            missing[name] = str(error)
    return _Figures(figures, missing, beside=beside)


def _judged(folder: Path, task: Task, records: Sequence[Record]) -> _Figures:
    """The accuracy in per cent and the mean score (0 to 5) by the judge's verdicts."""
    try:
        header, verdicts = read_verdicts(folder, records)
    except DataError as error:
        return _Figures({}, dict.fromkeys(task.metrics, str(error)))
    given = [said for said in verdicts.values() if not isinstance(said, str)]
    unjudged = [(id, said) for id, said in verdicts.items() if isinstance(said, str)]
    judge = header.get("judge")
    if given:
        accuracy, points = (sum(column) / len(given) for column in zip(*given, strict=True))
        return _Figures({"accuracy": 100 * accuracy, "score": points}, {}, unjudged, judge)
    why = "no answer was judged"
    if judge is None:
        command = f"mico-chat evaluate --rescore {folder.parent} --judge-url URL --judge-model NAME"
        why = "no judge has rated the answers yet; the answers are kept, so a judge can still rate "
        why += f"them: {command}"
    return _Figures({}, dict.fromkeys(task.metrics, why), unjudged, judge)


def is_finished(folder: Path) -> bool:
    return (folder / PREDICTIONS).is_file() and _is_done(read_store(folder)[1])


def finished(output: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, Row]], list[str]]:
    """The rows of ``results.json``, and the reason why each unfinished task has none."""
    rows: dict[str, dict[str, Row]] = {"skills": {}, "tasks": {}}
    unfinished = []
    for name in names:
        if (output / name / PREDICTIONS).is_file():
            try:
                row = score(output / name)
                rows["skills" if "skills" in row else "tasks"][name] = row
            except UnfinishedError as error:
                unfinished.append(str(error))
    if not any(rows.values()):
        why = unfinished[0] if unfinished else f"no TASK/{PREDICTIONS} in it"
        raise DataError(output, None, why)
    return {kind: of_kind for kind, of_kind in rows.items() if of_kind}, unfinished

"""Figures of a set of items, from its kept answers alone: no model and no media are needed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from mico_chat.evaluation.chat.model import CONTROLS
from mico_chat.evaluation.scoring import is_right, position
from mico_chat.evaluation.tasks.score import UnfinishedError
from mico_chat.evaluation.tasks.store import PREDICTIONS, Record, read_store

NAMED = 20
"""Items without an answer that a report names; ``predictions.jsonl`` has all of them."""
CONFIDENCE = 0.95

Row = dict[str, Any]


def score(folder: Path) -> Row:
    """A set's entry of results.json, of the controls that are finished.

    ``skills`` has, by skill, ``n``, ``digest``, ``chance`` (of picking evenly among an item's
    choices; nothing for one without, and None where all are) and by control ``accuracy`` with the
    ends of its Wilson interval ``low`` and ``high``, ``n`` answers, and how many were ``refused``
    or ``broken``.

    Raises:
        UnfinishedError: none is finished.
        DataError: there are no answers, or they are damaged.
    """
    header, records = read_store(folder)
    finished = {r["control"] for r in records if r["kind"] == "done"}
    if not finished:
        raise UnfinishedError(
            folder / PREDICTIONS,
            None,
            "the run has not finished; run the same command again to continue it",
        )
    controls = [control for control in CONTROLS if control in finished]
    of: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if "number" in record:
            of[record["skill"], record["control"]].append(record)
    rows = {}
    for skill, about in header["skills"].items():
        figures = {c: _figures(of[skill, c]) for c in controls if of[skill, c]}
        rows[skill] = {**about, "chance": _chance(of[skill, controls[0]]), "controls": figures}
    return {
        "model": header["model"],
        "digest": header["digest"],
        "controls": controls,
        "skills": rows,
        **{kind: _named(records, kind) for kind in ("refused", "broken")},
        "seconds": round(sum(float(r.get("seconds", 0)) for r in records), 1),
        "run": header,
    }


def answers(folder: Path) -> list[Record]:
    """Every kept answer with its verdict, for people to read."""
    found = [record for record in read_store(folder)[1] if record["kind"] == "answer"]
    return [{**record, "right": _right(record)} for record in found]


def _right(record: Record) -> bool:
    return is_right(record["answer"], record["accept"], record["choices"])


def _figures(records: Sequence[Record]) -> Row:
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
    """The mean share of an item's choices that are right; None where no item has choices."""
    said = [record for record in records if record["kind"] == "answer"]
    shares = [
        sum(any(position(c, a) is not None for a in record["accept"]) for c in record["choices"])
        / len(record["choices"])
        for record in said
        if record["choices"]
    ]
    return sum(shares) / len(said) if shares else None


def _named(records: Sequence[Record], kind: str) -> Row:
    found = [record for record in records if record["kind"] == kind]
    found.sort(key=lambda record: (CONTROLS.index(record["control"]), record["number"]))
    first = [f"{r['id']} ({r['control']}): {r['reason']}" for r in found[:NAMED]]
    return {"count": len(found), "first": first}


def table(name: str, row: Row) -> str:
    """A set's figures as Markdown: what was asked of whom, a line a skill, and what has none."""
    controls: list[str] = row["controls"]
    lines = [
        f"**{name}** ({row['digest']}): {row['model']}, {row['run']['how']}; "
        f"{row['seconds']:.0f} s; right answers with {CONFIDENCE:.0%} intervals (Wilson)",
        "",
        "| skill | n | chance | " + " | ".join(controls) + " |",
        "|---|---|---|" + "---|" * len(controls),
    ]
    for skill, of_it in row["skills"].items():
        chance = "" if of_it["chance"] is None else percent(of_it["chance"])
        cells = [cell(of_it, control) for control in controls]
        lines.append(" | ".join([f"| {skill}", str(of_it["n"]), chance, *cells]) + " |")
    for kind in ("refused", "broken"):
        lost = row[kind]
        if lost["count"]:
            more = lost["count"] - len(lost["first"][:5])
            rest = f"; and {more} more in {PREDICTIONS}" if more else ""
            lines += ["", f"{lost['count']} {kind} and not counted: "]
            lines[-1] += "; ".join(lost["first"][:5]) + rest
    return "\n".join(lines)


def percent(share: float) -> str:
    """``61 %``."""
    return f"{100 * share:.0f} %"


def cell(skill: Mapping[str, Any], control: str) -> str:
    """``61 % (48-73)``, and of how many answers where some items have none."""
    figures = skill["controls"].get(control)
    if figures is None:
        return ""
    if figures["accuracy"] is None:
        lost = [f"{figures[kind]} {kind}" for kind in ("refused", "broken") if figures[kind]]
        return ", ".join(lost)
    text = (
        f"{percent(figures['accuracy'])} ({100 * figures['low']:.0f}-{100 * figures['high']:.0f})"
    )
    return text if figures["n"] == skill["n"] else f"{text} of {figures['n']}"


def plot(path: Path, name: str, row: Row) -> None:
    """Bars of each skill under each control with their intervals, and a line at chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    skills: dict[str, Row] = row["skills"]
    controls: list[str] = row["controls"]
    figure = Figure(figsize=(max(6.0, 0.9 * len(skills)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(controls)
    for number, control in enumerate(controls):
        of = [skill["controls"].get(control) for skill in skills.values()]
        there = [(i, f) for i, f in enumerate(of) if f is not None and f["accuracy"] is not None]
        heights = [100 * f["accuracy"] for _, f in there]
        below = [max(0.0, 100 * (f["accuracy"] - f["low"])) for _, f in there]
        above = [max(0.0, 100 * (f["high"] - f["accuracy"])) for _, f in there]
        axes.bar(
            [i + number * width for i, _ in there],
            heights,
            width,
            label=control,
            yerr=(below, above) if there else None,
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
    chances = [(i, 100 * s["chance"]) for i, s in enumerate(skills.values()) if s["chance"]]
    if chances:
        left = [i - width / 2 for i, _ in chances]
        right = [i + 0.8 - width / 2 for i, _ in chances]
        axes.hlines([c for _, c in chances], left, right, "black", "dashed", label="chance")
    places = [i + 0.4 - width / 2 for i in range(len(skills))]
    axes.set_xticks(places, list(skills), rotation=30, ha="right")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    figure.suptitle(f"{name} ({row['digest']}): {row['model']}", fontsize="medium")
    axes.legend(
        ncols=len(controls) + 1, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.12)
    )
    figure.savefig(path, dpi=120)

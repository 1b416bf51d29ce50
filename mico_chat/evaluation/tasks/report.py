"""Results of tasks as rows of results.json, as Markdown, and as a radar beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mico_chat.evaluation.tasks.score import Result
from mico_chat.evaluation.tasks.store import PREDICTIONS, VERDICTS, Record
from mico_chat.evaluation.tasks.task import Broken, Task

NAMED = 20
"""Items that a row names of those without a figure; the kept files have all of them."""

Row = dict[str, Any]


def row_of(result: Result) -> Row:
    """A result as results.json has it."""
    task, paper, header = result.task, result.task.paper, result.header
    first = task.metrics[0]
    return {
        "model": header["model"],
        "metric": first,
        "figure": result.figures.get(first),
        "paper": None
        if paper is None
        else {"figure": paper.value, "place": paper.place, "also": dict(paper.also)},
        "figures": result.figures,
        "missing": result.missing,
        "items": result.items,
        **_left_out("broken", result.broken),
        **_left_out("refused", result.refused),
        **_left_out("unjudged", result.unjudged),
        "judge": result.judge,
        "seconds": result.seconds,
        "protocol": _protocol(result),
        "run": header,
    }


LEFT_OUT = {
    "broken": "broken and not counted",
    "refused": "refused by the model and not counted",
    "unjudged": "without a verdict and not counted",
}

KEPT = {"broken": PREDICTIONS, "refused": PREDICTIONS, "unjudged": VERDICTS}


def _left_out(kind: str, items: Sequence[Broken]) -> Row:
    """How many, and the first of them by name."""
    first = [f"{item.id}: {item.reason}" for item in items[:NAMED]]
    return {kind: len(items), f"{kind}_first": first}


def _protocol(result: Result) -> str:
    """How a figure came about, and in what it departs from the paper's."""
    task, header = result.task, result.header
    parts = [task.protocol]
    if task.prompt:
        parts += [header["how"], f"at most {header['max_tokens']} tokens"]
        parts += [f"the judge is {result.judge}"] if result.judge else []
    else:
        parts += _media_taken(task, header)
    if header["limit"]:
        parts.append(f"only the first {header['limit']} items")
    return "; ".join(parts)


def _media_taken(task: Task, header: Record) -> list[str]:
    """Frames, slices and resolution of a run of the pretraining model."""
    parts = []
    for what, wanted in (("frames", task.frames), ("slices", task.slices)):
        if header[what] != wanted:
            parts.append(f"{header[what]} {what} instead of {wanted}")
        elif wanted > 1 or what == "slices":
            parts.append(f"{wanted} {what}" + (" of sound" if what == "slices" else ""))
    size = f"{header['resolution']} px"
    if task.paper is not None and header["resolution"] != task.resolution:
        size += f" (the paper's model has {task.resolution})"
    return [part for part in [*parts, size] if part != "0 slices of sound"]


def table(rows: Mapping[str, Row]) -> str:
    """One row a task, then all figures, and what is missing or broken."""
    lines = [
        "| task | metric | ours | paper | items | broken | seconds | model | protocol |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        paper = "" if row["paper"] is None else f"{row['paper']['figure']:.1f}"
        cells = [name, row["metric"], _shown(row["figure"]), paper, row["items"], row["broken"]]
        cells += [f"{row['seconds']:.0f}", row["model"], row["protocol"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    notes = []
    for name, row in rows.items():
        also = {} if row["paper"] is None else row["paper"]["also"]
        if len(row["figures"]) > 1:
            figures = ", ".join(
                f"{key} {_shown(value)}" + (f" (paper {also[key]:.1f})" if key in also else "")
                for key, value in row["figures"].items()
            )
            notes.append(f"- {name}: {figures}")
        # One line where all metrics lack the same.
        for why in dict.fromkeys(row["missing"].values()):
            keys = [key for key, reason in row["missing"].items() if reason == why]
            notes.append(f"- {name}: no {', '.join(keys)}: {why}")
        for kind, words in LEFT_OUT.items():
            if row[kind]:
                named = "; ".join(row[f"{kind}_first"][:5])
                more = row[kind] - len(row[f"{kind}_first"][:5])
                rest = f"; and {more} more in {KEPT[kind]}" if more else ""
                notes.append(f"- {name}: {row[kind]} {words}: {named}{rest}")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1f}"


def plot_radar(path: Path, rows: Mapping[str, Row]) -> None:
    """Each task an axis from 0 to 100, or as far as our figure or the paper's is beyond that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: row for name, row in rows.items() if row["figure"] is not None}
    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * number / max(1, len(shown)) for number in range(len(shown))]
    ours, papers, labels = [], [], []
    for name, row in shown.items():
        value = row["figure"]
        paper = None if row["paper"] is None else row["paper"]["figure"]
        most = max(100.0, value, paper or 0.0)
        ours.append(value / most)
        papers.append(math.nan if paper is None else paper / most)
        against = "" if paper is None else f" / {paper:.1f}"
        labels.append(f"{name}\n{value:.1f}{against}")
    for label, values, marker in (("ours", ours, "o"), ("paper", papers, "s")):
        if shown and not all(math.isnan(value) for value in values):
            axes.plot([*angles, angles[0]], [*values, values[0]], marker=marker, label=label)
    axes.fill(angles, ours, alpha=0.15)
    axes.set_xticks(angles, labels, fontsize="small")
    axes.tick_params(axis="x", pad=6)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        across = math.cos(angle)
        text.set_horizontalalignment(
            "center" if abs(across) < 0.05 else "left" if across > 0 else "right"
        )
    axes.set_ylim(0, 1.05)
    axes.set_yticklabels([])
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, 1.1))
    figure.savefig(path, dpi=120, bbox_inches="tight")

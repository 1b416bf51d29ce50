"""The results beside the paper's: tables, loss curves as its figure 6, and bars of R@1.

Our figures are means over seeds with their standard deviation. A difference between two settings is
*clear* where their seeds do not overlap: the worst seed of one is above the best of the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from mico_training.plots import smoothed
from mico_training.research.ablations.grid import FIGURES, TABLE, TABLES, Figure, Table

Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""The results of a cell's seeds, by the cell's name."""

SMALLEST = 0.05
"""A smaller difference between two of the paper's figures is none: they have one decimal."""

KINDS_SHOWN = ("video", "audio", "image", "depth", "normal")


def recall(
    result: Mapping[str, Any], column: str, ranking: str | None = None, k: int = 1
) -> float | None:
    """R@k of one run in per cent, or None where no medium of that kind was ranked.

    ``column`` is a kind, or ``average`` over video, audio and image. ``ranking`` is
    ``contrastive`` or ``matching``; by default the matching head's where it was trained.
    """
    if column == "average":
        found = [recall(result, kind, ranking, k) for kind in ("video", "audio", "image")]
        there = [value for value in found if value is not None]
        return fmean(there) if len(there) == len(found) else None
    recalls = result["retrieval"].get(column)
    if recalls is None:
        return None
    if ranking is None:
        ranking = "matching" if "matching" in recalls else "contrastive"
    return float(recalls[ranking][f"R@{k}"]) if ranking in recalls else None


def over_seeds(
    results: Sequence[Mapping[str, Any]], column: str, ranking: str | None = None, k: int = 1
) -> list[float]:
    """R@k of each seed that has such a figure (see :func:`recall`)."""
    found = [recall(result, column, ranking, k) for result in results]
    return [value for value in found if value is not None]


@dataclass(frozen=True)
class Change:
    """The step from one row of a table to another in one column: our seeds, the paper's change."""

    figure: Figure
    before: tuple[float, ...]
    after: tuple[float, ...]
    paper: float | None

    @property
    def ours(self) -> float:
        """The difference between the means of our seeds."""
        return fmean(self.after) - fmean(self.before)

    @property
    def clear(self) -> bool:
        """Whether the seeds do not overlap; both rows need two seeds or more."""
        if min(len(self.before), len(self.after)) < 2:
            return False
        return min(self.after) > max(self.before) or min(self.before) > max(self.after)

    @property
    def verdict(self) -> str:
        """Whether our sign is the paper's, in words."""
        single = min(len(self.before), len(self.after)) < 2
        doubt = "" if self.clear else "one seed" if single else "within the seeds"
        if self.paper is None or abs(self.paper) < SMALLEST:
            return doubt or "clear"
        if self.paper * self.ours > 0:
            return f"agrees, {doubt}" if doubt else "agrees"
        return f"differs, {doubt}" if doubt else "**differs**"


def changes(
    table: Table, before: str, after: str, results: Results, ranking: str | None = None
) -> list[Change]:
    """The changes between two rows (letters) in every column that both have."""
    one, other = table.row(before), table.row(after)
    found = []
    for column, figure in enumerate(FIGURES):
        values = [
            tuple(over_seeds(results.get(r.cell.name, ()), figure, ranking)) for r in (one, other)
        ]
        if all(values):
            paper = other.paper[column] - one.paper[column] if one.paper and other.paper else None
            found.append(Change(figure, values[0], values[1], paper))
    return found


def report(results: Results, folder: Path) -> list[Path]:
    """Write ``ablations.md``, ``ablations.json`` and the pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        curves(results, folder / "ablations-loss.png"),
        bars(
            {t.name: _bars(t, results) for t in TABLES if t.compared(results)},
            folder / "ablations-recall.png",
        ),
    ]
    text = folder / "ablations.md"
    text.write_text(markdown(results, [picture.name for picture in pictures]), encoding="utf-8")
    data = folder / "ablations.json"
    runs = [result for of_cell in results.values() for result in of_cell]
    data.write_text(json.dumps(runs, separators=(",", ":")) + "\n", encoding="utf-8")
    return [text, data, *pictures]


def _bars(table: Table, results: Results) -> list[tuple[str, list[float]]]:
    return [
        (f"({row.letter}) {row.label}", over_seeds(results.get(row.cell.name, ()), "average"))
        for row in table.rows
    ]


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """The report's text."""
    parts = [_head(results)]
    for table in TABLES:
        if table.compared(results):
            parts += [f"## {table.title}", _rows(table, results), _changes(table, results)]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results) -> str:
    runs = [result for of_cell in results.values() for result in of_cell]
    if not runs:
        return "# Ablations\n\nNo run has finished yet."
    any_run = runs[0]
    train = any_run["recipe"]["train"]
    steps = sorted({run["recipe"]["train"]["steps"] for run in runs})
    pool = ", ".join(
        f"{kind} {pool['media']} media and {pool['queries']} captions"
        for kind, pool in any_run["retrieval"].items()
    )
    machines = sorted({run["machine"] for run in runs})
    hours = sum(sum(s or 0 for s in run["seconds"].values()) for run in runs) / 3600
    return (
        "# Ablations\n\n"
        f"{len(runs)} runs, {train['batch_size']} samples a step, {' or '.join(map(str, steps))} "
        f"steps, {hours:.1f} hours of one process on {any_run['device']} ({'; '.join(machines)}). "
        "Text-to-medium R@1 in per cent on held-out samples, re-ranked by the matching head where "
        f"it was trained: mean over seeds ± standard deviation. Candidates: {pool}. The average is "
        "that of video, audio and image; depth and normal maps are beside it, for the paper has "
        "none. *By contrast alone* is the ranking before the matching head's; R@10 of the average "
        "is the same in both, for the head orders the best ten. The paper's figures are means over "
        "its data sets of a kind. What stands for what: "
        "[docs/ablations.md](../../docs/ablations.md).\n\n"
        "Signs: *agrees* or *differs*, of ours with the paper's; *within the seeds* where the "
        "seeds of the two settings overlap, so that the sign is no finding."
    )


def _rows(table: Table, results: Results) -> str:
    head = ["", "here", *KINDS_SHOWN, "average", "by contrast alone", "R@10"]
    head += ["paper: video", "audio", "image", "average", "seconds", "parameters"]
    lines = [head]
    for row in table.rows:
        runs = results.get(row.cell.name, ())
        paper = ["-"] * 4 if row.paper is None else [f"{value:.1f}" for value in row.paper]
        seconds = [s for run in runs if (s := run["seconds"]["training"]) is not None]
        lines.append(
            [
                f"({row.letter}) {row.label}",
                row.here,
                *(spread(over_seeds(runs, kind)) for kind in KINDS_SHOWN),
                spread(over_seeds(runs, "average")),
                spread(over_seeds(runs, "average", "contrastive")),
                spread(over_seeds(runs, "average", k=10)),
                *paper,
                f"{fmean(seconds):.0f}" if seconds else "-",
                f"{runs[0]['parameters']['all'] / 1e6:.2f} M" if runs else "-",
            ]
        )
    return _table(lines)


def _changes(table: Table, results: Results) -> str:
    lines = [["", *FIGURES, f"{FIGURES[-1]}, by contrast alone"]]
    for before, after in table.pairs:
        ours, contrastive = (
            {change.figure: _said(change) for change in changes(table, before, after, results, by)}
            for by in (None, "contrastive")
        )
        if ours:
            row = [*(ours.get(f, "-") for f in FIGURES), contrastive.get(FIGURES[-1], "-")]
            lines.append([f"({before}) to ({after})", *row])
    return _table(lines) if len(lines) > 1 else ""


def _said(change: Change) -> str:
    paper = "" if change.paper is None else f" (paper {change.paper:+.1f})"
    return f"{change.ours:+.1f}{paper}: {change.verdict}"


def spread(values: Sequence[float]) -> str:
    """``12.3 ± 0.4``."""
    if not values:
        return "-"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


# --- pictures -----------------------------------------------------------------------------------

PANELS = {"modalities": "loss", "data": "loss", "size": "loss", "objectives": "contrastive_loss"}
"""The loss that each panel shows; rows with other objectives have only this part in common."""


def curves(results: Results, path: Path) -> Path:
    """Training loss over the steps: mean of the seeds, and a band from the least to the most."""
    panels = [(TABLE[of], name) for of, name in PANELS.items() if TABLE[of].compared(results)]
    figure, subplots = _side_by_side(len(panels))
    for axes, (table, name) in zip(subplots, panels, strict=True):
        for row in table.rows:
            runs = results.get(row.cell.name, ())
            lines = [{e["step"]: e[name] for e in run["losses"] if name in e} for run in runs]
            steps = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
            if steps:
                values = np.array([smoothed([line[step] for step in steps]) for line in lines])
                (line,) = axes.plot(steps, values.mean(0), label=row.label)
                axes.fill_between(
                    steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color()
                )
        _finish(axes, table.name, name.replace("_", " "))
        axes.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path)
    return path


def bars(tables: Mapping[str, Sequence[tuple[str, Sequence[float]]]], path: Path) -> Path:
    """R@1 of each row of each table: mean of the seeds, and a line from the least to the most."""
    figure, subplots = _side_by_side(len(tables))
    for axes, (title, rows) in zip(subplots, tables.items(), strict=True):
        for place, (label, values) in enumerate(rows):
            if values:
                mean = fmean(values)
                error = [[mean - min(values)], [max(values) - mean]]
                axes.bar(place, mean, yerr=error, capsize=4, label=label)
        axes.set_xticks([])
        _finish(axes, title, "R@1, average of kinds (%)")
    figure.tight_layout()
    figure.savefig(path)
    return path


def _side_by_side(panels: int) -> tuple[Drawing, Sequence[Axes]]:
    figure = Drawing(figsize=(5 * max(panels, 1), 4), dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0] if panels else ()


def _finish(axes: Axes, title: str, value: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(value)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)

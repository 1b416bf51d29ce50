"""The results beside the paper's: tables, loss curves as its figure 6, and bars of R@1.

Our figures are means over seeds with their standard deviation. A difference between two settings is
*clear* where their seeds do not overlap: the worst seed of one is above the best of the other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mico_research.ablations.grid import FIGURES, TABLES, Figure, Table
from mico_training.records import markdown_table, panels, smoothed, spread

Results = Mapping[str, Sequence[Mapping[str, Any]]]

SMALLEST = 0.05
"""A smaller difference of the paper's figures counts as none: they have one decimal."""

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
    found = [recall(result, column, ranking, k) for result in results]
    return [value for value in found if value is not None]


@dataclass(frozen=True)
class Change:
    """The step from one row of a table to another in a column: our seeds, the paper's change."""

    figure: Figure
    before: tuple[float, ...]
    after: tuple[float, ...]
    paper: float | None

    @property
    def ours(self) -> float:
        return fmean(self.after) - fmean(self.before)

    @property
    def verdict(self) -> str:
        """Whether our sign is the paper's, in words; clear where the seeds do not overlap."""
        doubt = "within the seeds"
        if min(len(self.before), len(self.after)) < 2:
            doubt = "one seed"
        elif min(self.after) > max(self.before) or min(self.before) > max(self.after):
            doubt = ""
        if self.paper is None or abs(self.paper) < SMALLEST:
            return doubt or "clear"
        if self.paper * self.ours > 0:
            return f"agrees, {doubt}" if doubt else "agrees"
        return f"differs, {doubt}" if doubt else "**differs**"

    def __str__(self) -> str:
        paper = "" if self.paper is None else f" (paper {self.paper:+.1f})"
        return f"{self.ours:+.1f}{paper}: {self.verdict}"


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
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        curves(results, folder / "ablations-loss.png"),
        bars(results, folder / "ablations-recall.png"),
    ]
    text, data = folder / "ablations.md", folder / "ablations.json"
    text.write_text(markdown(results, [picture.name for picture in pictures]), encoding="utf-8")
    runs = [result for of_cell in results.values() for result in of_cell]
    data.write_text(json.dumps(runs, separators=(",", ":")) + "\n", encoding="utf-8")
    return [text, data, *pictures]


def markdown(results: Results, pictures: Sequence[str]) -> str:
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
        "Text-to-medium R@1 in per cent on held-out samples, re-ranked with the matching head "
        f"where it was trained: mean over seeds ± standard deviation. Candidates: {pool}. The "
        "average is that of video, audio and image; depth and normal maps are beside it, for the "
        "paper has none. *By contrast alone* is the ranking before that. *Re-ranked* says for each "
        "seed how many of the best candidates were ranked again, and the weight of the matching "
        "logit in it, as found on other media than those of the figures. The paper's figures are "
        "means over its data sets of a kind. What stands for what: "
        "[docs/ablations.md](../../docs/ablations.md).\n\n"
        "Signs: *agrees* or *differs*, of ours with the paper's; *within the seeds* where the "
        "seeds of the two settings overlap, so that the sign is no finding."
    )


def _rows(table: Table, results: Results) -> str:
    head = ["", "here", "seeds", *KINDS_SHOWN, "average", "by contrast alone", "R@10", "re-ranked"]
    head += ["paper: video", "audio", "image", "average", "seconds", "parameters"]
    lines = []
    for row in table.rows:
        runs = results.get(row.cell.name, ())
        paper = ["-"] * 4 if row.paper is None else [f"{value:.1f}" for value in row.paper]
        seconds = [s for run in runs if (s := run["seconds"]["training"]) is not None]
        lines.append(
            [
                f"({row.letter}) {row.label}",
                row.here,
                str(len(runs)),
                *(spread(over_seeds(runs, kind)) for kind in KINDS_SHOWN),
                spread(over_seeds(runs, "average")),
                spread(over_seeds(runs, "average", "contrastive")),
                spread(over_seeds(runs, "average", k=10)),
                ", ".join(map(_reranked, runs)),
                *paper,
                f"{fmean(seconds):.0f}" if seconds else "-",
                f"{runs[0]['parameters']['all'] / 1e6:.2f} M" if runs else "-",
            ]
        )
    return markdown_table(head, lines, texts=2)


def _reranked(run: Mapping[str, Any]) -> str:
    by = run.get("reranking")
    return "-" if by is None else f"{by['candidates']} by {by['weight']:g}"


def _changes(table: Table, results: Results) -> str:
    head, lines = ["", *FIGURES, f"{FIGURES[-1]}, by contrast alone"], []
    for before, after in table.pairs:
        ours, contrastive = (
            {change.figure: str(change) for change in changes(table, before, after, results, by)}
            for by in (None, "contrastive")
        )
        if ours:
            row = [*(ours.get(f, "-") for f in FIGURES), contrastive.get(FIGURES[-1], "-")]
            lines.append([f"({before}) to ({after})", *row])
    return markdown_table(head, lines, texts=len(head)) if lines else ""


# --- pictures -----------------------------------------------------------------------------------

PART = {"objectives": "contrastive_loss"}
"""A panel shows this part where rows differ in their losses: it is common to all of them."""


def curves(results: Results, path: Path) -> Path:
    """Training loss over the steps: mean of the seeds, and a band from the least to the most."""
    shown = [(of, PART.get(of.name, "loss")) for of in TABLES if of.compared(results)]
    with panels(path, len(shown), columns=3) as drawn:
        for axes, (table, name) in zip(drawn, shown, strict=True):
            for row in table.rows:
                runs = results.get(row.cell.name, ())
                lines = [{e["step"]: e[name] for e in run["losses"] if name in e} for run in runs]
                steps = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
                if steps:
                    values = np.array([smoothed([line[step] for step in steps]) for line in lines])
                    (line,) = axes.plot(steps, values.mean(0), label=row.label)
                    band = values.min(0), values.max(0)
                    axes.fill_between(steps, *band, alpha=0.2, color=line.get_color())
            axes.set(title=table.name, ylabel=name.replace("_", " "), xlabel="step")
    return path


def bars(results: Results, path: Path) -> Path:
    """R@1 of each row of each table: mean of the seeds, and a line from the least to the most."""
    tables = [table for table in TABLES if table.compared(results)]
    with panels(path, len(tables), columns=3) as drawn:
        for axes, table in zip(drawn, tables, strict=True):
            for place, row in enumerate(table.rows):
                values = over_seeds(results.get(row.cell.name, ()), "average")
                if values:
                    mean = fmean(values)
                    error = [[mean - min(values)], [max(values) - mean]]
                    axes.barh(place, mean, xerr=error, capsize=4)
            labels = [f"({row.letter}) {row.label}" for row in table.rows]
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set(title=table.name, xlabel="R@1, average of kinds (%)")
    return path

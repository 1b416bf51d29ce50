"""The results beside the paper's: tables, loss curves as its figure 6, and bars of R@1.

A figure is a mean over seeds and held-out queries. Two settings are compared query by query and
seed by seed; the interval of their difference is of a bootstrap over both. A difference is
*decided* where its interval of 95 % leaves out zero.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mico_research.ablations.evaluation import hits_of
from mico_research.ablations.grid import FIGURES, TABLES, Figure, Row, Table
from mico_training.records import markdown_table, panels, smoothed

Results = Mapping[str, Sequence[Mapping[str, Any]]]

Measure = Literal["R@1", "R@1 by contrast", "CIDEr"]
"""R@1 is re-ranked where the matching head was trained."""

SMALLEST = 0.05
"""A smaller difference of the paper's figures counts as none: they have one decimal."""

NO_DIFFERENCE = 1.0
"""An interval within this many points on both sides of zero means that there is no difference."""

KINDS_SHOWN = ("video", "audio", "image", "depth", "normal")
DRAWS = 4000
"""Samples of the bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the ends of its interval of 95 %, in points (per cent)."""

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        return self.low > 0 or self.high < 0


def values(result: Mapping[str, Any], kind: str, measure: Measure) -> NDArray[np.float64] | None:
    """A run's figure for each query, or each captioned medium, in per cent; None if it has none."""
    if measure == "CIDEr":
        scores = result.get("captions", {}).get(kind)
        return None if scores is None else np.array(scores, np.float64)
    of = result["retrieval"].get(kind)
    if of is None:
        return None
    ranking = "matching" if measure == "R@1" and "matching" in of else "contrastive"
    return 100 * hits_of(of[ranking], of["queries"])


def bootstrapped(of_kinds: Sequence[NDArray[np.float64]]) -> Estimate:
    """The mean over kinds, seeds and queries of values (S, Q) of each kind, with its interval.

    Seeds and queries are drawn anew with replacement; a seed is the same draw for all kinds. Of few
    seeds such draws vary too little, so their deviations are widened by sqrt(S / (S - 1)).
    """
    rng = np.random.default_rng(0)
    n = len(of_kinds[0])
    shares = rng.multinomial(n, np.full(n, 1 / n), DRAWS) / n
    wider = (n / (n - 1)) ** 0.5 if n > 1 else 1.0
    drawn = np.zeros(DRAWS)
    for each in of_kinds:
        q = each.shape[1]
        counts = rng.multinomial(q, np.full(q, 1 / q), DRAWS) / q
        middle = each.mean(0)
        # The sum over queries and seeds of counts x shares x values, without an array of them all.
        of_seeds = counts @ (each - middle).T
        drawn += counts @ middle + wider * (of_seeds * shares).sum(1)
    drawn /= len(of_kinds)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(float(np.mean([each.mean() for each in of_kinds])), float(low), float(high))


def kinds_of(figure: str) -> tuple[str, ...]:
    return ("video", "audio", "image") if figure == "average" else (figure,)


def estimate(
    results: Results, cell: str, figure: str, measure: Measure, before: str | None = None
) -> Estimate | None:
    """A cell's figure, or its difference to that of the cell ``before``; None without runs.

    ``figure`` is a kind, or the average of video, audio and image.
    """
    found = []
    for kind in kinds_of(figure):
        own = _table(results, cell, kind, measure)
        other = None if before is None else _table(results, before, kind, measure)
        if own is None or (before is not None and other is None):
            return None
        if other is not None:
            n = min(len(own), len(other))
            own = own[:n] - other[:n]
        found.append(own)
    return bootstrapped(found)


def _table(results: Results, cell: str, kind: str, measure: Measure) -> NDArray[np.float64] | None:
    """The values (S, Q) of a cell's runs, in the order of their seeds."""
    rows = [values(result, kind, measure) for result in results.get(cell, ())]
    there = [row for row in rows if row is not None]
    return np.stack(there) if there and len(there) == len(rows) else None


@dataclass(frozen=True)
class Change:
    """The step from one row of a table to another: ours with its interval, and the paper's."""

    figure: Figure
    measure: Measure
    ours: Estimate
    paper: float | None

    @property
    def verdict(self) -> str:
        """Whether our sign is the paper's, in words."""
        if not self.ours.decided:
            close = max(abs(self.ours.low), abs(self.ours.high)) < NO_DIFFERENCE
            return "no difference" if close else "not decided"
        if self.paper is None or abs(self.paper) < SMALLEST:
            return "decided"
        return "agrees" if self.paper * self.ours.mean > 0 else "**differs**"

    def __str__(self) -> str:
        paper = "" if self.paper is None else f" (paper {self.paper:+.1f})"
        ours = self.ours
        return f"{ours.mean:+.1f} [{ours.low:+.1f}, {ours.high:+.1f}]{paper}: {self.verdict}"


def changes(
    table: Table, before: str, after: str, results: Results, measure: Measure = "R@1"
) -> list[Change]:
    """The changes between two rows (letters) in every column that both have."""
    one, other = table.row(before), table.row(after)
    was, now = (row.cider if measure == "CIDEr" else row.paper for row in (one, other))
    found = []
    for column, figure in enumerate(FIGURES):
        ours = estimate(results, other.cell.name, figure, measure, one.cell.name)
        if ours is not None:
            paper = now[column] - was[column] if was and now else None
            found.append(Change(figure, measure, ours, paper))
    return found


def rise(results: Results, cell: str) -> float | None:
    """How many points of R@1 a cell gains in the last quarter of its steps, mean of the seeds."""
    gains = []
    for result in results.get(cell, ()):
        curve = {point["step"]: point["R@1"] for point in result["curve"]}
        last = max(curve, default=0)
        earlier = [step for step in curve if step <= 0.75 * last]
        if earlier:
            gains.append(curve[last] - curve[max(earlier)])
    return fmean(gains) if gains else None


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
        f"where it was trained. Candidates: {pool}. The average is that of video, audio and image; "
        "depth and normal maps are beside it, for the paper has none. Behind ± is half the "
        "interval of 95 % over seeds and queries. *By contrast* is the ranking before matching. "
        "*Rise* is what R@1 gained in the last quarter of the steps, on 500 held-out samples: a "
        "cell with a large one was still learning. *Re-ranked* says for each seed how many of the "
        "best candidates were ranked again, and the weight of the matching logit in it, as found "
        "on other media than those of the figures. The paper's figures are means over its data "
        "sets of a kind. What stands for what: [docs/ablations.md](../../docs/ablations.md).\n\n"
        "Differences are in points, seed by seed and query by query, with their intervals of 95 % "
        "by a bootstrap over both. *agrees* and *differs*: the interval leaves out zero, and the "
        "sign is the paper's or not; *decided*: the paper has no figure. *no difference*: the "
        f"interval lies within {NO_DIFFERENCE:g} point of zero. *not decided*: neither."
    )


def _rows(table: Table, results: Results) -> str:
    head = ["", "here", "seeds", *KINDS_SHOWN, "average", "by contrast", "CIDEr", "rise"]
    head += ["re-ranked", "paper: video", "audio", "image", "average", "seconds", "parameters"]
    lines = []
    for row in table.rows:
        runs = results.get(row.cell.name, ())
        paper = ["-"] * 4 if row.paper is None else [f"{value:.1f}" for value in row.paper]
        seconds = [s for run in runs if (s := run["seconds"]["training"]) is not None]
        gained = rise(results, row.cell.name)
        lines.append(
            [
                f"({row.letter}) {row.label}",
                row.here,
                str(len(runs)),
                *(_shown(results, row, kind, "R@1") for kind in (*KINDS_SHOWN, "average")),
                _shown(results, row, "average", "R@1 by contrast"),
                _shown(results, row, "average", "CIDEr"),
                "-" if gained is None else f"{gained:+.1f}",
                ", ".join(map(_reranked, runs)),
                *paper,
                f"{fmean(seconds):.0f}" if seconds else "-",
                f"{runs[0]['parameters']['all'] / 1e6:.2f} M" if runs else "-",
            ]
        )
    return markdown_table(head, lines, texts=2)


def _shown(results: Results, row: Row, figure: str, measure: Measure) -> str:
    found = estimate(results, row.cell.name, figure, measure)
    return "-" if found is None else f"{found.mean:.1f} ± {(found.high - found.low) / 2:.1f}"


def _reranked(run: Mapping[str, Any]) -> str:
    by = run.get("reranking")
    return "-" if by is None else f"{by['candidates']} by {by['weight']:g}"


def _changes(table: Table, results: Results) -> str:
    measures: tuple[Measure, ...] = ("R@1 by contrast", "CIDEr")
    head, lines = ["", *FIGURES, *(f"average, {name}" for name in measures)], []
    for before, after in table.pairs:
        ours = {c.figure: str(c) for c in changes(table, before, after, results)}
        more = [changes(table, before, after, results, measure) for measure in measures]
        last = [next((str(c) for c in of if c.figure == "average"), "-") for of in more]
        if ours:
            row = [*(ours.get(f, "-") for f in FIGURES), *last]
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
                    shown_values = np.array(
                        [smoothed([line[step] for step in steps]) for line in lines]
                    )
                    (line,) = axes.plot(
                        steps, shown_values.mean(0), label=f"({row.letter}) {row.label}"
                    )
                    band = shown_values.min(0), shown_values.max(0)
                    axes.fill_between(steps, *band, alpha=0.2, color=line.get_color())
            axes.set(title=table.name, ylabel=name.replace("_", " "), xlabel="step")
    return path


def bars(results: Results, path: Path) -> Path:
    """R@1 of each row of each table: the mean, and a line over its interval of 95 %."""
    tables = [table for table in TABLES if table.compared(results)]
    with panels(path, len(tables), columns=3) as drawn:
        for axes, table in zip(drawn, tables, strict=True):
            for place, row in enumerate(table.rows):
                found = estimate(results, row.cell.name, "average", "R@1")
                if found is not None:
                    error = [[found.mean - found.low], [found.high - found.mean]]
                    axes.barh(place, found.mean, xerr=error, capsize=4)
            labels = [f"({row.letter}) {row.label}" for row in table.rows]
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set(title=table.name, xlabel="R@1, average of kinds (%)")
    return path

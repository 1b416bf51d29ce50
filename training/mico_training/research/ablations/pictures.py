"""Loss curves as the paper's figure 6, and R@1 as bars, with the spread of the seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mico_training.plots import smoothed
from mico_training.research.ablations.grid import DATA, MODALITIES, OBJECTIVES, SIZE, Table

PANELS: tuple[tuple[Table, str], ...] = (
    (MODALITIES, "loss"),
    (DATA, "loss"),
    (SIZE, "loss"),
    # Sums of unlike many objectives say nothing to each other; this part they have in common.
    (OBJECTIVES, "contrastive_loss"),
)


def curves(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Training loss over the steps: mean of the seeds, and a band from the least to the most."""
    panels = [(table, name) for table, name in PANELS if table.compared(results)]
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


def _side_by_side(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5 * max(panels, 1), 4), dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0] if panels else ()


def _finish(axes: Axes, title: str, value: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(value)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)

"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMOOTHING = 0.9


def plot_losses(history: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Draw ``loss`` and every ``*_loss`` of a log history over the steps, into a PNG.

    The thin line is the logged value, the thick line its exponential mean. Entries without a loss
    (the summary at the end of a run) are left out.
    """
    logged = [entry for entry in history if "loss" in entry]
    names = ["loss", *sorted({k for entry in logged for k in entry if k.endswith("_loss")})]
    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        points = [(entry["step"], entry[name]) for entry in logged if name in entry]
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        colour = f"C{number}"
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential mean, without bias at the start."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth

"""Pictures of figures: a run's loss curve, and panels side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMOOTHING = 0.9


@contextmanager
def panels(
    path: Path, number: int = 1, columns: int = 5, size: tuple[float, float] = (5.0, 4.0)
) -> Iterator[Sequence[Axes]]:
    """Panels of ``size`` inches, at most ``columns`` in a row; a PNG of them is written at the end.

    A panel with labels gets a legend.
    """
    columns = max(1, min(columns, number))
    rows = max(1, -(-number // columns))
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110)
    FigureCanvasAgg(figure)
    drawn = [figure.add_subplot(rows, columns, place + 1) for place in range(number)]
    for axes in drawn:
        axes.grid(alpha=0.3)
    yield drawn
    for axes in drawn:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_losses(history: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Draw ``loss`` and every ``*_loss`` of a log history over the steps, into a PNG.

    The thin line is the logged value, the thick line its exponential mean. Entries without a loss
    (the summary at the end of a run) are left out.
    """
    logged = [entry for entry in history if "loss" in entry]
    names = ["loss", *sorted({k for entry in logged for k in entry if k.endswith("_loss")})]
    with panels(path, size=(8.0, 4.5)) as (axes,):
        for number, name in enumerate(names):
            points = [(entry["step"], entry[name]) for entry in logged if name in entry]
            steps = [step for step, _ in points]
            values = [value for _, value in points]
            colour = f"C{number}"
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=colour, linewidth=1.6, label=name)
        axes.set(xlabel="step", ylabel="loss", title=title)


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential mean, without bias at the start."""
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append(mean / weight)
    return smooth

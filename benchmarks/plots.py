"""The plots of the engine benchmark."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_serving(rows: list[dict[str, Any]], folder: Path) -> None:
    """``serving.png``: tokens/s and seconds to the first token against requests at once."""
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(3.4 * len(inputs), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for line, (key, title) in enumerate((("rate", "tokens/s"), ("first", "first token, s"))):
        for column, name in enumerate(inputs):
            axes = figure.add_subplot(2, len(inputs), line * len(inputs) + column + 1)
            for system in systems:
                points = [r for r in rows if r["input"] == name and r["system"] == system]
                if points:
                    x = [p["at_once"] for p in points]
                    axes.plot(x, [p[key] for p in points], marker="o", label=system)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            axes.grid(alpha=0.3)
            axes.set_title(name if line == 0 else "")
            axes.set_xlabel("requests at once" if line == 1 else "")
            axes.set_ylabel(title if column == 0 else "")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(folder / "serving.png", dpi=110)


def plot_growth(curves: dict[str, dict[str, list[float]]], folder: Path) -> None:
    """``growth.png``: seconds against what they grow with, and the fitted line."""
    figure = Figure(figsize=(3.6 * len(curves), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        slope, fixed = statistics.linear_regression(curve["x"], curve["seconds"])
        axes.plot(curve["x"], [fixed + slope * x for x in curve["x"]], color="0.6")
        axes.plot(curve["x"], curve["seconds"], "o")
        axes.set_xlabel(f"{name}s")
        axes.set_ylabel("seconds" if place == 0 else "")
        axes.set_title(f"{1e3 * slope:.2f} ms a {name}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.savefig(folder / "growth.png", dpi=110)

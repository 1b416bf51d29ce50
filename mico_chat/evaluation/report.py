"""An evaluation's folder: results.json, table.md, the answers to items, and charts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError


def read_report(folder: Path) -> dict[str, Any]:
    """The results of a folder; empty where there are none yet.

    Raises:
        DataError: its results.json is something else.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(path, None, f"not JSON: {error}") from error
    if not isinstance(report, dict):
        raise DataError(path, None, f"expected an object, got {type(report).__name__}")
    return report


def write_report(
    folder: Path, report: dict[str, Any], answers: Sequence[dict[str, Any]], table: str
) -> None:
    """Write everything about one evaluation into ``folder``; ``answers`` are those to items."""
    from mico_chat.evaluation.tasks.report import plot_radar

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    if answers:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for row in answers:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if "skills" in report:
        plot(folder / "skills.png", report)
    if "tasks" in report:
        plot_radar(folder / "radar.png", report["tasks"])


def plot(path: Path, report: dict[str, Any]) -> None:
    """Bars of each skill under each control."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    skills: dict[str, dict[str, float]] = report["skills"]
    controls = [key for key in next(iter(skills.values())) if key != "n"]
    figure = Figure(figsize=(max(6.0, 0.9 * len(skills)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(controls)
    for number, control in enumerate(controls):
        places = [place + number * width for place in range(len(skills))]
        axes.bar(places, [100 * row[control] for row in skills.values()], width, label=control)
    axes.set_xticks([p + 0.4 - width / 2 for p in range(len(skills))], list(skills), rotation=30)
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    axes.legend(
        ncols=len(controls), fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.15)
    )
    figure.savefig(path, dpi=120)

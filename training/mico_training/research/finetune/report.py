"""The table of a fine-tuning run, and of several: JSON, Markdown, a picture.

``python -m mico_training.research.finetune.report runs/modality-* --output OUTPUT`` makes the
table of several runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import accuracy_score, f1_score, r2_score

from mico_chat.engine.cpu import processor
from mico_chat.errors import ConfigError
from mico_training.research.modalities.samples import Array, Sample, Task

NAME = "results"
METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "macro F1"),
    "regression": ("RMSE", "MAE", "R2"),
    "forecasting": ("MSE", "MAE"),
}
LARGER_IS_BETTER = frozenset({"accuracy", "macro F1", "R2"})
SHARES = frozenset({"accuracy", "macro F1"})
COLOURS = {"baseline": "#9aa0a6", "pretrained": "#1a73e8", "random": "#f29900"}


class Row(BaseModel):
    """One method: its figures by seed; ``kind`` is baseline, pretrained or random."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    figures: tuple[dict[str, float], ...]
    seconds: float
    lr: float | None = None
    trained: int | None = None
    parameters: int | None = None

    def mean(self, metric: str) -> float:
        return fmean(each[metric] for each in self.figures)

    def deviation(self, metric: str) -> float:
        values = [each[metric] for each in self.figures]
        return stdev(values) if len(values) > 1 else 0.0


class Report(BaseModel):
    """A recipe's results. ``n`` counts training, validation and test samples of the first seed."""

    model_config = ConfigDict(frozen=True)

    name: str
    modality: str
    task: Task
    data: str
    n: tuple[int, int, int]
    seeds: tuple[int, ...]
    layers: int | None
    trains: str
    rows: tuple[Row, ...]
    machine: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report in a folder; a ConfigError if there is none."""
        path = folder / f"{NAME}.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: {NAME}.json is missing; run `mico-chat finetune` first")
        return cls.model_validate_json(path.read_bytes())

    @property
    def metric(self) -> str:
        return METRICS[self.task][0]

    def best(self, kind: str) -> Row | None:
        rows = [row for row in self.rows if row.kind == kind]
        return min(rows, key=lambda row: loss(row, self.metric), default=None)


def machine() -> dict[str, str]:
    """Processor, threads, date and the versions that matter."""
    import torch

    return {
        "cpu": processor()[0],
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "date": datetime.date.today().isoformat(),
        **{name: version(name) for name in ("torch", "transformers", "timm", "scikit-learn")},
    }


def loss(row: Row, metric: str) -> float:
    """The mean of a figure, negative where a larger one is better."""
    return row.mean(metric) * (-1 if metric in LARGER_IS_BETTER else 1)


def shown(value: float, metric: str) -> str:
    """A share in percent, anything else with three decimals."""
    return f"{100 * value:.1f}" if metric in SHARES else f"{value:.3f}"


def cell(row: Row, metric: str) -> str:
    mean = shown(row.mean(metric), metric)
    return f"{mean} ± {shown(row.deviation(metric), metric)}" if len(row.figures) > 1 else mean


def arrow(metric: str) -> str:
    return f"{metric} {'↑' if metric in LARGER_IS_BETTER else '↓'}"


def markdown(report: Report) -> str:
    """One report as a table, a row a method."""
    metrics = METRICS[report.task]
    train, validation, test = report.n
    blocks = "all blocks" if report.layers is None else f"the first {report.layers} blocks"
    lines = [
        f"### {report.data}",
        "",
        f"{report.modality}, {report.task}; {train} / {validation} / {test} samples to train, "
        f"validate, test; {blocks}; trains: {report.trains}; seeds "
        f"{', '.join(map(str, report.seeds))}, mean ± deviation.",
        "",
        f"| method | {' | '.join(map(arrow, metrics))} | lr | trained weights | seconds |",
        f"|---|{'---:|' * (len(metrics) + 3)}",
    ]
    for row in report.rows:
        lr = "" if row.lr is None else f"{row.lr:g}"
        trained = "" if row.trained is None else f"{row.trained:,}"
        cells = " | ".join(cell(row, metric) for metric in metrics)
        lines.append(f"| {row.name} | {cells} | {lr} | {trained} | {row.seconds:.1f} |")
    return "\n".join(lines) + "\n"


def summary(reports: Sequence[Report]) -> str:
    """Several reports: a row a data set, then the table of each."""
    lines = [
        "# Ten modalities",
        "",
        "What the shared encoder does with data it was not pretrained on, beside the best simple",
        "baseline and beside random weights in place of its pretrained blocks. Mean ± deviation",
        "over the seeds; bold: the best of the row. `docs/modalities.md` says how to read it.",
        "",
        "| modality | data | test n | figure | best baseline | MiCo, pretrained | MiCo, random |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for report in reports:
        metric = report.metric
        kinds = [report.best(kind) for kind in COLOURS]
        there = [row for row in kinds if row is not None]
        best = min(there, key=lambda row: loss(row, metric)).mean(metric)
        cells = dict.fromkeys(COLOURS, "")
        for row in there:
            wins = shown(row.mean(metric), metric) == shown(best, metric)
            text = f"**{cell(row, metric)}**" if wins else cell(row, metric)
            cells[row.kind] = text + (f"<br>{row.name}" if row.kind == "baseline" else "")
        data, _, rest = report.data.partition(",")
        lines.append(
            f"| {report.modality} | {data}{' (' + report.task + ')' if rest else ''} | "
            f"{report.n[2]} | {arrow(metric)} | {' | '.join(cells.values())} |"
        )
    made = dict(reports[0].machine)
    cpu, cores, threads, date = (made.pop(key) for key in ("cpu", "cores", "threads", "date"))
    versions = ", ".join(f"{name} {version}" for name, version in made.items())
    lines += [
        "",
        f"{cpu}, {cores} cores, {threads} thread(s), {date}; {versions}.",
        "",
        *(markdown(report) for report in reports),
    ]
    return "\n".join(lines).rstrip() + "\n"


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars a method, a panel a data set, with the deviation over the seeds."""
    columns = min(3, len(reports))
    lines = -(-len(reports) // columns)
    figure = Figure(figsize=(5.4 * columns, 2.6 * lines), dpi=110)
    FigureCanvasAgg(figure)
    for number, report in enumerate(reports, 1):
        axes = figure.add_subplot(lines, columns, number)
        scale = 100 if report.metric in SHARES else 1
        rows = report.rows[::-1]
        means = [scale * row.mean(report.metric) for row in rows]
        errors = [scale * row.deviation(report.metric) for row in rows]
        axes.barh(
            [row.name for row in rows], means, xerr=errors, color=[COLOURS[r.kind] for r in rows]
        )
        axes.set_title(f"{report.modality}: {report.data.split(',')[0]}", fontsize=9)
        better = "higher" if report.metric in LARGER_IS_BETTER else "lower"
        unit = " (%)" if scale == 100 else ""
        axes.set_xlabel(f"{report.metric}{unit}, {better} is better", fontsize=8)
        axes.tick_params(labelsize=7.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def write_report(report: Report, folder: Path) -> None:
    content = report.model_dump_json(indent=1)
    (folder / f"{NAME}.json").write_text(content + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
    plot([report], folder / f"{NAME}.png")


def main() -> None:
    """The table of several runs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `mico-chat finetune`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the table to")
    asked = parser.parse_args()
    reports = [Report.read(folder) for folder in asked.runs]
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "modalities.md").write_text(summary(reports), encoding="utf-8")
    content = json.dumps([report.model_dump(mode="json") for report in reports], indent=1)
    (asked.output / "modalities.json").write_text(content + "\n", encoding="utf-8")
    plot(reports, asked.output / "modalities.png")


if __name__ == "__main__":
    main()


def score(task: Task, samples: Sequence[Sample], predicted: Sequence[Any]) -> dict[str, float]:
    """The figures of predictions: a class, a number, or steps (H, C) for each sample.

    The targets of a forecast are steps (H, C) on the scale of ``predicted``.
    """
    if task == "classification":
        truth = [str(sample.target) for sample in samples]
        return {
            "accuracy": float(accuracy_score(truth, list(predicted))),
            "macro F1": float(f1_score(truth, list(predicted), average="macro", zero_division=0)),
        }
    truth_array = targets(samples)
    errors = truth_array - np.asarray(predicted, dtype=np.float64).reshape(truth_array.shape)
    squares, sizes = float(np.mean(errors**2)), float(np.mean(np.abs(errors)))
    if task == "forecasting":
        return {"MSE": squares, "MAE": sizes}
    r2 = float(r2_score(truth_array, truth_array - errors)) if len(truth_array) > 1 else 0.0
    return {"RMSE": squares**0.5, "MAE": sizes, "R2": r2}


def targets(samples: Sequence[Sample]) -> Array:
    return np.array([np.asarray(sample.target, dtype=np.float64) for sample in samples])

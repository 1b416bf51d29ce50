"""The figures of predictions; the table of a recipe, and of several: JSON, Markdown, a picture.

``python -m mico_research.finetune.report runs/modality-* --output OUTPUT`` makes the
table of several runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, r2_score

from mico_chat.errors import ConfigError
from mico_research.modalities.samples import Array, Sample, Task, labels_of
from mico_training.records import markdown_table, panels, spread, write_json

NAME = "results"
METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "macro F1"),
    "multi-label": ("mAP",),
    "re-identification": ("R@1", "mAP"),
    "regression": ("RMSE", "MAE", "R2"),
    "forecasting": ("MSE", "MAE"),
}
SHARES = frozenset({"accuracy", "macro F1", "mAP", "R@1"})
LARGER_IS_BETTER = SHARES | {"R2"}
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

    def of(self, metric: str) -> list[float]:
        return [each[metric] * (100 if metric in SHARES else 1) for each in self.figures]

    def loss(self, metric: str) -> float:
        """The mean of a figure, negative where a larger one is better."""
        return fmean(self.of(metric)) * (-1 if metric in LARGER_IS_BETTER else 1)

    def shown(self, metric: str) -> str:
        return spread(self.of(metric), 1 if metric in SHARES else 3)


class Report(BaseModel):
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
    machine: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        path = folder / f"{NAME}.json"
        if not path.is_file():
            raise ConfigError(f"{folder}: {NAME}.json is missing; run `mico-chat finetune` first")
        return cls.model_validate_json(path.read_bytes())

    @property
    def metric(self) -> str:
        return METRICS[self.task][0]

    def best(self, kind: str) -> Row | None:
        rows = [row for row in self.rows if row.kind == kind]
        return min(rows, key=lambda row: row.loss(self.metric), default=None)


def arrow(metric: str) -> str:
    return f"{metric} {'↑' if metric in LARGER_IS_BETTER else '↓'}"


def markdown(report: Report) -> str:
    metrics = METRICS[report.task]
    train, validation, test = report.n
    blocks = "all blocks" if report.layers is None else f"the first {report.layers} blocks"
    titles = ["method", *map(arrow, metrics), "lr", "trained weights", "seconds"]
    rows = [
        [
            row.name,
            *map(row.shown, metrics),
            "" if row.lr is None else f"{row.lr:g}",
            "" if row.trained is None else f"{row.trained:,}",
            f"{row.seconds:.1f}",
        ]
        for row in report.rows
    ]
    return (
        f"### {report.data}\n\n"
        f"{report.modality}, {report.task}; {train} / {validation} / {test} samples to train, "
        f"validate, test; {blocks}; trains: {report.trains}; seeds "
        f"{', '.join(map(str, report.seeds))}, mean ± deviation.\n\n"
        f"{markdown_table(titles, rows, texts=1)}\n"
    )


HEAD = """# Ten modalities

What the shared encoder does with data it was not pretrained on, beside the best simple
baseline and beside random weights in place of its pretrained blocks. Mean ± deviation
over the seeds; bold: the best of the row. `docs/modalities.md` says how to read it.
"""


def summary(reports: Sequence[Report]) -> str:
    titles = ["modality", "data", "figure", "test n", "best baseline", "MiCo, pretrained"]
    rows = []
    for report in reports:
        there = [row for row in map(report.best, COLOURS) if row is not None]
        best = min(there, key=lambda row: row.loss(report.metric)).shown(report.metric)
        cells = dict.fromkeys(COLOURS, "")
        for row in there:
            text = row.shown(report.metric)
            text = f"**{text}**" if text.split()[0] == best.split()[0] else text
            cells[row.kind] = text + (f"<br>{row.name}" if row.kind == "baseline" else "")
        data, _, rest = report.data.partition(",")
        data += f" ({report.task})" if rest else ""
        own = [report.modality, data, arrow(report.metric), str(report.n[2])]
        rows.append([*own, *cells.values()])
    parts = [HEAD, markdown_table([*titles, "MiCo, random"], rows, texts=3)]
    return "\n".join([*parts, f"\n{reports[0].machine}.\n", *map(markdown, reports)])


def plot(reports: Sequence[Report], path: Path) -> None:
    """A panel for each data set with a bar for each method: mean and deviation over the seeds."""
    with panels(path, len(reports), columns=3, size=(5.4, 2.6)) as drawn:
        for axes, report in zip(drawn, reports, strict=True):
            for row in report.rows[::-1]:
                values = row.of(report.metric)
                error = stdev(values) if len(values) > 1 else 0
                axes.barh(row.name, fmean(values), xerr=error, color=COLOURS[row.kind])
            axes.set_title(f"{report.modality}: {report.data.split(',')[0]}", fontsize=9)
            unit = " (%)" if report.metric in SHARES else ""
            axes.set_xlabel(arrow(report.metric) + unit, fontsize=8)
            axes.tick_params(labelsize=7.5)


def write_report(report: Report, folder: Path) -> None:
    write_json(folder / f"{NAME}.json", report.model_dump(mode="json"))
    (folder / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
    plot([report], folder / f"{NAME}.png")


def found_again(
    samples: Sequence[Sample], vectors: Sequence[Any], trials: int = 0
) -> dict[str, float]:
    """R@1 and mAP of persons between cameras, by the cosine of vectors (P,).

    A query is ranked against all pictures that are no queries, less those of its person by its own
    camera. With ``trials``, each trial's gallery has one picture of each person by each camera,
    drawn anew, as in SYSU-MM01's single shot.
    """
    points = np.stack([np.asarray(one, np.float64) / np.linalg.norm(one) for one in vectors])
    persons, cameras = (
        np.array([str(x) for x in of])
        for of in zip(*((s.target, s.camera) for s in samples), strict=True)
    )
    is_query = np.array([sample.query for sample in samples])
    hits, precisions = [], []
    for trial in range(max(1, trials)):
        shown = np.flatnonzero(~is_query)
        if trials:
            mixed = np.random.default_rng(trial).permutation(shown)
            pairs = np.stack([persons[mixed], cameras[mixed]], 1)
            shown = mixed[np.unique(pairs, axis=0, return_index=True)[1]]
        for query in np.flatnonzero(is_query):
            same = persons[shown] == persons[query]
            there = ~(same & (cameras[shown] == cameras[query]))
            if (same & there).any():
                scores = points[shown[there]] @ points[query]
                # A wrong picture that is as near counts as nearer.
                hits.append(scores[same[there]].max() > scores[~same[there]].max(initial=-np.inf))
                precisions.append(average_precision_score(same[there], scores))
    if not hits:
        raise samples[0].error("no person of a query has a picture by another camera")
    return {"R@1": float(np.mean(hits)), "mAP": float(np.mean(precisions))}


def score(
    task: Task, samples: Sequence[Sample], predicted: Sequence[Any], classes: Sequence[str] = ()
) -> dict[str, float]:
    """The figures of predictions: a class, a number, or steps (H, C) for each sample.

    The targets of a forecast are steps (H, C) on the scale of ``predicted``. Of a multi-label task
    each prediction has a score for each of the ``classes``; mAP is the mean over those that at
    least one sample has.
    """
    if task == "multi-label":
        right = np.array([np.isin(classes, labels_of(sample)) for sample in samples])
        known = right.any(0)
        if not known.any():
            return {"mAP": 0.0}
        scores = np.array(predicted)[:, known]
        return {"mAP": float(average_precision_score(right[:, known], scores, average="macro"))}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of `mico-chat finetune`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the table to")
    asked = parser.parse_args()
    reports = [Report.read(folder) for folder in asked.runs]
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "modalities.md").write_text(summary(reports), encoding="utf-8")
    content = [report.model_dump(mode="json") for report in reports]
    write_json(asked.output / "modalities.json", content)
    plot(reports, asked.output / "modalities.png")


if __name__ == "__main__":
    main()

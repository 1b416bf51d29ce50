"""An evaluation's folder: results.json, table.md, the answers for people to read, and charts."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.scores import CONFIDENCE, Row, answers
from mico_chat.evaluation.store import PREDICTIONS, VERDICTS

LEFT_OUT = {
    "broken": ("broken and not counted", PREDICTIONS),
    "refused": ("refused by the model and not counted", PREDICTIONS),
    "unjudged": ("without a verdict and not counted", VERDICTS),
}
"""The words for items without a figure, and the file that names all of them."""
SHOWN = 5


def read_report(folder: Path) -> dict[str, Any]:
    """The results of a folder; empty if there are none yet."""
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


def write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(tables(report) + "\n", encoding="utf-8")
    for name, row in report.get("skills", {}).items():
        lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in answers(folder / name)]
        (folder / name / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        plot_skills(folder / f"{name}.png", name, row)
    if any(row["figure"] is not None for row in report.get("tasks", {}).values()):
        plot_tasks(folder / "radar.png", report["tasks"])


def tables(report: dict[str, Any]) -> str:
    found = [skills_table(name, row) for name, row in report.get("skills", {}).items()]
    return "\n\n".join(found + ([tasks_table(report["tasks"])] if "tasks" in report else []))


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[str(text).replace("|", "\\|") for text in row] for row in (titles, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(titles), *lines[1:]]


def _first(named: list[str], count: int, file: str) -> str:
    more = count - len(named[:SHOWN])
    return "; ".join(named[:SHOWN]) + (f"; and {more} more in {file}" if more else "")


def skills_table(name: str, row: Row) -> str:
    lines = [
        f"**{name}** ({row['digest']}): {row['model']}, {row['run']['how']}; "
        f"{row['seconds']:.0f} s; right answers with {CONFIDENCE:.0%} intervals (Wilson)",
        "",
    ]
    rows = []
    for skill, figures in row["skills"].items():
        chance = "" if figures["chance"] is None else f"{100 * figures['chance']:.0f} %"
        cells = [cell(figures, control) for control in row["controls"]]
        rows.append([skill, figures["n"], chance, *cells])
    lines += _table(["skill", "n", "chance", *row["controls"]], rows)
    for kind in ("refused", "broken"):
        if count := row[kind]["count"]:
            named = _first(row[kind]["first"], count, PREDICTIONS)
            lines += ["", f"{count} {kind} and not counted: {named}"]
    return "\n".join(lines)


def cell(skill: Mapping[str, Any], control: str) -> str:
    """``61 % (48-73)``, and the number of answers if some items have none."""
    figures = skill["controls"].get(control)
    if figures is None:
        return ""
    if figures["accuracy"] is None:
        return ", ".join(f"{figures[k]} {k}" for k in ("refused", "broken") if figures[k])
    right, low, high = (100 * figures[key] for key in ("accuracy", "low", "high"))
    text = f"{right:.0f} % ({low:.0f}-{high:.0f})"
    return text if figures["n"] == skill["n"] else f"{text} of {figures['n']}"


def tasks_table(rows: Mapping[str, Row]) -> str:
    cells, notes = [], []
    for name, row in rows.items():
        left = [name, row["metric"], _shown(row["figure"]), _paper(row), row["items"]]
        cells.append([*left, row["broken"], f"{row['seconds']:.0f}", row["model"], row["protocol"]])
        also = {} if row["paper"] is None else row["paper"]["also"]
        if len(row["figures"]) > 1:
            figures = ", ".join(
                f"{key} {_shown(value)}" + (f" (paper {also[key]:.1f})" if key in also else "")
                for key, value in row["figures"].items()
            )
            notes.append(f"- {name}: {figures}")
        # One line for all metrics that are missing for the same reason.
        for why in dict.fromkeys(row["missing"].values()):
            keys = [key for key, reason in row["missing"].items() if reason == why]
            notes.append(f"- {name}: no {', '.join(keys)}: {why}")
        for kind, (words, file) in LEFT_OUT.items():
            if row[kind]:
                named = _first(row[f"{kind}_first"], row[kind], file)
                notes.append(f"- {name}: {row[kind]} {words}: {named}")
    titles = ["task", "metric", "ours", "paper", "items", "broken", "seconds", "model", "protocol"]
    return "\n".join([*_table(titles, cells), *([""] if notes else []), *notes])


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1f}"


def _paper(row: Row) -> str:
    return "" if row["paper"] is None else _shown(row["paper"]["figure"])


# --- charts -------------------------------------------------------------------------------------


def plot_skills(path: Path, name: str, row: Row) -> None:
    """Bars of each skill under each control with their intervals, and a line at chance."""
    from matplotlib.figure import Figure

    skills: dict[str, Row] = row["skills"]
    controls: list[str] = row["controls"]
    figure = Figure((max(6.0, 0.9 * len(skills)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(controls)
    for number, control in enumerate(controls):
        found = [skill["controls"].get(control) for skill in skills.values()]
        there = [(i, f) for i, f in enumerate(found) if f is not None and f["accuracy"] is not None]
        below = [max(0.0, 100 * (f["accuracy"] - f["low"])) for _, f in there]
        above = [max(0.0, 100 * (f["high"] - f["accuracy"])) for _, f in there]
        axes.bar(
            [i + number * width for i, _ in there],
            [100 * f["accuracy"] for _, f in there],
            width,
            label=control,
            yerr=(below, above) if there else None,
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
    chances = [(i, 100 * s["chance"]) for i, s in enumerate(skills.values()) if s["chance"]]
    if chances:
        left = [i - width / 2 for i, _ in chances]
        right = [i + 0.8 - width / 2 for i, _ in chances]
        axes.hlines([c for _, c in chances], left, right, "black", "dashed", label="chance")
    places = [i + 0.4 - width / 2 for i in range(len(skills))]
    axes.set_xticks(places, list(skills), rotation=30, ha="right")
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    figure.suptitle(f"{name} ({row['digest']}): {row['model']}", fontsize="medium")
    axes.legend(
        ncols=len(controls) + 1, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, 1.12)
    )
    figure.savefig(path, dpi=120)


def plot_tasks(path: Path, rows: Mapping[str, Row]) -> None:
    """A radar of all tasks; an axis ends at 100 or at the greater of our and the paper's figure."""
    from matplotlib.figure import Figure

    shown = {name: row for name, row in rows.items() if row["figure"] is not None}
    figure = Figure((10, 9), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * number / len(shown) for number in range(len(shown))]
    ours, papers, labels = [], [], []
    for name, row in shown.items():
        value = row["figure"]
        paper = math.nan if row["paper"] is None else row["paper"]["figure"]
        most = max(100.0, value, 0.0 if math.isnan(paper) else paper)
        ours.append(value / most)
        papers.append(paper / most)
        labels.append(f"{name}\n{value:.1f}" + (f" / {_paper(row)}" if _paper(row) else ""))
    for label, values, marker in (("ours", ours, "o"), ("paper", papers, "s")):
        if not all(map(math.isnan, values)):
            axes.plot([*angles, angles[0]], [*values, values[0]], marker=marker, label=label)
    axes.fill(angles, ours, alpha=0.15)
    axes.set_xticks(angles, labels, fontsize="small")
    axes.tick_params(axis="x", pad=6)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        across = math.cos(angle)
        side = "left" if across > 0 else "right"
        text.set_horizontalalignment("center" if abs(across) < 0.05 else side)
    axes.set_ylim(0, 1.05)
    axes.set_yticklabels([])
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, 1.1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


# --- two reports side by side -------------------------------------------------------------------


def compare(first: Path, second: Path) -> str:
    """The figures of two output folders as Markdown, and their difference where items are equal."""
    a, b = (read_report(folder) for folder in (first, second))
    for folder, report in ((first, a), (second, b)):
        if not report:
            raise DataError(folder, None, "results.json is missing or empty")
    parts = [
        _compared_skills(name, row, b["skills"][name])
        for name, row in a.get("skills", {}).items()
        if name in b.get("skills", {})
    ]
    both = {n: (r, b["tasks"][n]) for n, r in a.get("tasks", {}).items() if n in b.get("tasks", {})}
    if both:
        parts.append(_compared_tasks(both))
    if not parts:
        has = [", ".join([*r.get("skills", {}), *r.get("tasks", {})]) or "nothing" for r in (a, b)]
        raise ConfigError(f"{first} has {has[0]}, {second} has {has[1]}: no result is in both")
    return "\n\n".join(parts)


def _compared_skills(name: str, a: Row, b: Row) -> str:
    controls = [control for control in a["controls"] if control in b["controls"]]
    of = [f"{row['model']} ({row['run']['how']})" for row in (a, b)]
    rows, others = [], []
    for skill, of_a in a["skills"].items():
        of_b = b["skills"].get(skill)
        if of_b is None:
            continue
        if of_a["digest"] != of_b["digest"]:
            others.append(f"{skill} ({of_a['n']} and {of_b['n']})")
            continue
        row = [skill, of_a["n"]]
        for control in controls:
            row += [cell(of_a, control), cell(of_b, control), _points(of_a, of_b, control)]
        rows.append(row)
    columns = [title for c in controls for title in (f"{c} A", f"{c} B", "B - A")]
    lines = [f"**{name}**: A is {of[0]}, B is {of[1]}", ""]
    return "\n".join([*lines, *_table(["skill", "n", *columns], rows), *_not_compared(others)])


def _points(a: Row, b: Row, control: str) -> str:
    of_a, of_b = a["controls"].get(control), b["controls"].get(control)
    if of_a is None or of_b is None or of_a["accuracy"] is None or of_b["accuracy"] is None:
        return ""
    if of_a["n"] != of_b["n"]:
        return "other items"
    return f"{100 * (of_b['accuracy'] - of_a['accuracy']):+.0f}"


def _compared_tasks(both: Mapping[str, tuple[Row, Row]]) -> str:
    rows, others = [], []
    for name, (a, b) in both.items():
        figures = [row["figure"] for row in (a, b)]
        difference = ""
        if any(a["run"][key] != b["run"][key] for key in ("data", "items")):
            others.append(name)
        elif a["judge"] != b["judge"]:
            difference = "other judge"
        elif any(a[kind] != b[kind] for kind in LEFT_OUT):
            difference = "other items"
        elif None not in figures:
            difference = f"{figures[1] - figures[0]:+.1f}"
        rows.append([name, a["metric"], *map(_shown, figures), difference, _paper(a)])
    titles = ["task", "metric", "A", "B", "B - A", "paper"]
    return "\n".join([*_table(titles, rows), *_not_compared(others)])


def _not_compared(others: list[str]) -> list[str]:
    return ["", f"Not compared, because the items differ: {', '.join(others)}"] if others else []


def machine() -> str:
    import torch
    import transformers

    from mico_chat.engine.cpu import processor

    return (
        f"{processor()[0]}, {torch.get_num_threads()} threads, {date.today()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )

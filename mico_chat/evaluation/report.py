"""What an evaluation writes: results.json, table.md, all answers with their marks, and charts."""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.checkpoints.marks import KINDS
from mico_chat.engine.cpu import processor
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.datasets.files import read_object
from mico_chat.evaluation.scores import CONFIDENCE, RIGHT, Row, answers
from mico_chat.evaluation.store import PREDICTIONS, VERDICTS

LEFT_OUT = {
    "broken": ("broken and not counted", PREDICTIONS),
    "refused": ("refused by the model and not counted", PREDICTIONS),
    "unjudged": ("without a verdict and not counted", VERDICTS),
}
"""Why items have no figure, and the file that names all of these items."""
SHOWN = 5
"""The number of these items that a table names."""


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a folder's results.json; empty without the file."""
    path = folder / "results.json"
    return read_object(path) if path.is_file() else {}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(tables(report) + "\n", encoding="utf-8")
    for name, row in report.get("skills", {}).items():
        lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in answers(folder / name)]
        (folder / name / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        plot_skills(folder / f"{name}.png", name, row)
        if row["confidence"] is not None:
            plot_confidence(folder / f"{name}-confidence.png", name, row)
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
    if row["confidence"] is not None:
        lines += ["", *_confidence_table(row["confidence"])]
    return "\n".join(lines)


def _confidence_table(row: Row) -> list[str]:
    """How many answers about media are at or above the mark, and how many of them are right."""
    mark, title = row["mark"], "at or above the mark"
    if mark is None:
        first = f"no mark: of the surest answers about media, fewer than {RIGHT} % are right"
    else:
        title = f"at or above {mark}"
        first = (
            f'`"unsure_below": {mark}` in generation_config.json marks answers about media as '
            f"unsure; of those without the mark, at least {RIGHT} % are right here"
        )
    rows = []
    for name, of_skill in {**row["skills"], "all": row}.items():
        n, kept, right = (of_skill[key] for key in ("n", "kept", "kept_right"))
        shares = (_share(of_skill["right"], n), _share(kept, n), _share(right, kept))
        rows.append([name, n, *shares])
    table = _table(["skill", "n", "right", title, "of these right"], rows)
    of_kinds = row.get("answers")  # runs of before lack them
    return [first, "", *table, *(_marks_table(of_kinds) if of_kinds else ())]


def _marks_table(of_kinds: Row) -> list[str]:
    """A mark for each kind of answer, and how good the marks of one half are for the other."""
    below = {KINDS[name]: 1.0 if r["mark"] is None else r["mark"] for name, r in of_kinds.items()}
    rows = []
    whole = {k: sum(r[k] for r in of_kinds.values()) for k in ("n", "right", "kept", "kept_right")}
    for name, r in {**of_kinds, "all": {"mark": "", **whole}}.items():
        mark = "none" if r["mark"] is None else r["mark"]
        shares = (_share(r["right"], r["n"]), _share(r["kept"], r["n"]))
        rows.append([name, r["n"], mark, *shares, _share(r["kept_right"], r["kept"])])
    titles = ["answer", "n", "mark", "right", "unmarked by the other half's mark", "of these right"]
    said = f'A mark for each kind of answer: `"unsure_below": {json.dumps(below)}`'
    return ["", said, "", *_table(titles, rows)]


def _share(count: int, n: int) -> str:
    return f"{100 * count / n:.0f} % ({count} of {n})" if n else ""


def cell(skill: Mapping[str, Any], control: str) -> str:
    """Text such as ``61 % (48-73)``; if some items have no answer, the number of answers too."""
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
        data = row.get("trained_on")  # tables of before lack it
        left.append("unknown" if data is None else "yes" if data else "no")
        notes += [f"- {name}: trained on {one}" for one in data or ()]
        cells.append([*left, row["broken"], f"{row['seconds']:.0f}", row["model"], row["protocol"]])
        if row["beside"] or len(row["figures"]) > 1:
            notes.append(f"- {name}: {', '.join(_with(row, key) for key in row['figures'])}")
        # Metrics with the same reason share a line.
        for why in dict.fromkeys(row["missing"].values()):
            keys = [key for key, reason in row["missing"].items() if reason == why]
            notes.append(f"- {name}: no {', '.join(keys)}: {why}")
        for kind, (words, file) in LEFT_OUT.items():
            if row[kind]:
                named = _first(row[f"{kind}_first"], row[kind], file)
                notes.append(f"- {name}: {row[kind]} {words}: {named}")
    peers = (peer for row in rows.values() for peer in row["peers"].items())
    notes += dict.fromkeys(f"- {model}: {figure['place']}" for model, figure in peers)
    titles = ["task", "metric", "ours", "paper", "items", "trained on", "broken"]
    titles += ["seconds", "model", "protocol"]
    return "\n".join([*_table(titles, cells), *([""] if notes else []), *notes])


def _with(row: Row, key: str) -> str:
    """A figure with what stands beside it: ``R@1 61.0 (52.0-70.0, swapped 1.9, chance 2.0)``."""
    said = [] if row["paper"] is None else [("paper ", [row["paper"]["also"].get(key)])]
    beside = row["beside"].get(key, {})
    said += [("", beside.get("interval", [None]))]
    said += [(f"{name} ", [beside.get(name)]) for name in ("swapped", "withheld", "chance")]
    texts = [name + "-".join(map(_shown, values)) for name, values in said if None not in values]
    return f"{key} {_shown(row['figures'][key])}" + f" ({', '.join(texts)})" * bool(texts)


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.1f}"


def _paper(row: Row) -> str:
    """The published figures: MiCo's, and those of other models by their names."""
    mico = [] if row["paper"] is None else [_shown(row["paper"]["figure"])]
    peers = row.get("peers", {}).items()
    return ", ".join([*mico, *(f"{model} {_shown(peer['figure'])}" for model, peer in peers)])


# --- charts -------------------------------------------------------------------------------------


def plot_skills(path: Path, name: str, row: Row) -> None:
    """A bar with its interval for each skill under each control, and a line at chance."""
    from matplotlib.figure import Figure

    skills: dict[str, Row] = row["skills"]
    controls: list[str] = row["controls"]
    figure = Figure((max(6.0, 0.9 * len(skills)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(controls)
    places = np.arange(len(skills)) + 0.4 - width / 2
    for number, control in enumerate(controls):
        found = [skill["controls"].get(control, {}) for skill in skills.values()]
        right, low, high = (_per_cent(found, key) for key in ("accuracy", "low", "high"))
        axes.bar(
            np.arange(len(skills)) + number * width,
            right,
            width,
            label=control,
            yerr=np.clip([right - low, high - right], 0, None),
            error_kw={"elinewidth": 0.8, "ecolor": "0.3"},
        )
    chance = _per_cent(list(skills.values()), "chance")
    if not np.isnan(chance).all():
        axes.hlines(chance, places - 0.4, places + 0.4, "black", "dashed", label="chance")
    axes.set_xticks(places, list(skills), rotation=30, ha="right")
    axes.set(ylabel="right answers, %", ylim=(0, 100))
    figure.suptitle(f"{name} ({row['digest']}): {row['model']}", fontsize="medium")
    above: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.12)}
    axes.legend(ncols=len(controls) + 1, fontsize="small", **above)
    figure.savefig(path, dpi=120)


def plot_confidence(path: Path, name: str, row: Row) -> None:
    """How many answers of each confidence are right, and the mark."""
    from matplotlib.figure import Figure

    found: Row = row["confidence"]
    n, right = (np.array([one[key] for one in found["bins"]]) for key in ("n", "right"))
    edges = np.linspace(0, 1, len(n) + 1)
    figure = Figure((6.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    shown = n > 0
    share = 100 * right[shown] / n[shown]
    bars = axes.bar(edges[:-1][shown], share, 1 / len(n), align="edge", edgecolor="white")
    axes.bar_label(bars, [str(count) for count in n[shown]], fontsize="small")
    axes.plot([0, 1], [0, 100], "0.5", linestyle="dotted", label="as many as the confidence")
    if (mark := found["mark"]) is not None:
        axes.axvline(mark, color="black", linestyle="dashed", label=f"mark {mark}")
    label = "right answers, %; above each bar the number of answers"
    axes.set(xlim=(0, 1), ylim=(0, 108), xlabel="confidence", ylabel=label)
    axes.legend(fontsize="small", loc="upper left")
    figure.suptitle(f"{name} ({row['digest']}): {row['model']}", fontsize="medium")
    figure.savefig(path, dpi=120)


def _per_cent(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    """The values at a key times 100; NaN where there is none."""
    return 100 * np.array([row.get(key) for row in rows], np.float64)


def plot_tasks(path: Path, rows: Mapping[str, Row]) -> None:
    """A radar of all tasks. An axis ends at 100, or at the larger figure if it is above 100."""
    from matplotlib.figure import Figure

    shown = {name: row for name, row in rows.items() if row["figure"] is not None}
    figure = Figure((10, 9), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(shown), endpoint=False)
    ours = np.array([row["figure"] for row in shown.values()], np.float64)
    papers = np.array([(row["paper"] or {}).get("figure") for row in shown.values()], np.float64)
    most = np.fmax(np.fmax(ours, papers), 100)
    for label, values, marker in (("ours", ours / most, "o"), ("paper", papers / most, "s")):
        if not np.isnan(values).all():
            axes.plot([*angles, angles[0]], [*values, values[0]], marker=marker, label=label)
    axes.fill(angles, ours / most, alpha=0.15)
    figures = [(_shown(row["figure"]), _paper(row)) for row in shown.values()]
    labels = [f"{n}\n{' / '.join(filter(None, f))}" for n, f in zip(shown, figures, strict=True)]
    axes.set_xticks(angles, labels, fontsize="small")
    axes.tick_params(axis="x", pad=6)
    for across, text in zip(np.cos(angles), axes.get_xticklabels(), strict=True):
        side = "left" if across > 0 else "right"
        text.set_horizontalalignment("center" if abs(across) < 0.05 else side)
    axes.set(ylim=(0, 1.05), yticklabels=[])
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, 1.1))
    figure.savefig(path, dpi=120, bbox_inches="tight")


# --- two reports side by side -------------------------------------------------------------------


def compare(first: Path, second: Path) -> str:
    """The figures of two output folders as Markdown, with the difference where items are equal."""
    a, b = (read_report(folder) for folder in (first, second))
    for folder, report in ((first, a), (second, b)):
        if not report:
            raise DataError(folder, None, "results.json is missing or empty")
    (skills_a, tasks_a), (skills_b, tasks_b) = (
        (report.get("skills", {}), report.get("tasks", {})) for report in (a, b)
    )
    parts = [_compared_skills(n, row, skills_b[n]) for n, row in skills_a.items() if n in skills_b]
    if both := {name: (row, tasks_b[name]) for name, row in tasks_a.items() if name in tasks_b}:
        parts.append(_compared_tasks(both))
    if not parts:
        has = [", ".join(names) or "nothing" for names in (skills_a | tasks_a, skills_b | tasks_b)]
        raise ConfigError(f"{first} has {has[0]}, {second} has {has[1]}: no result is in both")
    return "\n\n".join(parts)


def _compared_skills(name: str, a: Row, b: Row) -> str:
    controls = [control for control in a["controls"] if control in b["controls"]]
    rows, others = [], []
    for skill, of_a in a["skills"].items():
        of_b = b["skills"].get(skill)
        if of_b is None:
            continue
        if of_a["digest"] != of_b["digest"]:
            others.append(f"{skill} ({of_a['n']} and {of_b['n']})")
            continue
        cells = [(cell(of_a, c), cell(of_b, c), _points(of_a, of_b, c)) for c in controls]
        rows.append([skill, of_a["n"], *chain(*cells)])
    columns = [title for c in controls for title in (f"{c} A", f"{c} B", "B - A")]
    of = [f"{row['model']} ({row['run']['how']})" for row in (a, b)]
    lines = [f"**{name}**: A is {of[0]}, B is {of[1]}", ""]
    return "\n".join([*lines, *_table(["skill", "n", *columns], rows), *_not_compared(others)])


def _points(a: Row, b: Row, control: str) -> str:
    of_a, of_b = (row["controls"].get(control, {"accuracy": None}) for row in (a, b))
    if of_a["accuracy"] is None or of_b["accuracy"] is None:
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

    return (
        f"{processor()[0]}, {torch.get_num_threads()} threads, {date.today()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )

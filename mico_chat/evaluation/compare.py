"""Two evaluations side by side, as far as they are of the same items."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.report import read_report
from mico_chat.evaluation.skill_scores import cell

Report = Mapping[str, Any]


def compare(first: Path, second: Path) -> str:
    """The figures of two output folders as Markdown.

    A difference is told where both are of the same items alone; where they are not, that is said.

    Raises:
        DataError: a folder has no results.
        ConfigError: the two have no set of items and no task in common.
    """
    reports = []
    for folder in (first, second):
        report = read_report(folder)
        if not report:
            raise DataError(folder, None, "results.json is missing or empty")
        reports.append(report)
    a, b = reports
    parts = [
        _skills(name, row, b["skills"][name])
        for name, row in a.get("skills", {}).items()
        if name in b.get("skills", {})
    ]
    both = {n: (r, b["tasks"][n]) for n, r in a.get("tasks", {}).items() if n in b.get("tasks", {})}
    if both:
        parts.append(_tasks(both))
    if not parts:
        raise ConfigError(
            f"{first} has {_names(a)}, {second} has {_names(b)}: no result is in both"
        )
    return "\n\n".join(parts)


def _names(report: Report) -> str:
    return ", ".join([*report.get("skills", {}), *report.get("tasks", {})]) or "nothing"


def _skills(name: str, a: Report, b: Report) -> str:
    controls = [control for control in a["controls"] if control in b["controls"]]
    lines = [
        f"**{name}**: A is {a['model']} ({a['run']['how']}), B is {b['model']} ({b['run']['how']})",
        "",
        "| skill | n | " + " | ".join(f"{c} A | {c} B | B - A" for c in controls) + " |",
        "|---|---|" + "---|---|---|" * len(controls),
    ]
    others = []
    for skill, of_a in a["skills"].items():
        of_b = b["skills"].get(skill)
        if of_b is None:
            continue
        if of_a["digest"] != of_b["digest"]:
            others.append(f"{skill} ({of_a['n']} and {of_b['n']})")
            continue
        cells = [f"| {skill}", str(of_a["n"])]
        for control in controls:
            cells += [cell(of_a, control), cell(of_b, control), _difference(of_a, of_b, control)]
        lines.append(" | ".join(cells) + " |")
    if others:
        lines += ["", f"Not compared, because the items differ: {', '.join(others)}"]
    return "\n".join(lines)


def _difference(a: Report, b: Report, control: str) -> str:
    """In points; nothing where one has no figure, or where they answered different numbers."""
    of_a, of_b = a["controls"].get(control), b["controls"].get(control)
    if of_a is None or of_b is None or of_a["accuracy"] is None or of_b["accuracy"] is None:
        return ""
    if of_a["n"] != of_b["n"]:
        return "other items"
    return f"{100 * (of_b['accuracy'] - of_a['accuracy']):+.0f}"


def _tasks(both: Mapping[str, tuple[Report, Report]]) -> str:
    lines = ["| task | metric | A | B | B - A | paper |", "|---|---|---|---|---|---|"]
    others = []
    for name, (a, b) in both.items():
        paper = "" if a["paper"] is None else f"{a['paper']['figure']:.1f}"
        figures = [row["figure"] for row in (a, b)]
        if any(a["run"][key] != b["run"][key] for key in ("data", "items")):
            others.append(name)
            difference = ""
        elif a["judge"] != b["judge"]:
            difference = "other judge"
        elif any(a[kind] != b[kind] for kind in ("broken", "refused", "unjudged")):
            difference = "other items"
        elif None in figures:
            difference = ""
        else:
            difference = f"{figures[1] - figures[0]:+.1f}"
        shown = ["-" if figure is None else f"{figure:.1f}" for figure in figures]
        lines.append(" | ".join([f"| {name}", a["metric"], *shown, difference, paper]) + " |")
    if others:
        lines += ["", f"Not compared, because the items differ: {', '.join(others)}"]
    return "\n".join(lines)

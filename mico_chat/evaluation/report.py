"""An evaluation's folder: results.json, table.md, the answers to items for people, and charts."""

from __future__ import annotations

import json
import platform
from datetime import date
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


def write_report(folder: Path, report: dict[str, Any], table: str) -> None:
    """Write everything about one evaluation into ``folder``, beside what is kept of its runs."""
    from mico_chat.evaluation import skill_scores
    from mico_chat.evaluation.tasks.report import plot_radar

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    for name, row in report.get("skills", {}).items():
        with (folder / name / "answers.jsonl").open("w", encoding="utf-8") as file:
            for answer in skill_scores.answers(folder / name):
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        skill_scores.plot(folder / f"{name}.png", name, row)
    if any(row["figure"] is not None for row in report.get("tasks", {}).values()):
        plot_radar(folder / "radar.png", report["tasks"])


def machine() -> str:
    """What a figure was measured on, and when."""
    import torch
    import transformers

    from mico_chat.engine.cores import processor

    return (
        f"{processor()[0]}, {torch.get_num_threads()} threads, {date.today()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )

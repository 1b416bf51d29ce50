"""How a study keeps and reports its runs; ablations and fine-tuning share it.

A run that has its result is never repeated. A run that was killed goes on from its last checkpoint;
the checkpoints go when the result is there. A lock keeps a second process from the same run, and
ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mico_chat.errors import ConfigError
from mico_training.recipe import changes

RESULT = "result.json"


def result_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run; a ConfigError if other settings made it."""
    path = folder / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_bytes())
    for key, (then, now) in changes(result, settings).items():
        raise ConfigError(
            f"{path}: it was made with {key} {then!r}, but now {key} is {now!r}; give the old "
            "settings, or another output folder"
        )
    return result


def run_once(
    folder: Path, settings: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of a run: from its folder, or else ``settings`` and the figures of ``work``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = result_of(folder, settings)
        if result is None:
            result = {**settings, **work()}
            write_json(folder / RESULT, result)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return result


def write_json(path: Path, content: Any) -> None:
    """Write a whole file or none."""
    partial = path.with_suffix(".part")
    text = json.dumps(content, indent=1, default=np.ndarray.tolist)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 0) -> str:
    """A Markdown table whose first ``texts`` columns are texts; figures stand on the right."""
    rule = ["---" if place < texts else "---:" for place in range(len(titles))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, rule, *rows))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and deviation, ``12.3 ± 0.4``; the mean alone of one value."""
    if not values:
        return "-"
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean

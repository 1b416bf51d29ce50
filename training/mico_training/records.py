"""What runs leave behind: one result each, Markdown tables of several, and pictures of figures.

Ablations and fine-tuning keep their results here. A run that has its result is never repeated. A
run that was killed goes on from its last checkpoint; the checkpoints go when the result is there. A
lock keeps a second process from the same run, and ends with the process that holds it.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mico_chat.errors import ConfigError
from mico_chat.system import lock
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
    """The result of a run: from its folder, or else ``settings`` and the figures of ``work``.

    Processes of a group call this together and work together; the first one reads and writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = is_first()
    with (folder / "lock").open("w") as file:
        if first:
            lock(file)
        (result,) = gathered([result_of(folder, settings)] if first else [])
        if result is None:
            (result,) = gathered([{**settings, **work()}][:first])
            if first:
                write_json(folder / RESULT, result)
        for checkpoint in folder.glob("checkpoint-*") if first else ():
            shutil.rmtree(checkpoint)
    return cast(dict[str, Any], result)


def is_first() -> bool:
    """Whether this process writes: it is alone, or the first one of its group."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gathered(own: list[Any]) -> list[Any]:
    """The lists of all processes of the group, one behind the other."""
    if not dist.is_initialized():
        return own
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, own)
    return list(chain(*each))


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
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="tight")
    drawn = [figure.add_subplot(rows, columns, place + 1) for place in range(number)]
    for axes in drawn:
        axes.grid(alpha=0.3)
    yield drawn
    for axes in drawn:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def plot_losses(history: Sequence[Mapping[str, float]], path: Path, title: str = "") -> None:
    """Draw ``loss`` and every ``*_loss`` of a log history over the steps, into a PNG.

    The thin line is the logged value, the thick line its exponential mean. Entries without a loss
    (the summary at the end of a run) are left out.
    """
    logged = [entry for entry in history if {"loss", "eval_loss"} & {*entry}]
    names = ["loss", *sorted({k for entry in logged for k in entry if k.endswith("_loss")})]
    with panels(path, size=(8.0, 4.5)) as (axes,):
        for number, name in enumerate(names):
            found = [(entry["step"], entry[name]) for entry in logged if name in entry]
            points = [(step, value) for step, value in found if math.isfinite(value)]
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

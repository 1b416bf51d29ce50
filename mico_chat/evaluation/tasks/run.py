"""Running tasks: what is read, what is asked of the model, and where it is kept."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from mico_chat.evaluation.tasks.datasets import DATASETS
from mico_chat.evaluation.tasks.loading import MediaPool
from mico_chat.evaluation.tasks.model import EvaluatedModel
from mico_chat.evaluation.tasks.predict import RERANKED, Run, predict
from mico_chat.evaluation.tasks.score import Result, score
from mico_chat.evaluation.tasks.store import Record, Store
from mico_chat.evaluation.tasks.task import Contents, Task


@dataclass(frozen=True)
class RunOptions:
    """How a task is run.

    ``limit``: its first items alone, 0 is all. ``batch_size``: media a step. ``workers``: processes
    that decode. ``frames`` and ``slices`` replace the task's; a limit or either of them makes
    another figure than the paper's, and the report says so.
    """

    limit: int = 0
    batch_size: int = 32
    workers: int = os.cpu_count() or 1
    frames: int | None = None
    slices: int | None = None

    def applied(self, task: Task) -> Task:
        """The task with its own frames and slices replaced."""
        frames = task.frames if self.frames is None else self.frames
        slices = task.slices if self.slices is None else self.slices
        return replace(task, frames=frames, slices=slices)


def run_task(
    task: Task, data: Path, model: EvaluatedModel, output: Path, options: RunOptions
) -> Result:
    """A task's figures; its predictions stay in ``output``, and what is there is not done again.

    Raises:
        DataError: the data set is missing or cannot be used.
        ConfigError: ``output`` holds the predictions of another model, task or setting.
    """
    task = options.applied(task)
    contents = DATASETS[task.dataset].read(data).first(options.limit)
    with (
        Store(output, _header(task, contents, model, options)) as store,
        MediaPool(task, model.preprocessing, options.workers) as pool,
    ):
        predict(Run(task, model, store, pool, options.batch_size), contents, output)
    return score(output)


def _header(task: Task, contents: Contents, model: EvaluatedModel, options: RunOptions) -> Record:
    """All that a figure depends on."""
    dtype = next(model.model.encoder.parameters()).dtype
    return {
        "task": task.name,
        "model": model.name,
        "weights": model.fingerprint(),
        "dtype": str(dtype).removeprefix("torch."),
        "frames": task.frames,
        "slices": task.slices,
        "resolution": model.resolution,
        "reranked": RERANKED,
        "text_length": task.text_length,
        "limit": options.limit,
        "items": len(contents.entries),
        "data": data_digest(contents),
    }


def data_digest(contents: Contents) -> str:
    """Names what is asked: ids and words, not where the media lie."""
    digest = hashlib.sha256()
    for entry in contents.entries:
        digest.update(repr((entry.id, entry.captions, entry.question, entry.answers)).encode())
    return digest.hexdigest()[:16]

"""What a head predicts: a class, a number, or the next steps of a series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mico_training.research.modalities.sample import Array, Sample, Task, spread
from mico_training.research.modalities.sequence import SequenceInput


class Target(BaseModel):
    """The targets of training data: ``classes``, or mean and deviation of numbers, or how many
    steps of which channels are forecast (on the scale of the input)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    horizon: int = 0
    channels: tuple[str, ...] = ()

    @classmethod
    def fit(cls, task: Task, samples: Sequence[Sample], channels: Sequence[str] = ()) -> Target:
        """Targets of training samples.

        Raises:
            DataError: a target that is missing or of another sort, or one class alone.
        """
        for sample in samples:
            if sample.target is None:
                raise sample.error(f"the target is missing; {task} needs one")
        if task == "classification":
            counts = Counter(str(sample.target) for sample in samples)
            if len(counts) < 2:
                raise samples[0].error(
                    f"all {len(samples)} training samples are of class {next(iter(counts))!r}; "
                    "classification needs two classes or more"
                )
            return cls(task=task, classes=tuple(sorted(counts)))
        if task == "regression":
            mean, std = spread(np.array([_number(sample) for sample in samples]), 0)
            return cls(task=task, mean=float(mean), std=float(std))
        horizon = {np.asarray(sample.target).shape for sample in samples}
        if len(horizon) > 1:
            raise samples[0].error(f"the targets have different shapes: {sorted(horizon)}")
        return cls(task=task, horizon=next(iter(horizon))[0], channels=tuple(channels))

    def label(self, sample: Sample, spec: object) -> Array:
        """A sample's target as what the loss takes.

        Raises:
            DataError: a class that training did not have, or no number.
        """
        if self.task == "classification":
            if sample.target not in self.classes:
                known = ", ".join(self.classes)
                raise sample.error(
                    f"the class {sample.target!r} was not in training; the classes are {known}"
                )
            return np.array(self.classes.index(str(sample.target)), dtype=np.int64)
        if self.task == "regression":
            return np.array((_number(sample) - self.mean) / self.std, dtype=np.float32)
        assert isinstance(spec, SequenceInput)
        return spec.standardise(sample.array("the steps to forecast", sample.target, 2))

    @property
    def outputs(self) -> int:
        """Numbers that a head gives."""
        return {"classification": len(self.classes), "regression": 1}.get(self.task, self.horizon)

    def loss(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, or the mean squared error on the training scale."""
        if self.task == "classification":
            return torch.nn.functional.cross_entropy(predicted, labels)
        return torch.nn.functional.mse_loss(predicted, labels)


def _number(sample: Sample) -> float:
    try:
        value = float(sample.target)  # type: ignore[arg-type]  # what is no number is told below
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise sample.error(f"the target {sample.target!r} is not a finite number")
    return value

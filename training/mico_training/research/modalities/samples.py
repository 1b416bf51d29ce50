"""Samples of any modality, and what a head predicts of them: a class, a number, or next steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mico_chat.errors import DataError

Modality = Literal[
    "tabular",
    "time_series",
    "imu",
    "hyperspectral",
    "graph",
    "thermal",
    "xray",
    "image",
    "depth",
    "normal",
]
Task = Literal["classification", "regression", "forecasting"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)

Array = NDArray[Any]


@dataclass(frozen=True)
class Graph:
    """An undirected graph: nodes (n, F), edges (e, 2) of node numbers, edge features (e, G)."""

    nodes: Array
    edges: Array
    edge_features: Array


@dataclass(frozen=True)
class Sample:
    """Raw values and target.

    ``values``: a row {column: text} of a table; steps or bands (L, C) of a sequence; a
    :class:`Graph`; a picture (H, W) or (H, W, 3). ``target``: a class, a number, the steps (H, C)
    to forecast, or None. Errors name ``file`` and ``line``.
    """

    values: Mapping[str, str] | Array | Graph
    target: str | float | Array | None = None
    file: str = "data"
    line: int | None = None

    def error(self, reason: str) -> DataError:
        """An error that names this sample."""
        return DataError(self.file, self.line, reason)

    def array(self, what: str, values: Any, ndim: int) -> Array:
        """Finite numbers with ``ndim`` dimensions as float32; a DataError says what they lack."""
        array = np.ascontiguousarray(values, dtype=np.float32).reshape(np.shape(values))
        if array.ndim != ndim:
            raise self.error(f"{what}: the shape is {array.shape}, expected {ndim} dimensions")
        if not np.isfinite(array).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise self.error(
                f"{what}: the value at {place} is {array[place]}; every value must be a finite "
                "number"
            )
        return array


def spread(values: Array, axis: int | tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and standard deviation; the deviation is 1 where all values are equal."""
    mean, std = values.mean(axis), values.std(axis)
    return mean, np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1.0)


class Target(BaseModel):
    """The targets of the training data.

    A classification has ``classes``, a regression ``mean`` and ``std``, and a forecast ``horizon``
    steps of ``channels``, on the scale of the input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    horizon: int = 0
    channels: tuple[str, ...] = ()

    @classmethod
    def fit(cls, task: Task, samples: Sequence[Sample], channels: Sequence[str] = ()) -> Target:
        """The targets of training samples; a DataError names one that is missing or wrong."""
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

    def label(self, sample: Sample, spec: Any) -> Array:
        """A sample's target for the loss; a DataError names a new class or a missing number."""
        if self.task == "classification":
            if sample.target not in self.classes:
                known = ", ".join(self.classes)
                raise sample.error(
                    f"the class {sample.target!r} was not in training; the classes are {known}"
                )
            return np.array(self.classes.index(str(sample.target)), dtype=np.int64)
        if self.task == "regression":
            return np.array((_number(sample) - self.mean) / self.std, dtype=np.float32)
        steps = sample.array("the steps to forecast", sample.target, 2)
        return cast(Array, spec.standardise(steps))

    @property
    def outputs(self) -> int:
        """How many numbers the head computes."""
        return {"classification": len(self.classes), "regression": 1}.get(self.task, self.horizon)

    def loss(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, or the mean squared error on the training scale."""
        if self.task == "classification":
            return torch.nn.functional.cross_entropy(predicted, labels)
        return torch.nn.functional.mse_loss(predicted, labels)


def _number(sample: Sample) -> float:
    try:
        value = float(sample.target)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise sample.error(f"the target {sample.target!r} is not a finite number")
    return value

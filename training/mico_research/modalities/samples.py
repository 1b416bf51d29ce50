"""Samples of any modality, and what a head predicts of them: a class, a number, or next steps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mico_chat.errors import DataError

Picture = Literal["thermal", "xray", "image", "depth", "normal"]
Media = Literal["video", "audio"]
Sequential = Literal["tabular", "text", "time_series", "imu", "hyperspectral", "graph"]
Modality = Sequential | Picture | Media
Task = Literal["classification", "multi-label", "re-identification", "regression", "forecasting"]

PICTURES: frozenset[str] = frozenset(get_args(Picture))
MEDIA: frozenset[str] = frozenset(get_args(Media))
BY_CLASS: frozenset[str] = frozenset({"classification", "re-identification"})
"""Training samples of these tasks have one class each; test persons are new to the model."""

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

    ``values``: a row {column: text} of a table; a text; steps or bands (L, C) of a sequence; a
    :class:`Graph`; a picture (H, W) or (H, W, 3); the file of a picture, clip or sound, which is
    read when it is used. ``target``: a class, all classes that hold, a number, the steps (H, C) to
    forecast, or None. Errors name ``file`` and ``line``. To find persons again, a ``query`` is
    compared with the other pictures by another ``camera``.
    """

    values: Mapping[str, str] | str | Array | Graph | Path
    target: str | tuple[str, ...] | float | Array | None = None
    file: str = "data"
    line: int | None = None
    camera: str = ""
    query: bool = False

    def error(self, reason: str) -> DataError:
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


def open_picture(file: Path) -> Array:
    """A picture (H, W) or (H, W, 3); a DataError if it cannot be read."""
    try:
        with Image.open(file) as picture:
            # A sensor's 16 bits stay; the rest is grey or colour of 8.
            grey = picture.mode in ("L", "I", "F", "1") or picture.mode.startswith("I;16")
            return np.asarray(picture if grey else picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(file, None, "this picture cannot be read") from error


def spread(values: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of values (n, ...) over n: 0 and 1 if n is 0.

    The deviation is 1 too where all values are equal.
    """
    if not len(values):
        return np.zeros(values.shape[1:]), np.ones(values.shape[1:])
    mean, std = values.mean(0), values.std(0)
    return mean, np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1.0)


def number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


class Statistics(BaseModel):
    """Statistics of training data, as a model's folder keeps them."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class InputSpec(Statistics):
    def arrays(self, sample: Sample) -> dict[str, Array]:
        raise NotImplementedError

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        return {name: stacked(arrays, name) for name in arrays[0] if name != "labels"}


def stacked(arrays: Sequence[dict[str, Array]], name: str) -> Tensor:
    """One array of every sample, all of one shape, as a tensor (B, ...)."""
    return torch.from_numpy(np.stack([a[name] for a in arrays]))


def padded(arrays: Sequence[dict[str, Array]], name: str) -> tuple[Tensor, Tensor]:
    """One array of every sample (B, n, ...), zeros behind its end, and the mask (B, n)."""
    rows = [torch.from_numpy(a[name]) for a in arrays]
    found = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return found, torch.arange(found.shape[1]) < lengths[:, None]


class Target(Statistics):
    """The targets of the training data.

    A classification has ``classes`` (also ``multi-label``, and the persons in training), a
    regression ``mean`` and ``std``, and a forecast ``horizon`` steps of ``channels``, on the scale
    of the input.
    """

    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    horizon: int = 0
    channels: tuple[str, ...] = ()

    @classmethod
    def fit(cls, task: Task, samples: Sequence[Sample], channels: Sequence[str] = ()) -> Self:
        """The targets of training samples; a DataError names one that is missing or wrong."""
        for sample in samples:
            if sample.target is None:
                raise sample.error(f"the target is missing; {task} needs one")
        if task in BY_CLASS:
            counts = Counter(str(sample.target) for sample in samples)
            if len(counts) < 2:
                raise samples[0].error(
                    f"all {len(samples)} training samples are of class {next(iter(counts))!r}; "
                    "classification needs two classes or more"
                )
            return cls(task=task, classes=tuple(sorted(counts)))
        if task == "multi-label":
            known = {name for sample in samples for name in labels_of(sample)}
            if not known:
                raise samples[0].error(f"none of the {len(samples)} training samples has a class")
            return cls(task=task, classes=tuple(sorted(known)))
        if task == "regression":
            mean, std = spread(np.array([_number(sample) for sample in samples]))
            return cls(task=task, mean=float(mean), std=float(std))
        horizon = {np.asarray(sample.target).shape for sample in samples}
        if len(horizon) > 1:
            raise samples[0].error(f"the targets have different shapes: {sorted(horizon)}")
        return cls(task=task, horizon=next(iter(horizon))[0], channels=tuple(channels))

    def label(self, sample: Sample, spec: Any) -> Array:
        """A sample's target for the loss; a DataError names a new class or a missing number."""
        if self.task in BY_CLASS:
            if sample.target not in self.classes:
                known = ", ".join(self.classes)
                raise sample.error(
                    f"the class {sample.target!r} was not in training; the classes are {known}"
                )
            return np.array(self.classes.index(str(sample.target)), dtype=np.int64)
        if self.task == "multi-label":
            own = labels_of(sample)
            if unknown := sorted(set(own) - set(self.classes)):
                raise sample.error(f"the class {unknown[0]!r} was not in training")
            return np.isin(self.classes, own).astype(np.float32)
        if self.task == "regression":
            return np.array((_number(sample) - self.mean) / self.std, dtype=np.float32)
        steps = sample.array("the steps to forecast", sample.target, 2)
        return cast(Array, spec.standardise(steps))

    @property
    def outputs(self) -> int:
        return len(self.classes) or {"regression": 1}.get(self.task, self.horizon)

    def loss(self, predicted: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy (of each class alone where several may hold), or the mean squared error."""
        if self.task == "multi-label":
            return torch.nn.functional.binary_cross_entropy_with_logits(predicted, labels)
        if self.task in BY_CLASS:
            return torch.nn.functional.cross_entropy(predicted, labels)
        return torch.nn.functional.mse_loss(predicted, labels)


def labels_of(sample: Sample) -> tuple[str, ...]:
    """All classes of a sample; a DataError if its target is none of a multi-label task."""
    if not isinstance(sample.target, tuple):
        raise sample.error(f"the target {sample.target!r} is not a list of classes")
    return sample.target


def _number(sample: Sample) -> float:
    value = number(sample.target)
    if value is None or not np.isfinite(value):
        raise sample.error(f"the target {sample.target!r} is not a finite number")
    return value

"""One sample of any modality, as a reader gives it: raw values, a target, where it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

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
    to forecast, or None. ``file`` and ``line`` tell an error's reader where to look.
    """

    values: Mapping[str, str] | Array | Graph
    target: str | float | Array | None = None
    file: str = "data"
    line: int | None = None

    def error(self, reason: str) -> DataError:
        """An error that names this sample."""
        return DataError(self.file, self.line, reason)

    def array(self, what: str, values: Any, ndim: int) -> Array:
        """Finite numbers of so many dimensions as float32.

        Raises:
            DataError: other dimensions, or a value that is missing or infinite.
        """
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
    """Mean and standard deviation; 1 where all values are the same, which are then zeros."""
    mean, std = values.mean(axis), values.std(axis)
    return mean, np.where(std > 1e-6 * (1 + np.abs(mean)), std, 1.0)

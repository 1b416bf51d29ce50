"""Figures of a set of predictions. The first of each task is the one that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, r2_score

from mico_training.research.modalities.sample import Array, Sample, Task

METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "macro F1"),
    "regression": ("RMSE", "MAE", "R2"),
    "forecasting": ("MSE", "MAE"),
}
LARGER_IS_BETTER = frozenset({"accuracy", "macro F1", "R2"})


def score(task: Task, samples: Sequence[Sample], predicted: Sequence[Any]) -> dict[str, float]:
    """Figures of classes, of numbers, or of forecasts; a share, in units, or as given.

    Args:
        task: which says what a prediction is.
        samples: with their targets; of a forecast, steps (H, C) on the scale of ``predicted``.
        predicted: a class, a number, or steps (H, C), of each sample.
    """
    if task == "classification":
        truth = [str(sample.target) for sample in samples]
        return {
            "accuracy": float(accuracy_score(truth, list(predicted))),
            "macro F1": float(f1_score(truth, list(predicted), average="macro", zero_division=0)),
        }
    truth_array = targets(samples)
    errors = truth_array - np.asarray(predicted, dtype=np.float64).reshape(truth_array.shape)
    squares, sizes = float(np.mean(errors**2)), float(np.mean(np.abs(errors)))
    if task == "forecasting":
        return {"MSE": squares, "MAE": sizes}
    r2 = float(r2_score(truth_array, truth_array - errors)) if len(truth_array) > 1 else 0.0
    return {"RMSE": squares**0.5, "MAE": sizes, "R2": r2}


def targets(samples: Sequence[Sample]) -> Array:
    """Numbers (n,), or steps (n, H, C)."""
    return np.array([np.asarray(sample.target, dtype=np.float64) for sample in samples])

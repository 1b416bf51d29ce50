"""Simple methods on the same splits, to compare with.

A baseline is fitted to the training samples; the validation samples choose its setting. No baseline
sees the test samples before it predicts them.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR
from torch.nn import functional as F

from mico_research.finetune.recipe import Splits
from mico_research.finetune.report import METRICS, score, targets
from mico_research.modalities.families import GraphInput, PictureInput, SequenceInput, TextInput
from mico_research.modalities.media import MediaInput
from mico_research.modalities.samples import Array, Graph, Sample, Target, labels_of
from mico_research.modalities.table import TableInput

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""The validation samples choose one of these strengths of regularisation."""

LEAVES = (5, 20)
"""A tree's leaf has at least so many samples: with scikit-learn's 20, small sets grow no tree."""

ROUNDS = 2
"""A node's neighbourhood has this radius in Weisfeiler-Lehman features."""

PIXELS = 16
"""Baselines see pictures of this side."""

Parts = list[Array]
"""It holds the features (n, F) of training, validation and test samples."""


def baselines(
    spec: Any, target: Target, splits: Splits, season: int | None, seed: int
) -> dict[str, list[Any]]:
    """Predictions of the test samples by name of the baseline; forecasts are standardised."""
    if isinstance(spec, SequenceInput) and target.task == "forecasting":
        return _forecasts(spec, splits, season)
    if target.task == "re-identification":
        return {"pixels": [_vector(spec, sample) for sample in splits.test]}
    if target.task == "multi-label":
        return _several(spec, target, splits)
    listed = _listed(spec, target.task == "classification", splits, seed)
    return {name: _best(target, splits, parts, models) for name, parts, models in listed}


def _best(target: Target, splits: Splits, parts: Parts, models: Sequence[Any]) -> list[Any]:
    classifies = target.task == "classification"
    known: Array = (
        targets(splits.train)
        if not classifies
        else np.array([str(sample.target) for sample in splits.train])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that does not converge is not the best one
        for model in models:
            model.fit(parts[0], known)

    def figure(model: Any) -> float:
        found = score(target.task, splits.validation, list(model.predict(parts[1])))
        return found[METRICS[target.task][0]] * (1 if classifies else -1)

    return list(max(models, key=figure).predict(parts[2]))


def _several(spec: Any, target: Target, splits: Splits) -> dict[str, list[Any]]:
    """Scores of each class: its frequency; logistic regression for each class alone."""
    parts = [
        np.stack([_vector(spec, sample) for sample in part])
        for part in (splits.train, splits.validation, splits.test)
    ]
    known = np.array([np.isin(target.classes, labels_of(sample)) for sample in splits.train])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a class that all training samples have
        models = [
            OneVsRestClassifier(_scaled(LogisticRegression(C=c, max_iter=500))).fit(parts[0], known)
            for c in STRENGTHS
        ]

    def figure(model: Any) -> float:
        found = list(model.predict_proba(parts[1]))
        return score(target.task, splits.validation, found, target.classes)["mAP"]

    best = max(models, key=figure)
    return {
        "class frequency": [known.mean(0)] * len(splits.test),
        "logistic regression": list(best.predict_proba(parts[2])),
    }


def _listed(
    spec: Any, classifies: bool, splits: Splits, seed: int
) -> list[tuple[str, Parts, list[Any]]]:
    """The baselines for one kind of input, each with its features and the models to choose from."""

    def of(features: Callable[[Any, Sample], Array]) -> Parts:
        parts = (splits.train, splits.validation, splits.test)
        return [np.stack([features(spec, sample) for sample in part]) for part in parts]

    if classifies:
        plain, linear, floor = "most frequent class", "logistic regression", DummyClassifier()
        lines = [_scaled(LogisticRegression(C=c, max_iter=500)) for c in STRENGTHS]
        trees, machine, nearest = HistGradientBoostingClassifier, SVC, KNeighborsClassifier
    else:
        plain, linear, floor = "mean", "ridge regression", DummyRegressor()
        lines = [_scaled(Ridge(alpha=alpha)) for alpha in STRENGTHS]
        trees, machine, nearest = HistGradientBoostingRegressor, SVR, KNeighborsRegressor
    grown = [trees(random_state=seed, min_samples_leaf=n) for n in LEAVES]
    features = of(_vector)
    match spec:
        case TableInput():
            filled = [np.nan_to_num(x) for x in features]
            own = [(linear, filled, lines), ("gradient boosting", features, grown)]
        case GraphInput():
            own = [
                (f"Weisfeiler-Lehman, {linear}", _colours(splits), lines),
                ("sums, gradient boosting", features, grown),
            ]
        case SequenceInput() if len(spec.mean) == 1:
            moments = of(_moments)
            own = [
                ("nearest neighbour", features, [nearest(n_neighbors=1)]),
                (f"statistics, {linear}", moments, lines),
                ("statistics, boosting", moments, grown),
            ]
        case _:  # a spectrum or a picture
            machines = [_scaled(machine(C=c)) for c in STRENGTHS]
            own = [(linear, features, lines), ("SVM (RBF)", features, machines)]
    return [(plain, features, [floor]), *own]


def _scaled(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


# --- features -----------------------------------------------------------------------------------


def _vector(spec: Any, sample: Sample) -> Array:
    """A sample as one vector.

    A row: its numbers (NaN if missing) and one-hot categories. A graph: sums of node and edge
    features, and their numbers. A picture: its pixels, few. A sequence: its values, padded.
    """
    arrays = spec.arrays(sample)
    match spec:
        case TableInput():
            one_hot = [
                np.eye(len(column.values) + 1)[code]
                for column, code in zip(spec.categories, arrays["categories"], strict=True)
            ]
            return np.concatenate([arrays["numbers"], *one_hot])
        case TextInput():  # how often each byte occurs
            return np.bincount(arrays["values"], minlength=256)
        case GraphInput():
            graph = _graph(sample)
            sizes = [len(graph.nodes), len(graph.edges)]
            sums = np.asarray(graph.nodes).sum(0), arrays["edge_features"].sum(0)
            return np.concatenate([*sums, sizes])
        case PictureInput():
            pixels = torch.from_numpy(arrays["pixel_values"])
            return F.adaptive_avg_pool2d(pixels, PIXELS).flatten().numpy()
        case MediaInput():  # the mean frame or slice, and how far the units differ from it
            pixels = torch.from_numpy(arrays["pixel_values"])
            few = F.adaptive_avg_pool2d(pixels, PIXELS).flatten(1)
            return torch.cat([few.mean(0), few.std(0, correction=0)]).numpy()
    values: Array = arrays["values"]
    return np.pad(values, ((0, spec.max_length - len(values)), (0, 0))).ravel()


def _graph(sample: Sample) -> Graph:
    assert isinstance(sample.values, Graph)
    return sample.values


def _moments(spec: SequenceInput, sample: Sample) -> Array:
    """Per channel: mean, deviation, extremes, mean step, lower half of the spectrum."""
    values = spec.arrays(sample)["values"]
    step = np.abs(np.diff(values, axis=0, prepend=values[:1])).mean(0)
    spectrum = np.abs(np.fft.rfft(values, n=spec.max_length, axis=0))[1 : spec.max_length // 4 + 1]
    rows = (values.mean(0), values.std(0), values.min(0), values.max(0), step, *spectrum)
    return np.concatenate(rows)


def _colours(splits: Splits) -> Parts:
    vectors = DictVectorizer(sparse=False)
    parts = [
        [_neighbourhoods(sample) for sample in part]
        for part in (splits.train, splits.validation, splits.test)
    ]
    vectors.fit(parts[0])
    return [vectors.transform(part) for part in parts]


def _neighbourhoods(sample: Sample) -> dict[str, float]:
    """Weisfeiler-Lehman: a node's colour is its features, then its and its neighbours' colours."""
    graph = _graph(sample)
    colours = [_short(node) for node in np.asarray(graph.nodes).tolist()]
    bonds = np.asarray(graph.edge_features).tolist() or [[]] * len(graph.edges)
    counts: dict[str, float] = {}
    for reach in range(ROUNDS + 1):
        for colour in colours:
            counts[colour] = counts.get(colour, 0.0) + 1.0
        around: list[list[tuple[str, str]]] = [[] for _ in colours]
        for (one, other), bond in zip(np.asarray(graph.edges).tolist(), bonds, strict=True):
            around[one].append((str(bond), colours[other]))
            around[other].append((str(bond), colours[one]))
        colours = [
            _short([reach, colour, *sorted(near)])
            for colour, near in zip(colours, around, strict=True)
        ]
    return counts


def _short(colour: list[Any]) -> str:
    return hashlib.blake2b(repr(colour).encode(), digest_size=8).hexdigest()


# --- forecasts ----------------------------------------------------------------------------------


def _forecasts(spec: SequenceInput, splits: Splits, season: int | None) -> dict[str, list[Any]]:
    """Three forecasts: the last value, the last season, a linear map of the past (NLinear)."""
    standard = [
        np.stack([spec.arrays(sample)["values"] for sample in part])
        for part in (splits.train, splits.validation, splits.test)
    ]
    known = [
        np.stack([spec.standardise(np.asarray(sample.target)) for sample in part])
        for part in (splits.train, splits.validation)
    ]
    horizon = known[0].shape[1]
    test = standard[2]
    predicted = {"last value": list(np.repeat(test[:, -1:], horizon, 1))}
    if season is not None and season <= spec.max_length:
        cycle = test[:, -season:]
        predicted["seasonal naive"] = list(
            np.tile(cycle, (1, -(-horizon // season), 1))[:, :horizon]
        )
    fitted = [
        Ridge(alpha=strength).fit(
            _changes(standard[0], standard[0]), _changes(known[0], standard[0])
        )
        for strength in STRENGTHS
    ]
    past, ahead = (_changes(steps, standard[1]) for steps in (standard[1], known[1]))
    best = min(fitted, key=lambda model: float(np.mean((model.predict(past) - ahead) ** 2)))
    steps = best.predict(_changes(test, test)).reshape(len(test), -1, horizon).transpose(0, 2, 1)
    predicted["linear (ridge)"] = list(steps + test[:, -1:])
    return predicted


def _changes(steps: Array, windows: Array) -> Array:
    """Steps (n, H, C) less the last value of the windows (n, L, C), by channel: (n * C, H)."""
    return (steps - windows[:, -1:]).transpose(0, 2, 1).reshape(-1, steps.shape[1])

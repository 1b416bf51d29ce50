"""Training, validation and test samples of a recipe.

What a split may not do: training statistics (means, classes, columns) come from training samples
alone, and a series is cut in time, so that no step to forecast is in two parts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mico_chat.errors import ConfigError, DataError
from mico_training.research.finetune.packaged import Packaged, open_package
from mico_training.research.finetune.recipe import FinetuneData, FinetuneRun
from mico_training.research.modalities.readers import Series, read_samples, read_series
from mico_training.research.modalities.sample import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Samples by use. ``channels`` names those of a series."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    channels: tuple[str, ...] = ()


class Source:
    """A recipe's data, read once; :meth:`splits` gives those of a seed."""

    def __init__(self, recipe: FinetuneRun) -> None:
        """Reads the data.

        Raises:
            ConfigError, MissingExtraError: no such file, or package.
            DataError: what is wrong in a file, and where.
        """
        data = recipe.data
        self.recipe = recipe
        self.series: list[Series] = []
        self.given: list[list[Sample] | None] = []
        packaged: Packaged | None = None
        if data.package is not None:
            packaged = open_package(data.package, recipe.modality, recipe.task)
            self.season = data.season or packaged.season
            self.note = packaged.note
            if packaged.series is not None:
                self.series = [packaged.series]
            self.given = [packaged.train, None, packaged.test]
            return
        assert data.train is not None
        self.season = data.season
        self.note = str(data.train)
        paths = (data.train, data.validation, data.test)
        if recipe.task == "forecasting":
            self.series = [read_series(path, data.columns) for path in paths if path is not None]
            if len(self.series) == 2:
                raise ConfigError(
                    "data: give a series either as one file (train), or as three (train, "
                    "validation, test)"
                )
        else:
            self.given = [
                None
                if path is None
                else read_samples(recipe.modality, path, data.target, data.columns, data.patch_size)
                for path in paths
            ]

    def splits(self, seed: int) -> Splits:
        """Training, validation and test samples; where no file says so, split by the seed.

        Raises:
            DataError: too few samples for three parts.
        """
        if self.recipe.task == "forecasting":
            return _in_time(self.series, self.recipe.data)
        data, by_class = self.recipe.data, self.recipe.task == "classification"
        train, validation, test = self.given
        assert train is not None
        rng = np.random.default_rng(seed)
        if test is None:
            train, test = _split(train, data.test_share, rng, by_class)
        if validation is None:
            train, validation = _split(train, data.validation_share, rng, by_class)
        known = {str(sample.target) for sample in train}
        if by_class:
            for sample in (*validation, *test):
                if sample.target is not None and str(sample.target) not in known:
                    raise sample.error(
                        f"the class {sample.target!r} is not among those of the training samples: "
                        + ", ".join(sorted(known))
                    )
        return Splits(train, validation, test)


def _split(
    samples: Sequence[Sample], share: float, rng: np.random.Generator, by_class: bool
) -> tuple[list[Sample], list[Sample]]:
    """The rest and a share of the samples; of every class with two or more, at least one each.

    Raises:
        DataError: fewer than two samples.
    """
    if len(samples) < 2:
        raise samples[0].error(f"{len(samples)} sample is not enough to split a part off")
    groups: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(str(sample.target) if by_class else "", []).append(place)
    taken: set[int] = set()
    for places in groups.values():
        shuffled = rng.permutation(places)
        n = min(max(1, round(share * len(places))), len(places) - 1)
        taken |= set(shuffled[:n].tolist())
    rest = [s for place, s in enumerate(samples) if place not in taken]
    return rest, [s for place, s in enumerate(samples) if place in taken]


def _in_time(series: Sequence[Series], data: FinetuneData) -> Splits:
    """Windows of one series cut in time, or of three."""
    lookback, horizon = data.lookback, data.horizon
    assert lookback is not None
    assert horizon is not None
    if len(series) == 3:
        if len({one.channels for one in series}) > 1:
            raise ConfigError(
                "data: the three series have different channels: "
                f"{[one.channels for one in series]}"
            )
        parts = [one.windows(0, len(one.values), lookback, horizon) for one in series]
    else:
        one = series[0]
        n = len(one.values)
        tested = n - round(data.test_share * n)
        validated = tested - round(data.validation_share * n)
        bounds = ((0, validated), (validated, tested), (tested, n))
        parts = [one.windows(start, end, lookback, horizon) for start, end in bounds]
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part:
            raise DataError(
                series[0].file,
                None,
                f"{len(series[0].values)} steps are too few for one {name} window of lookback "
                f"{lookback} and horizon {horizon}; use a shorter lookback or horizon, or give "
                "more steps",
            )
    train, validation, test = parts
    return Splits(train, validation, test, series[0].channels)

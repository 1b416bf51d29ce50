"""The recipe of ``mico-chat finetune``, and the samples that it names.

Training statistics (means, classes, columns) come from training samples alone. A series is split by
time: no step to forecast lies in two parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from mico_chat.errors import ConfigError, DataError
from mico_research.finetune.augment import Augment
from mico_research.finetune.layouts import open_dataset
from mico_research.finetune.packaged import Packaged, open_package
from mico_research.modalities.readers import Series, read_samples, read_series
from mico_research.modalities.samples import BY_CLASS, MEDIA, PICTURES, Modality, Sample, Task
from mico_training.recipe import LoraRecipe, ModelRecipe, Run, Section, named


class FinetuneData(Section):
    """Where the samples are.

    A ``package`` carries them (``docs/modalities.md``), or a public ``dataset`` lies in the folder
    ``root`` as its publishers have it (``layouts.yaml``; at most ``limit`` samples of a split), or
    they are files (:mod:`mico_research.modalities.readers`).

    Without a ``test`` or ``validation`` file each seed splits off another share, by class; a series
    is split by time. ``target`` and ``columns`` name columns; ``categorical`` names columns whose
    numbers are names. ``lookback`` steps predict the next ``horizon`` steps; ``season`` is the
    period of the seasonal baseline. ``patch_size``: side of a hyperspectral patch in pixels.
    """

    package: str | None = None
    dataset: str | None = None
    root: Path | None = None
    limit: int | None = Field(default=None, gt=1)
    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    target: str | None = None
    columns: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    lookback: int | None = Field(default=None, gt=0)
    horizon: int | None = Field(default=None, gt=0)
    season: int | None = Field(default=None, gt=0)
    patch_size: int = Field(default=1, gt=0)
    validation_share: float = Field(default=0.15, gt=0.0, lt=0.5)
    test_share: float = Field(default=0.2, gt=0.0, lt=0.5)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.package, self.dataset, self.train].count(None) != 2:
            raise ValueError("give one of package, dataset and train")
        if (self.dataset is None) != (self.root is None):
            raise ValueError("dataset and root, the data set's folder, go together")
        if self.train is None and (self.validation or self.test):
            raise ValueError("its test data are its own; leave out validation and test")
        return self


class EncoderLora(LoraRecipe):
    """Adapters on the encoder's linear layers; ``qkv`` is possible where it is one layer."""

    targets: tuple[str, ...] = ("proj", "fc1", "fc2")


class FinetuneRecipe(Section):
    """How the model is made and trained.

    ``layers``: how many of the encoder's first blocks to use (default: all). ``patch``: steps or
    bands in a token. ``lora``: adapters on the encoder's frozen linear layers. With
    ``train.freeze: [encoder]`` only tokenizer and head train; with neither, everything trains.
    ``lrs``: learning rates; the first seed's validation loss chooses one (default: ``train.lr``).
    ``patience``: a run ends after so many evaluations (one every ``train.save_steps``) without a
    better validation loss. ``units``: at most so many frames of a clip or slices of a sound.
    ``drop_path``: stochastic depth, the probability that the last block is left out of a sample;
    earlier blocks have a share of it. ``augment``: random changes of pictures, clips and sounds.
    ``baselines``: fit them too; on a large data set they take long. ``control``: train random
    blocks too, to measure what pretraining gives.
    """

    layers: int | None = Field(default=None, gt=0)
    patch: int = Field(default=8, gt=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    drop_path: float = Field(default=0.0, ge=0.0, lt=1.0)
    augment: Augment | None = None
    lora: EncoderLora | None = None
    lrs: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    patience: int = Field(default=5, gt=0)
    units: int = Field(default=8, gt=0)
    baselines: bool = True
    control: bool = True


class FinetuneRun(Run):
    model: Annotated[ModelRecipe, BeforeValidator(named)]
    modality: Modality
    task: Task
    data: FinetuneData
    finetune: FinetuneRecipe = FinetuneRecipe()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.task == "forecasting":
            if self.modality not in ("time_series", "imu"):
                works = "forecasting works for time_series and imu"
                raise ValueError(f"{works}, not for {self.modality}")
            if self.data.lookback is None or self.data.horizon is None:
                raise ValueError("forecasting needs data.lookback and data.horizon")
        elif self.modality in ("tabular", "text") and self.data.train and self.data.target is None:
            raise ValueError("a table needs data.target, the column to predict")
        if self.task == "re-identification" and self.data.dataset is None:
            raise ValueError("re-identification works for the pictures of a data.dataset alone")
        augment, seen = self.finetune.augment, self.modality in PICTURES | MEDIA
        if not seen and (self.task == "multi-label" or augment is not None):
            what = "finetune.augment" if augment is not None else "multi-label"
            known = ", ".join(sorted(PICTURES | MEDIA))
            raise ValueError(f"{what} works for {known}, not for {self.modality}")
        mixable = self.task in ("classification", "multi-label") and self.train.batch_size % 2 == 0
        if augment is not None and (augment.mixup or augment.cutmix) and not mixable:
            needs = "classification or multi-label and an even train.batch_size"
            raise ValueError(f"finetune.augment.mixup and cutmix need the task {needs}")
        if self.finetune.lora is not None and "encoder" in self.train.freeze:
            raise ValueError(
                "finetune.lora trains adapters of the encoder, but train.freeze freezes the "
                "encoder; give one of the two"
            )
        return self


@dataclass(frozen=True)
class Splits:
    """Samples by use; ``channels`` names the channels of a series."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    channels: tuple[str, ...] = ()


class Source:
    """A recipe's data, read once; :meth:`splits` gives those of a seed."""

    def __init__(self, recipe: FinetuneRun) -> None:
        data = recipe.data
        self.recipe, self.season, self.note = recipe, data.season, str(data.train)
        self.series: list[Series] = []
        self.public = Packaged()
        self.given: list[list[Sample] | None] = []
        paths = (data.train, data.validation, data.test)
        if data.package is not None:
            packaged = open_package(data.package, recipe.modality, recipe.task)
            self.season, self.note = data.season or packaged.season, packaged.note
            self.series = [] if packaged.series is None else [packaged.series]
            self.given = [packaged.train, None, packaged.test]
        elif data.dataset is not None and data.root is not None:
            of = (recipe.modality, recipe.task, data.model_dump())
            self.public = packaged = open_dataset(data.dataset, data.root, *of)
            self.note = packaged.note
            self.given = [packaged.train, packaged.validation, packaged.test]
        elif recipe.task == "forecasting":
            self.series = [read_series(path, data.columns) for path in paths if path is not None]
            if len(self.series) == 2:
                raise ConfigError(
                    "data: give a series either as one file (train), or as three (train, "
                    "validation, test)"
                )
        else:
            options = (data.target, data.columns, data.patch_size)
            self.given = [
                None if path is None else read_samples(recipe.modality, path, *options)
                for path in paths
            ]

    def splits(self, seed: int) -> Splits:
        """Training, validation and test samples; the seed splits what no file splits."""
        if self.recipe.task == "forecasting" and self.series:
            return _in_time(self.series, self.recipe.data)
        data, by_class = self.recipe.data, self.recipe.task in BY_CLASS
        train, validation, test = self.given
        assert train is not None
        rng = np.random.default_rng(seed)
        if test is None:
            train, test = _split(train, data.test_share, rng, by_class)
        if validation is None:
            train, validation = _split(train, data.validation_share, rng, by_class)
        known = {str(sample.target) for sample in train}
        new = () if self.recipe.task == "re-identification" else test
        for sample in (*validation, *new) if by_class else ():
            if sample.target is not None and str(sample.target) not in known:
                raise sample.error(
                    f"the class {sample.target!r} is not among those of the training samples: "
                    + ", ".join(sorted(known))
                )
        return Splits(train, validation, test, self.public.channels)


def _split(
    samples: Sequence[Sample], share: float, rng: np.random.Generator, by_class: bool
) -> tuple[list[Sample], list[Sample]]:
    """The samples in two parts: the rest, and a share.

    Each part has at least one sample of every class that has two.
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
    """Windows of three series, or of one that is split by time."""
    lookback, horizon = data.lookback or 1, data.horizon or 1  # the recipe has both
    if len(series) == 3:
        channels = [one.channels for one in series]
        if len(set(channels)) > 1:
            raise ConfigError(f"data: the three series have different channels: {channels}")
        parts = [one.windows(0, len(one.values), lookback, horizon) for one in series]
    else:
        n = len(series[0].values)
        tested = n - round(data.test_share * n)
        validated = tested - round(data.validation_share * n)
        bounds = pairwise((0, validated, tested, n))
        parts = [series[0].windows(start, end, lookback, horizon) for start, end in bounds]
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if not part:
            reason = (
                f"{len(series[0].values)} steps are too few for one {name} window of lookback "
                f"{lookback} and horizon {horizon}; use a shorter lookback or horizon, or give "
                "more steps"
            )
            raise DataError(series[0].file, None, reason)
    train, validation, test = parts
    return Splits(train, validation, test, series[0].channels)

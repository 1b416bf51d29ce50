"""The recipe of ``mico-chat finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from mico_training.recipe import LoraRecipe, ModelRecipe, Run, Section, named
from mico_training.research.modalities.sample import Modality, Task


class FinetuneData(Section):
    """Where the samples are: a ``package`` that carries them (see ``docs/modalities.md``), or
    files (see :mod:`mico_training.research.modalities.readers`).

    Without a ``test`` or ``validation`` file a share is split off, by class, anew for every seed; a
    series is cut in time. ``target`` and ``columns`` name columns, ``categorical`` columns whose
    numbers are names. ``lookback`` steps tell ``horizon`` steps to come; ``season`` is the period
    for the seasonal baselines. ``patch_size`` is of a hyperspectral scene's pixels.
    """

    package: str | None = None
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
    def _one_source(self) -> FinetuneData:
        if (self.package is None) == (self.train is None):
            raise ValueError("give either package or train, not both or neither")
        if self.package is not None and (self.validation or self.test):
            raise ValueError("a package has its own test data; leave out validation and test")
        return self


class EncoderLora(LoraRecipe):
    """Adapters on the encoder's linear layers. ``qkv`` can be added where it is one plain layer."""

    targets: tuple[str, ...] = ("proj", "fc1", "fc2")


class FinetuneRecipe(Section):
    """How.

    ``layers``: the first so many of the encoder's blocks (all of them without it). ``patch``: steps
    or bands a token. ``lora``: adapters on the encoder's linear layers, whose weights stay as they
    are; ``train.freeze: [encoder]`` trains tokenizer and head alone; with neither, all trains.
    ``lrs``: learning rates, of which the first seed's validation loss takes one; ``train.lr``
    where not given. ``patience``: evaluations (each ``train.save_steps``) without a better
    validation loss before a run ends. ``control``: train on random blocks too, to see what
    pretraining is worth.
    """

    layers: int | None = Field(default=None, gt=0)
    patch: int = Field(default=8, gt=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    lora: EncoderLora | None = None
    lrs: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    patience: int = Field(default=5, gt=0)
    control: bool = True


class FinetuneRun(Run):
    """``mico-chat finetune``."""

    model: Annotated[ModelRecipe, BeforeValidator(named)]
    modality: Modality
    task: Task
    data: FinetuneData
    finetune: FinetuneRecipe = FinetuneRecipe()

    @model_validator(mode="after")
    def _fits(self) -> FinetuneRun:
        if self.task == "forecasting":
            if self.modality not in ("time_series", "imu"):
                raise ValueError(
                    f"forecasting works for time_series and imu, not for {self.modality}"
                )
            if self.data.lookback is None or self.data.horizon is None:
                raise ValueError("forecasting needs data.lookback and data.horizon")
        elif self.modality == "tabular" and self.data.train and self.data.target is None:
            raise ValueError("a table needs data.target, the column to predict")
        if self.finetune.lora is not None and "encoder" in self.train.freeze:
            raise ValueError(
                "finetune.lora trains adapters of the encoder, but train.freeze freezes the "
                "encoder; give one of the two"
            )
        return self

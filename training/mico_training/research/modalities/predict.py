"""``mico-chat predict``: a fine-tuned folder on a file of the same format, as CSV."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from mico_chat.errors import DataError, ModelError
from mico_training.research.modalities.modeling import MicoForModality, MicoModalityConfig
from mico_training.research.modalities.readers import read_samples, read_series
from mico_training.research.modalities.sample import Modality, Sample
from mico_training.research.modalities.sequence import SequenceInput


def load_modality(folder: str | Path, device: str | None = None) -> MicoForModality:
    """A folder that ``mico-chat finetune`` wrote.

    Raises:
        ModelError: something else.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(
            f"{folder}: config.json is missing; use a folder that `mico-chat finetune` wrote"
        )
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except OSError as error:
        raise ModelError(
            f"{folder}: the configuration cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if kind != MicoModalityConfig.model_type:
        raise ModelError(
            f"{folder}: the model type is {kind!r}, expected "
            f"{MicoModalityConfig.model_type!r}; use a folder that `mico-chat finetune` "
            "wrote"
        )
    model = MicoForModality.from_pretrained(folder, dtype=torch.float32)
    nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.train(False)
    return model


def predict(folder: str | Path, path: Path, out: IO[str], device: str | None = None) -> None:
    """Write a line a sample: its class and the chance of each, or its number; or, of a series, a
    line a step that follows its end.

    Raises:
        ModelError, ConfigError, DataError: what does not fit, in one line.
    """
    model = load_modality(folder, device)
    target, spec = model.target, model.spec
    lines = csv.writer(out, lineterminator="\n")
    if target.task == "forecasting":
        assert isinstance(spec, SequenceInput)
        series = read_series(path, target.channels)
        if len(series.values) < spec.max_length:
            raise DataError(
                path,
                None,
                f"the series has {len(series.values)} steps, but this model needs "
                f"{spec.max_length} steps to forecast",
            )
        sample = Sample(series.values[-spec.max_length :], file=str(path))
        (only,) = model.predict([sample])
        lines.writerow(["step", *target.channels])
        lines.writerows([n, *map(_number, row)] for n, row in enumerate(np.array(only.value), 1))
        return
    config = model.config
    assert isinstance(config, MicoModalityConfig)
    side = math.isqrt(spec.channels) if isinstance(spec, SequenceInput) else 1
    samples = read_samples(cast(Modality, config.modality), path, patch_size=side)
    lines.writerow(["sample", "prediction", *target.classes])
    for number, (sample, found) in enumerate(zip(samples, model.predict(samples), strict=True), 1):
        name = sample.line or number
        if found.probabilities is None:
            lines.writerow([name, _number(found.value)])
        else:
            lines.writerow([name, found.value, *map(_number, found.probabilities.values())])


def _number(value: object) -> str:
    return f"{value:.6g}"

"""``mico-chat finetune``: train, compare, report.

For every seed the pretrained encoder, random blocks in its place (the control), and the baselines
see the same split. The learning rate of each is the one of the recipe's whose first seed has the
lowest validation loss; the test samples choose nothing. The best model by validation loss is the
output folder itself.

An interrupted command goes on where it was: a finished run is read, an unfinished one resumes from
its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as hugging_logging

from mico_chat.checkpoints.assemble import Encoder, read_encoder
from mico_chat.errors import ConfigError
from mico_training.recipe import load_recipe
from mico_training.research.finetune.baselines import baselines
from mico_training.research.finetune.data import Source
from mico_training.research.finetune.fit import build, fit, fit_specs, seeded
from mico_training.research.finetune.recipe import FinetuneRun
from mico_training.research.finetune.report import Report, Row, machine, write_report
from mico_training.research.finetune.scoring import score
from mico_training.research.modalities.modeling import MicoForModality
from mico_training.research.modalities.sample import Sample
from mico_training.research.modalities.sequence import SequenceInput
from mico_training.research.modalities.target import Target

logger = logging.getLogger(__name__)

RECIPE, RESULT, BEST = "finetune.json", "result.json", "best.json"

ARMS = {"pretrained": "MiCo, pretrained blocks", "random": "MiCo, random blocks"}


def main(config: Path, overrides: Sequence[str] = ()) -> Report:
    """Run a recipe, or go on with it; model and report are in its output folder.

    Raises:
        ConfigError, DataError, MissingExtraError: what is wrong with recipe or data, in one line.
    """
    recipe = load_recipe(FinetuneRun, config, overrides)
    hugging_logging.disable_progress_bar()
    source = Source(recipe)
    first = source.splits(recipe.finetune.seeds[0])
    encoder = read_encoder(recipe.model.name)
    _same_recipe(recipe)
    rows = _baseline_rows(recipe, source, encoder)
    for arm in ("pretrained", *(["random"] if recipe.finetune.control else [])):
        rows.append(_arm(recipe, source, encoder, arm))
    report = Report(
        name=recipe.output.name,
        modality=recipe.modality,
        task=recipe.task,
        data=source.note,
        n=(len(first.train), len(first.validation), len(first.test)),
        seeds=recipe.finetune.seeds,
        layers=recipe.finetune.layers,
        trains=_trains(recipe),
        rows=tuple(rows),
        machine=machine(),
    )
    write_report(report, recipe.output)
    return report


def _same_recipe(recipe: FinetuneRun) -> None:
    """Remember the recipe in its output.

    Raises:
        ConfigError: another recipe's output is there.
    """
    path = recipe.output / RECIPE
    content = recipe.model_dump(mode="json")
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in content if before.get(key) != content[key])
        if changed:
            raise ConfigError(
                f"{recipe.output}: a recipe with another {', '.join(changed)} wrote this "
                "folder; choose another output, or remove the folder"
            )
    recipe.output.mkdir(parents=True, exist_ok=True)
    _write(path, content)


def _baseline_rows(recipe: FinetuneRun, source: Source, encoder: Encoder) -> list[Row]:
    figures: dict[str, list[dict[str, float]]] = {}
    started = time.monotonic()
    for seed in recipe.finetune.seeds:
        splits = source.splits(seed)
        spec, target = fit_specs(recipe, encoder, splits)
        test = standardised(spec, target, splits.test)
        found = baselines(spec, target, splits, source.season, seed)
        for name, predicted in found.items():
            figures.setdefault(name, []).append(score(target.task, test, predicted))
    seconds = (time.monotonic() - started) / len(recipe.finetune.seeds) / max(1, len(figures))
    return [Row(name, "baseline", tuple(each), seconds=seconds) for name, each in figures.items()]


def _arm(recipe: FinetuneRun, source: Source, encoder: Encoder, arm: str) -> Row:
    """All seeds of one way to start, at the learning rate the first seed takes."""
    lrs = recipe.finetune.lrs or (recipe.train.lr,)
    first, *others = recipe.finetune.seeds
    tried = [_run(recipe, source, encoder, arm, first, lr) for lr in lrs]
    best = min(range(len(lrs)), key=lambda n: tried[n]["validation_loss"])
    rest = [_run(recipe, source, encoder, arm, seed, lrs[best]) for seed in others]
    results = [tried[best], *rest]
    return Row(
        ARMS[arm],
        arm,
        tuple(result["test"] for result in results),
        seconds=float(np.mean([result["seconds"] for result in results])),
        lr=lrs[best],
        trained=results[0]["trained"],
        parameters=results[0]["parameters"],
    )


def _run(
    recipe: FinetuneRun, source: Source, encoder: Encoder, arm: str, seed: int, lr: float
) -> dict[str, Any]:
    """One run's figures; read where it was finished before."""
    folder = recipe.output / "runs" / f"{arm}-seed{seed}-lr{lr:g}"
    if (folder / RESULT).is_file():
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return result
    splits = source.splits(seed)
    spec, target = fit_specs(recipe, encoder, splits)
    own = seeded(recipe, seed, lr)
    model = build(own, encoder, spec, target, pretrained=arm == "pretrained")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    started = time.monotonic()
    loss = fit(own, model, splits, folder)
    seconds = time.monotonic() - started
    predicted = [prediction.value for prediction in model.predict(splits.test)]
    if target.task == "forecasting":
        predicted = [spec.standardise(value) for value in predicted]
    test = standardised(spec, target, splits.test)
    result = {
        "validation_loss": loss,
        "test": score(target.task, test, predicted),
        "seconds": seconds,
        "trained": trained,
        "parameters": sum(p.numel() for p in model.parameters()),
        "lr": lr,
    }
    logger.info("%s: validation loss %.4f, test %s", folder.name, loss, result["test"])
    pairs = [[_plain(s.target), _plain(p)] for s, p in zip(test, predicted, strict=True)]
    _write(folder / "predictions.json", pairs)
    if arm == "pretrained":
        _keep_best(recipe.output, model, folder.name, loss)
    _write(folder / RESULT, result)  # last: with it the run is finished
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def _keep_best(output: Path, model: MicoForModality, run: str, loss: float) -> None:
    path = output / BEST
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["validation_loss"] <= loss:
        return
    model.save_pretrained(output)
    _write(path, {"run": run, "validation_loss": loss})


def standardised(spec: Any, target: Target, samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose steps to forecast are on the training scale; others as they are."""
    if target.task != "forecasting":
        return list(samples)
    assert isinstance(spec, SequenceInput)
    return [replace(s, target=spec.standardise(np.asarray(s.target))) for s in samples]


def _trains(recipe: FinetuneRun) -> str:
    if recipe.finetune.lora is not None:
        return f"tokenizer, head, LoRA r={recipe.finetune.lora.r}"
    return "tokenizer, head" if "encoder" in recipe.train.freeze else "all"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)

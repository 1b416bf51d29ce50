"""``mico-chat finetune``: train, compare, report.

For every seed the pretrained encoder, random blocks in its place (the control), and the baselines
see the same split. The learning rate of each is the recipe's one whose first seed has the lowest
validation loss; test samples choose nothing. The output folder holds the best model by validation
loss. An interrupted command goes on: finished runs are read, an unfinished one resumes.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.utils import logging as hugging_logging

from mico_chat.checkpoints.assemble import Encoder, read_encoder
from mico_chat.errors import ConfigError
from mico_chat.evaluation.report import machine
from mico_chat.model.encoder import OmniEncoder
from mico_research.finetune.augment import Augmenter
from mico_research.finetune.baselines import baselines
from mico_research.finetune.recipe import EncoderLora, FinetuneRun, Source, Splits
from mico_research.finetune.report import Report, Row, found_again, score, write_report
from mico_research.modalities.families import GraphInput, PictureInput, SequenceInput, TextInput
from mico_research.modalities.media import MediaInput
from mico_research.modalities.model import MicoForModality, MicoModalityConfig
from mico_research.modalities.samples import Array, Sample, Target
from mico_research.modalities.table import TableInput
from mico_training.parallel import put_together
from mico_training.recipe import load_recipe
from mico_training.records import gathered, is_first, result_of, run_once, write_json
from mico_training.trained import freeze
from mico_training.trainer import MicoTrainer, draws, train, training_arguments

logger = logging.getLogger(__name__)

STEM_BATCH = 32


def fit_specs(recipe: FinetuneRun, encoder: Encoder, splits: Splits) -> tuple[Any, Target]:
    samples = splits.train
    spec: Any
    match recipe.modality:
        case "text":
            spec = TextInput.fit(samples, recipe.finetune.patch)
        case "tabular":
            spec = TableInput.fit(samples, recipe.data.categorical)
        case "graph":
            spec = GraphInput.fit(samples)
        case "time_series" | "imu" | "hyperspectral" as modality:
            by_band = modality == "hyperspectral"
            spec = SequenceInput.fit(samples, recipe.finetune.patch, by_step=by_band)
            # Test sequences may be longer than any in training: their tokens need positions.
            everything = (*samples, *splits.validation, *splits.test)
            longest = max(len(np.asarray(sample.values)) for sample in everything)
            spec = spec.model_copy(update={"max_length": longest})
        case "video" | "audio" as kind:
            spec = MediaInput.of(kind, encoder.preprocessing, recipe.finetune.units)
        case _:
            spec = PictureInput.fit(samples, encoder.preprocessing)
    return spec, Target.fit(recipe.task, samples, splits.channels)


def build(
    recipe: FinetuneRun, encoder: Encoder, spec: Any, target: Target, pretrained: bool
) -> MicoForModality:
    """A model with a new tokenizer and head, and with the encoder's blocks.

    Without ``pretrained`` (the control) blocks, [CLS] and positions are new too. The stem and the
    patch embedding always stay the encoder's.
    """
    source = encoder.source.encoder
    config = encoder.source.config.encoder_config
    data = recipe.data.dataset or recipe.data.package or recipe.data.train
    unknown = [{"stage": recipe.model.name, "data": None}]
    before = (encoder.source.config.trained_on or unknown) if pretrained else []
    model = MicoForModality(
        MicoModalityConfig(
            encoder_config=config,
            modality=recipe.modality,
            layers=recipe.finetune.layers,
            dropout=recipe.finetune.dropout,
            input_spec=spec.model_dump(mode="json"),
            target_spec=target.model_dump(mode="json"),
            trained_on=[*before, {"stage": "finetune", "data": [str(data)]}],
        )
    )
    state = source.state_dict()
    if not pretrained:
        fresh = OmniEncoder(config).state_dict()
        keep = ("stem.", "vit.patch_embed.")
        state = {name: state[name] if name.startswith(keep) else fresh[name] for name in state}
    model.encoder.load_state_dict({name: state[name] for name in model.encoder.state_dict()})
    if pretrained and model.order is not None and isinstance(spec, MediaInput):
        model.order.take(encoder.source.context, spec.modality)
    if model.encoder.stem is not None:
        model.encoder.stem.requires_grad_(False)
    blocks: Any = cast(Any, model.encoder.vit).blocks
    shares: Any = calculate_drop_path_rates(recipe.finetune.drop_path, len(blocks))
    for block, share in zip(blocks, shares, strict=True):
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
    freeze(model, recipe.train.freeze)
    if recipe.finetune.lora is not None:
        add_lora(model.encoder, recipe.finetune.lora)
    return model


def add_lora(encoder: OmniEncoder, lora: EncoderLora) -> None:
    """Freeze the encoder and put adapters on linear layers of its blocks."""
    blocks: Any = encoder.vit
    names = [name for name, m in blocks.blocks.named_modules() if isinstance(m, nn.Linear)]
    for target in lora.targets:
        found = [name for name in names if name.split(".")[-1] == target]
        if not found:
            known = ", ".join(sorted({name.split(".")[-1] for name in names}))
            reason = f"the layer {target!r} does not exist; the layers are {known}"
            raise ConfigError(f"finetune.lora.targets: {reason}")
        attention = blocks.blocks.get_submodule(found[0].rpartition(".")[0])
        if target == "qkv" and "q_bias" in dict(attention.named_parameters(recurse=False)):
            raise ConfigError(
                "finetune.lora.targets: this encoder keeps the biases of qkv outside of its "
                "layer, where an adapter cannot reach them; use proj, fc1 and fc2"
            )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"blocks\.\d+\.(.*\.)?({'|'.join(lora.targets)})",
    )
    encoder.requires_grad_(False)
    inject_adapter_in_model(config, encoder.vit)


def merge_lora(encoder: OmniEncoder) -> None:
    for name, module in list(encoder.vit.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.vit.get_submodule(parent), child, module.get_base_layer())


class Mapped(Dataset[dict[str, Array]]):
    def __init__(self, make: Callable[[int], dict[str, Array]], n: int) -> None:
        self.make, self.n = make, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, place: int) -> dict[str, Array]:
        return self.make(place)


def draws_of(arrays: Any, n: int, seed: int, augmenter: Augmenter | None = None) -> Mapped:
    """``n`` draws, epoch after epoch; an ``augmenter`` makes arrays of samples anew for each."""
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(len(arrays)) for _ in range(-(-n // len(arrays)))]
    order = np.concatenate(epochs)[:n]
    if augmenter is not None:
        return Mapped(lambda place: augmenter.arrays(arrays[int(order[place])], seed, place), n)
    return Mapped(lambda place: arrays[int(order[place])], n)


@torch.inference_mode()
def prepared(model: MicoForModality, samples: Sequence[Sample]) -> Any:
    """Samples as arrays with labels; pictures become features of the frozen stem, once.

    Without a stem, files are read anew for every step: their pixels may not fit in memory.
    """
    if model.encoder.stem is None and isinstance(samples[0].values, Path):
        return Mapped(lambda place: model.arrays(samples[place], labelled=True), len(samples))
    if model.encoder.stem is None:
        return [model.arrays(sample, labelled=True) for sample in samples]
    stem = model.encoder.stem.eval()
    arrays: list[dict[str, Array]] = []
    for start in range(0, len(samples), STEM_BATCH):
        chosen = [model.arrays(s, labelled=True) for s in samples[start : start + STEM_BATCH]]
        inputs = model.batch(chosen)
        pixels: Tensor = inputs["pixel_values"].to(model.device)
        features = torch.cat([stem(part).half().cpu() for part in pixels.split(STEM_BATCH)])
        counts = inputs.get("units")
        own = features if counts is None else features.split(counts.tolist())
        for one, found in zip(chosen, own, strict=True):
            arrays.append({"features": found.numpy(), "labels": one["labels"]})
    return arrays


def fit(recipe: FinetuneRun, model: MicoForModality, splits: Splits, output: Path) -> float:
    """Train a model in place; returns its best validation loss. Resumes from ``output``."""
    settings = recipe.train
    every = min(settings.save_steps, settings.steps)
    arguments = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "per_device_eval_batch_size": max(64, settings.batch_size),
        "prediction_loss_only": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,
        "disable_tqdm": True,
        "dataloader_drop_last": False,  # no validation sample is left out; draws leave no rest
        **settings.arguments,
    }
    train_changes = {"arguments": arguments, "save_steps": every}
    changes = {"output": output, "train": settings.model_copy(update=train_changes)}
    run = recipe.model_copy(update=changes)
    hugging = training_arguments(run)
    spec, asked = cast(Any, model.spec), recipe.finetune.augment
    augmenter = None if asked is None else Augmenter(asked, spec, model.target)

    def batch(arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        drawn = [one.pop("draw") for one in arrays if "draw" in one]
        found = model.batch(arrays)
        return augmenter.mixed(found, drawn) if augmenter is not None and drawn else found

    drawn = splits.train if augmenter is not None else prepared(model, splits.train)
    trainer = MicoTrainer(
        model=model,
        args=hugging,
        train=run.train,
        train_dataset=draws_of(drawn, draws(hugging), settings.seed, augmenter),
        eval_dataset=prepared(model, splits.validation),
        data_collator=batch,
        callbacks=[EarlyStoppingCallback(recipe.finetune.patience)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every logged line
    train(trainer, run, f"{recipe.modality}: {recipe.task}")
    best = trainer.state.best_metric
    assert best is not None
    return float(best)


def predictions(
    recipe: FinetuneRun, model: MicoForModality, samples: Sequence[Sample]
) -> list[Any]:
    """The values that a model predicts; processes share the samples, and each gets all values."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    # Each process has as many samples: those of FSDP wait for each other in every layer.
    n = -(-len(samples) // ranks)
    own = [samples[place % len(samples)] for place in range(rank * n, (rank + 1) * n)]
    half = recipe.train.bf16 and recipe.train.parallel == "fsdp"  # then its layers are in bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
        found = [prediction.value for prediction in model.predict(own)]
    if isinstance(model, FSDPModule):
        model.reshard()
    return gathered(found)[: len(samples)]


# --- the command --------------------------------------------------------------------------------

BEST = "best.json"
ARMS = {"pretrained": "MiCo, pretrained blocks", "random": "MiCo, random blocks"}


def main(config: Path, overrides: Sequence[str] = ()) -> Report:
    """Run a recipe, or go on with it. Its output folder gets the model and the report."""
    recipe = load_recipe(FinetuneRun, config, overrides)
    training_arguments(recipe)  # forms the group of processes
    hugging_logging.disable_progress_bar()
    source = Source(recipe)
    first = source.splits(recipe.finetune.seeds[0])
    study = Study(recipe, source, read_encoder(recipe.model.name))
    for folder in (recipe.output / "runs").glob("*"):
        result_of(folder, study.settings)
    rows = study.baselines() if recipe.finetune.baselines else []
    for arm in ("pretrained", *(["random"] if recipe.finetune.control else [])):
        rows.append(study.arm(arm))
    trains = "tokenizer, head" if "encoder" in recipe.train.freeze else "all"
    if recipe.finetune.lora is not None:
        trains = f"tokenizer, head, LoRA r={recipe.finetune.lora.r}"
    report = Report(
        name=recipe.output.name,
        modality=recipe.modality,
        task=recipe.task,
        data=source.note,
        n=(len(first.train), len(first.validation), len(first.test)),
        seeds=recipe.finetune.seeds,
        layers=recipe.finetune.layers,
        trains=trains,
        rows=tuple(rows),
        machine=machine(),
    )
    if is_first():
        write_report(report, recipe.output)
    return report


@dataclass(frozen=True)
class Study:
    recipe: FinetuneRun
    source: Source
    encoder: Encoder

    @property
    def settings(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json", exclude={"output"})}

    def baselines(self) -> list[Row]:
        figures: dict[str, list[dict[str, float]]] = {}
        started = time.monotonic()
        for seed in self.recipe.finetune.seeds:
            splits = self.source.splits(seed)
            spec, target = fit_specs(self.recipe, self.encoder, splits)
            test = standardised(spec, target, splits.test)
            found = baselines(spec, target, splits, self.source.season, seed)
            for name, predicted in found.items():
                figure = self.figures(spec, target, test, predicted)
                figures.setdefault(name, []).append(figure)
        runs = len(self.recipe.finetune.seeds) * max(1, len(figures))
        seconds = (time.monotonic() - started) / runs
        return [
            Row(name=name, kind="baseline", figures=tuple(each), seconds=seconds)
            for name, each in figures.items()
        ]

    def figures(
        self, spec: Any, target: Target, test: Sequence[Sample], predicted: Sequence[Any]
    ) -> dict[str, float]:
        if target.task == "re-identification":
            return found_again(test, predicted, self.source.public.trials)
        found = score(target.task, test, predicted, target.classes)
        if self.source.public.channels:  # in the data's unit
            (unit,) = spec.std[0]
            found = {"MSE": found["MSE"] * unit**2, "MAE": found["MAE"] * unit}
        return found

    def arm(self, arm: str) -> Row:
        lrs = self.recipe.finetune.lrs or (self.recipe.train.lr,)
        first, *others = self.recipe.finetune.seeds
        tried = {lr: self.run(arm, first, lr) for lr in lrs}
        lr = min(lrs, key=lambda lr: tried[lr]["validation_loss"])
        results = [tried[lr], *(self.run(arm, seed, lr) for seed in others)]
        return Row(
            name=ARMS[arm],
            kind=arm,
            figures=tuple(result["test"] for result in results),
            seconds=float(np.mean([result["seconds"] for result in results])),
            lr=lr,
            trained=results[0]["trained"],
            parameters=results[0]["parameters"],
        )

    def run(self, arm: str, seed: int, lr: float) -> dict[str, Any]:
        folder = self.recipe.output / "runs" / f"{arm}-seed{seed}-lr{lr:g}"
        return run_once(folder, self.settings, partial(self._train, folder, arm, seed, lr))

    def _train(self, folder: Path, arm: str, seed: int, lr: float) -> dict[str, Any]:
        splits = self.source.splits(seed)
        spec, target = fit_specs(self.recipe, self.encoder, splits)
        set_seed(seed)  # of the model that is built next
        train = self.recipe.train.model_copy(update={"seed": seed, "lr": lr})
        own = self.recipe.model_copy(update={"train": train})
        model = build(own, self.encoder, spec, target, pretrained=arm == "pretrained")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        started = time.monotonic()
        loss = fit(own, model, splits, folder)
        seconds = time.monotonic() - started
        predicted = predictions(own, model, splits.test)
        put_together(model, lambda name, parameter: True, is_first())
        if target.task == "forecasting":
            predicted = [spec.standardise(value) for value in predicted]
        test = standardised(spec, target, splits.test)
        figures = self.figures(spec, target, test, predicted)
        logger.info("%s: validation loss %.4f, test %s", folder.name, loss, figures)
        pairs = [[sample.target, value] for sample, value in zip(test, predicted, strict=True)]
        best = self.recipe.output / BEST
        least = json.loads(best.read_bytes())["validation_loss"] if best.is_file() else np.inf
        if is_first() and target.task != "re-identification":  # long vectors
            write_json(folder / "predictions.json", pairs)
        if arm == "pretrained" and loss < least and is_first():
            merge_lora(model.encoder)
            model.save_pretrained(self.recipe.output)
            write_json(best, {"run": folder.name, "validation_loss": loss})
        return {
            "validation_loss": loss,
            "test": figures,
            "seconds": seconds,
            "trained": trained,
            "parameters": sum(p.numel() for p in model.parameters()),
        }


def standardised(spec: Any, target: Target, samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose steps to forecast are on the training scale; others as they are."""
    if target.task != "forecasting":
        return list(samples)
    assert isinstance(spec, SequenceInput)
    return [replace(s, target=spec.standardise(np.asarray(s.target))) for s in samples]

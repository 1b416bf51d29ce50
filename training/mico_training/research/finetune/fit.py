"""One run: a model made for the training samples, trained until validation gets no better."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from mico_chat.checkpoints.assemble import Encoder
from mico_chat.errors import ConfigError
from mico_chat.model.encoder import OmniEncoder
from mico_training.research.finetune.data import Splits
from mico_training.research.finetune.recipe import EncoderLora, FinetuneRun
from mico_training.research.modalities.graph import GraphInput
from mico_training.research.modalities.modeling import MicoForModality, MicoModalityConfig
from mico_training.research.modalities.picture import PictureInput
from mico_training.research.modalities.readers import PICTURES
from mico_training.research.modalities.sample import Array, Sample
from mico_training.research.modalities.sequence import SequenceInput
from mico_training.research.modalities.table import TableInput
from mico_training.research.modalities.target import Target
from mico_training.trainer import MicoTrainer, draws, freeze, train, training_arguments

logger = logging.getLogger(__name__)

STEM_BATCH = 32


def fit_specs(recipe: FinetuneRun, encoder: Encoder, splits: Splits) -> tuple[Any, Target]:
    """What the training samples say of input and target.

    Raises:
        DataError: samples that do not go together.
    """
    samples = splits.train
    spec: Any
    if recipe.modality == "tabular":
        spec = TableInput.fit(samples, recipe.data.categorical)
    elif recipe.modality == "graph":
        spec = GraphInput.fit(samples)
    elif recipe.modality in PICTURES:
        spec = PictureInput.fit(samples, encoder.preprocessing)
    else:
        by_band = recipe.modality == "hyperspectral"
        spec = SequenceInput.fit(samples, recipe.finetune.patch, by_step=by_band)
        # Test sequences may be longer than any in training: their tokens need positions.
        longest = max(
            len(np.asarray(s.values)) for s in (*samples, *splits.validation, *splits.test)
        )
        spec = spec.model_copy(update={"max_length": longest})
    return spec, Target.fit(recipe.task, samples, splits.channels)


def build(
    recipe: FinetuneRun, encoder: Encoder, spec: Any, target: Target, pretrained: bool
) -> MicoForModality:
    """A model whose tokenizer and head are new, and whose blocks are the encoder's.

    Args:
        recipe: which layers, and what trains.
        encoder: the pretrained one.
        spec: of :func:`fit_specs`.
        target: likewise.
        pretrained: False for the control: blocks, [CLS] and positions as new as at the start of
            pretraining. What embeds pictures stays as it is.

    Raises:
        ConfigError, ModelError: layers, targets or names that the encoder does not have.
    """
    source = encoder.source.encoder
    config = encoder.source.config.encoder_config
    model = MicoForModality(
        MicoModalityConfig(
            encoder_config=config,
            modality=recipe.modality,
            layers=recipe.finetune.layers,
            dropout=recipe.finetune.dropout,
            input_spec=spec.model_dump(mode="json"),
            target_spec=target.model_dump(mode="json"),
        )
    )
    own = model.encoder.state_dict()
    state = source.state_dict()
    if not pretrained:
        fresh = OmniEncoder(config).state_dict()
        keep = ("stem.", "vit.patch_embed.")
        state = {name: state[name] if name.startswith(keep) else fresh[name] for name in state}
    model.encoder.load_state_dict({name: state[name] for name in own})
    if model.encoder.stem is not None:
        model.encoder.stem.requires_grad_(False)
    freeze(model, recipe.train.freeze)
    if recipe.finetune.lora is not None:
        add_lora(model.encoder, recipe.finetune.lora)
    return model


def add_lora(encoder: OmniEncoder, lora: EncoderLora) -> None:
    """Freeze the encoder and put adapters on the blocks' linear layers.

    Raises:
        ConfigError: a target that no block has, or one whose weight is used without its layer.
    """
    blocks: Any = encoder.vit
    names = [name for name, m in blocks.blocks.named_modules() if isinstance(m, nn.Linear)]
    for target in lora.targets:
        found = [name for name in names if name.split(".")[-1] == target]
        if not found:
            known = ", ".join(sorted({name.split(".")[-1] for name in names}))
            raise ConfigError(
                f"finetune.lora.targets: the layer {target!r} does not exist; the layers are "
                f"{known}"
            )
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
    """Put the adapters into the weights: the layers are plain again."""
    for name, module in list(encoder.vit.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.vit.get_submodule(parent), child, module.get_base_layer())


class Draws(Dataset[dict[str, Array]]):
    """Training samples as one list of draws: every epoch in an order of its own, by the seed."""

    def __init__(self, arrays: Sequence[dict[str, Array]], n: int, seed: int) -> None:
        self.arrays = arrays
        rng = np.random.default_rng(seed)
        epochs = -(-n // len(arrays))
        self.order = np.concatenate([rng.permutation(len(arrays)) for _ in range(epochs)])[:n]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Array]:
        return self.arrays[int(self.order[index])]


class Arrays(Dataset[dict[str, Array]]):
    """Samples as arrays."""

    def __init__(self, arrays: Sequence[dict[str, Array]]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> dict[str, Array]:
        return self.arrays[index]


@torch.inference_mode()
def prepared(model: MicoForModality, samples: Sequence[Sample]) -> list[dict[str, Array]]:
    """Samples as arrays with labels; of pictures the frozen stem's features, computed once."""
    if model.encoder.stem is None:
        return [model.arrays(sample, labelled=True) for sample in samples]
    stem = model.encoder.stem.eval()
    arrays: list[dict[str, Array]] = []
    for start in range(0, len(samples), STEM_BATCH):
        chosen = [model.arrays(s, labelled=True) for s in samples[start : start + STEM_BATCH]]
        pixels: Tensor = model.batch(chosen)["pixel_values"].to(model.device)
        for one, features in zip(chosen, stem(pixels).half().cpu().numpy(), strict=True):
            arrays.append({"features": features, "labels": one["labels"]})
    return arrays


def fit(recipe: FinetuneRun, model: MicoForModality, splits: Splits, output: Path) -> float:
    """Train a model in place, to its best validation loss, which is returned.

    Goes on from the last checkpoint in ``output``, where there is one.
    """
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
    run = recipe.model_copy(
        update={
            "output": output,
            "train": settings.model_copy(update={"arguments": arguments, "save_steps": every}),
        }
    )
    hugging = training_arguments(run)
    trainer = MicoTrainer(
        model=model,
        args=hugging,
        train=run.train,
        train_dataset=Draws(prepared(model, splits.train), draws(hugging), settings.seed),
        eval_dataset=Arrays(prepared(model, splits.validation)),
        data_collator=model.batch,
        callbacks=[EarlyStoppingCallback(recipe.finetune.patience)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints every logged line
    train(trainer, run, f"{recipe.modality}: {recipe.task}")
    merge_lora(model.encoder)
    best = trainer.state.best_metric
    assert best is not None
    return float(best)


def seeded(recipe: FinetuneRun, seed: int, lr: float) -> FinetuneRun:
    """The recipe of one run; the seed is set, so that the model built next is the seed's."""
    set_seed(seed)
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"seed": seed, "lr": lr})}
    )

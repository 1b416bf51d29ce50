"""Stage 2: the bridge learns to speak to a frozen language model of a frozen encoder's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from mico_chat.checkpoints.assemble import concept_names
from mico_training.build_model import build_chat, hold_encoder, prepare_llm
from mico_training.data.collate_chat import ChatCollator
from mico_training.data.conversations import CaptionDataset
from mico_training.data.grouped import GroupedByLength
from mico_training.data.simulated import ChatDataset, SimulatedNames
from mico_training.data.sources import open_mixture
from mico_training.media_noise import MediaNoise
from mico_training.parallel import put_together
from mico_training.prepare import media_loader
from mico_training.recipe import Stage2Run, load_recipe
from mico_training.trainer import (
    MicoTrainer,
    draws,
    examples_per_step,
    freeze,
    train,
    train_only,
    training_arguments,
)
from mico_training.words import WordAlignment


def main(config: Path, overrides: Sequence[str] = ()) -> None:
    """Run stage 2 from a recipe, or go on with it; the trained model is in its output folder.

    Raises:
        ConfigError, DataError: what is wrong with the recipe or the data, in one line.
    """
    recipe = load_recipe(Stage2Run, config, overrides)
    arguments = training_arguments(recipe)
    stage = recipe.stage2
    mixture = open_mixture(recipe.data, "caption", recipe.train.seed)
    set_seed(recipe.train.seed)
    chat = build_chat(recipe.model, spread=recipe.train.parallel == "fsdp")
    train_only(chat.model, stage.trainable)
    freeze(chat.model, recipe.train.freeze)
    hold_encoder(chat.model, recipe.model)
    prepare_llm(chat.model, recipe.model)
    loader = media_loader(recipe, arguments, chat.model, chat.preprocessing, mixture)
    names, _ = concept_names(chat.model.config)
    examples: ChatDataset = CaptionDataset(
        mixture, draws(arguments), stage.join, regions=stage.objective == "words"
    )
    if stage.simulate > 0:
        examples = SimulatedNames(examples, mixture, names, stage.simulate)
    if recipe.train.group_by_length:
        examples = GroupedByLength(examples, examples_per_step(arguments), recipe.train.seed)
    model = WordAlignment(chat.model) if stage.objective == "words" else chat.model
    MediaNoise(chat.model, recipe.train.drop, model)
    trainer = MicoTrainer(
        model=model,
        args=arguments,
        train=recipe.train,
        train_dataset=examples,
        data_collator=ChatCollator(chat.processor, loader, recipe.train.max_length),
    )
    train(trainer, recipe, "Stage 2: alignment")
    put_together(chat.model, chat.is_saved, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        chat.save(recipe.output)

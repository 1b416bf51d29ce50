"""Stage 3: bridge and language model (LoRA, or all of it) learn from conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import set_seed

from mico_chat.checkpoints.assemble import concept_names
from mico_chat.errors import ConfigError
from mico_training.build_model import add_lora, build_chat, hold_encoder, prepare_llm
from mico_training.data.collate_chat import ChatCollator
from mico_training.data.conversations import ConversationDataset
from mico_training.data.grouped import GroupedByLength
from mico_training.data.simulated import ChatDataset, SimulatedNames
from mico_training.data.sources import open_mixture
from mico_training.media_noise import MediaNoise
from mico_training.parallel import put_together
from mico_training.prepare import media_loader
from mico_training.recipe import Stage3Run, load_recipe
from mico_training.trainer import (
    MicoTrainer,
    draws,
    examples_per_step,
    freeze,
    train,
    train_only,
    training_arguments,
)


def main(config: Path, overrides: Sequence[str] = ()) -> None:
    """Run stage 3 from a recipe, or go on with it; the trained model is in its output folder.

    Raises:
        ConfigError, DataError: what is wrong with the recipe or the data, in one line.
    """
    recipe = load_recipe(Stage3Run, config, overrides)
    stage = recipe.stage3
    if (Path(recipe.model.name) / "lora").is_dir():
        raise ConfigError(
            f"{recipe.model.name} already has a LoRA adapter; start from the output of stage 2"
        )
    if stage.full and recipe.model.llm_quantization is not None:
        raise ConfigError(
            "stage3.full trains every weight, but model.llm_quantization "
            f"{recipe.model.llm_quantization} freezes them: use lora, or leave out "
            "llm_quantization"
        )
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, "conversation", recipe.train.seed)
    set_seed(recipe.train.seed)
    chat = build_chat(recipe.model, spread=recipe.train.parallel == "fsdp")
    train_only(chat.model, [*stage.trainable, "llm"] if stage.full else stage.trainable)
    if not stage.full and stage.lora is not None:
        add_lora(chat.model, stage.lora)
    freeze(chat.model, recipe.train.freeze)
    hold_encoder(chat.model, recipe.model)
    prepare_llm(chat.model, recipe.model)
    loader = media_loader(recipe, arguments, chat.model, chat.preprocessing, mixture)
    names, _ = concept_names(chat.model.config)
    examples: ChatDataset = ConversationDataset(mixture, draws(arguments), stage.max_turns)
    if stage.simulate > 0:
        examples = SimulatedNames(examples, mixture, names, stage.simulate)
    if recipe.train.group_by_length:
        examples = GroupedByLength(examples, examples_per_step(arguments), recipe.train.seed)
    MediaNoise(chat.model, recipe.train.drop)
    trainer = MicoTrainer(
        model=chat.model,
        args=arguments,
        train=recipe.train,
        train_dataset=examples,
        data_collator=ChatCollator(chat.processor, loader, recipe.train.max_length),
    )
    train(trainer, recipe, "Stage 3: instruction tuning")
    put_together(chat.model, chat.is_saved, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        chat.save(recipe.output)

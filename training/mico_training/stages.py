"""The three training stages: pretraining, alignment, instruction tuning (paper 3.3, 3.4, 4.4).

A stage reads its recipe, trains, and leaves the trained model in the recipe's output folder. The
same command goes on with an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed

from mico_chat.checkpoints.assemble import concept_names
from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig
from mico_training.build_model import (
    Chat,
    Pretraining,
    add_lora,
    build_chat,
    build_pretraining,
    concept_labels,
    hold_encoder,
    prepare_llm,
)
from mico_training.data.batches import ChatCollator, ContextCollator
from mico_training.data.contexts import CORPUS_PAIRS, ContextDataset, QuestionDataset
from mico_training.data.conversations import (
    CaptionDataset,
    ChatDataset,
    ConversationDataset,
    GroupedByLength,
    SimulatedNames,
)
from mico_training.data.media import MediaLoader, media_loader
from mico_training.data.mixture import Mixture
from mico_training.data.sample import Need
from mico_training.data.sources import open_mixture
from mico_training.media_noise import MediaNoise
from mico_training.parallel import put_together
from mico_training.recipe import Stage1Run, Stage2Run, Stage3Run, load_recipe
from mico_training.trainer import (
    MicoTrainer,
    draws,
    examples_per_step,
    freeze,
    train,
    train_only,
    training_arguments,
)
from mico_training.vocabulary import captions_of_mixture, learn_vocabulary
from mico_training.word_alignment import WordAlignment


def train_stage1(config: Path, overrides: Sequence[str] = ()) -> None:
    """Pretraining: encoder, context and text branch learn from paired media and words.

    Raises:
        ConfigError, DataError: recipe or data are wrong; one line says why. As in all stages.
    """
    recipe = load_recipe(Stage1Run, config, overrides)
    arguments = training_arguments(recipe)
    need: Need = "question" if recipe.stage1.questions else "caption"
    mixture = open_mixture(recipe.data, need, recipe.train.seed)
    tokenizer = None if Path(recipe.model.name).is_dir() else text_tokenizer(recipe, mixture)
    set_seed(recipe.train.seed)
    parts = build_pretraining(recipe.model, tokenizer)
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, mixture)
    trainer = pretrain(recipe, arguments, parts, mixture, loader)
    put_together(parts.model, lambda name, parameter: True, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        parts.save(recipe.output)


def pretrain(
    recipe: Stage1Run,
    arguments: TrainingArguments,
    parts: Pretraining,
    mixture: Mixture,
    loader: MediaLoader,
) -> MicoTrainer:
    """Train stage 1's model to the recipe's end, from the last checkpoint if there is one."""
    model = parts.model
    settings = model.config
    settings.mask_probability = recipe.stage1.mask_probability
    check_corpus_pairs(settings, recipe.stage1.cross_corpus)
    model.objective_weights = recipe.stage1.weights.model_dump()
    freeze(model, recipe.train.freeze)
    dataset = (
        QuestionDataset(mixture, draws(arguments))
        if recipe.stage1.questions
        else ContextDataset(
            mixture, draws(arguments), recipe.train.drop.modality, recipe.stage1.cross_corpus
        )
    )
    trainer = MicoTrainer(
        model=model,
        args=arguments,
        train=recipe.train,
        train_dataset=dataset,
        data_collator=ContextCollator(
            parts.tokenizer,
            loader,
            concept_labels(settings),
            recipe.stage1.caption_length,
            recipe.stage1.most_units,
            recipe.stage1.most_slices,
            settings.text_config.max_position_embeddings,
        ),
    )
    train(trainer, recipe, "Stage 1: pretraining")
    return trainer


def text_tokenizer(recipe: Stage1Run, mixture: Mixture) -> PreTrainedTokenizerBase:
    """The text branch's tokenizer: the recipe's, or a vocabulary learnt from the captions.

    A learnt one stays in the output folder, so that a resumed run reads the same tokens.
    """
    if recipe.stage1.tokenizer is not None:
        return AutoTokenizer.from_pretrained(recipe.stage1.tokenizer)
    folder = recipe.output / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        captions = captions_of_mixture(mixture)
        learn_vocabulary(captions, recipe.stage1.vocabulary).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_corpus_pairs(config: MicoConfig, cross_corpus: float) -> None:
    """Raise a ConfigError if E_Sam lacks a row for a pair of corpora (paper 3.3)."""
    context = config.context_config
    if cross_corpus > 0 and context.n_corpus_pairs <= len(CORPUS_PAIRS):
        raise ConfigError(
            f"stage1.cross_corpus needs {len(CORPUS_PAIRS) + 1} rows of E_Sam, but "
            f"context_config.n_corpus_pairs is {context.n_corpus_pairs}"
        )


def train_stage2(config: Path, overrides: Sequence[str] = ()) -> None:
    """Alignment: the bridge learns to bring the encoder's tokens to a frozen language model."""
    recipe = load_recipe(Stage2Run, config, overrides)
    stage = recipe.stage2
    words = stage.objective == "words"

    def examples(mixture: Mixture, n: int) -> ChatDataset:
        return CaptionDataset(mixture, n, stage.join, regions=words)

    _train_chat(
        recipe,
        examples,
        lambda chat: train_only(chat.model, stage.trainable),
        "Stage 2: alignment",
        objective=WordAlignment if words else None,
    )


def train_stage3(config: Path, overrides: Sequence[str] = ()) -> None:
    """Instruction tuning: bridge and language model (LoRA, or all of it) learn conversations."""
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

    def trainable(chat: Chat) -> None:
        train_only(chat.model, [*stage.trainable, "llm"] if stage.full else stage.trainable)
        if not stage.full and stage.lora is not None:
            add_lora(chat.model, stage.lora)

    def examples(mixture: Mixture, n: int) -> ChatDataset:
        return ConversationDataset(mixture, n, stage.max_turns)

    _train_chat(recipe, examples, trainable, "Stage 3: instruction tuning")


def _train_chat(
    recipe: Stage2Run | Stage3Run,
    examples_of: Callable[[Mixture, int], ChatDataset],
    set_trainable: Callable[[Chat], None],
    title: str,
    objective: Callable[..., nn.Module] | None = None,
) -> None:
    """Train a chat model on ``examples_of`` the mixture and the number of draws."""
    arguments = training_arguments(recipe)
    stage = recipe.stage2 if isinstance(recipe, Stage2Run) else recipe.stage3
    need: Need = "caption" if isinstance(recipe, Stage2Run) else "conversation"
    mixture = open_mixture(recipe.data, need, recipe.train.seed)
    set_seed(recipe.train.seed)
    chat = build_chat(recipe.model, spread=recipe.train.parallel == "fsdp")
    set_trainable(chat)
    freeze(chat.model, recipe.train.freeze)
    hold_encoder(chat.model, recipe.model)
    prepare_llm(chat.model, recipe.model)
    loader = media_loader(recipe, arguments, chat.model, chat.preprocessing, mixture)
    examples = examples_of(mixture, draws(arguments))
    if stage.simulate > 0:
        names, _ = concept_names(chat.model.config)
        examples = SimulatedNames(examples, mixture, names, stage.simulate)
    if recipe.train.group_by_length:
        examples = GroupedByLength(examples, examples_per_step(arguments), recipe.train.seed)
    model = chat.model if objective is None else objective(chat.model)
    MediaNoise(chat.model, recipe.train.drop, model)
    trainer = MicoTrainer(
        model=model,
        args=arguments,
        train=recipe.train,
        train_dataset=examples,
        data_collator=ChatCollator(chat.processor, loader, recipe.train.max_length),
    )
    train(trainer, recipe, title)
    put_together(chat.model, chat.is_saved, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        chat.save(recipe.output)

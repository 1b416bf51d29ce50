"""The three training stages: pretraining, alignment, instruction tuning (paper 3.3, 3.4, 4.4).

A stage reads its recipe, trains, and leaves the trained model in the recipe's output folder. The
same command goes on with an interrupted run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, TrainingArguments, set_seed

from mico_chat.errors import ConfigError
from mico_training import build_model
from mico_training.data.bad import BadSamples, GoodExamples
from mico_training.data.batches import ChatCollator, ContextCollator
from mico_training.data.examples import (
    CaptionDataset,
    ChatDataset,
    ContextDataset,
    GroupedByLength,
    QuestionDataset,
    SimulatedCaptions,
    SimulatedNames,
)
from mico_training.data.media import MediaLoader, media_loader
from mico_training.data.mixture import Mixture, need_of, open_mixture
from mico_training.data.order import Dealt
from mico_training.data.talk.conversations import ConversationDataset, shares
from mico_training.estimate import Estimate
from mico_training.health import room
from mico_training.parallel import put_together
from mico_training.parts.chunks import run_by_chunks
from mico_training.parts.dpo import DpoTrainer, PreferencePairs
from mico_training.parts.held_out import HeldOut
from mico_training.parts.media_noise import MediaNoise
from mico_training.parts.rounded import round_layers
from mico_training.parts.set_prediction import SetPrediction
from mico_training.parts.simulated import mistaken
from mico_training.recipe import Recipe, Stage1Run, Stage2Run, Stage3Run, load_recipe
from mico_training.scst import Cider, ScstTrainer
from mico_training.trained import freeze, record_data, train_only
from mico_training.trainer import MicoTrainer, draws, examples_per_step, train, training_arguments

logger = logging.getLogger(__name__)

COUNTED = 2000
"""In so many conversations the shares of the kinds of question are counted."""


def train_stage1(config: Path, overrides: Sequence[str] = (), cost: Estimate | None = None) -> None:
    """``cost``, here and below: the run's estimate, with which its log has the MFU."""
    recipe = load_recipe(Stage1Run, config, overrides)
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, need_of(recipe), recipe.train.seed)
    tokenizer = None  # a folder has its own
    if build_model.folder_of(recipe.model) is None:
        given, learnt = recipe.stage1.tokenizer, recipe.output / "tokenizer"
        tokenizer = (
            build_model.kept_vocabulary(learnt, mixture, recipe.stage1.vocabulary)
            if given is None
            else AutoTokenizer.from_pretrained(given)
        )
    set_seed(recipe.train.seed)
    parts = build_model.build_pretraining(recipe.model, tokenizer)
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, mixture)
    trainer = pretrain(recipe, arguments, parts, mixture, loader, cost)
    put_together(parts.model, lambda name, parameter: True, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        with room(recipe.output, 0, trainer.onward):
            parts.save(recipe.output)


def dealt(examples: Any, arguments: TrainingArguments) -> Dealt:
    """The examples in the order in which the loader gives them to the ranks."""
    size = arguments.per_device_train_batch_size
    return Dealt(examples, size, examples_per_step(arguments) // size)


def measured(
    recipe: Recipe,
    examples: Callable[[Mixture, int], Any],
    sound: GoodExamples,
    loaded: Callable[[Mixture], MediaLoader],
) -> dict[str, Any]:
    """The Trainer's argument for a recipe's ``eval``; ``loaded`` makes a mixture's features."""
    if recipe.eval is None:
        return {}
    mixture = open_mixture(recipe.eval.data, need_of(recipe), recipe.train.seed)
    loaded(mixture)
    n = min(recipe.eval.samples, sum(map(len, mixture.sources)))
    held = replace(sound, examples=examples(mixture, n), mixture=mixture)
    return {"eval_dataset": HeldOut(recipe.eval, held)}


def pretrain(
    recipe: Stage1Run,
    arguments: TrainingArguments,
    parts: build_model.Pretraining,
    mixture: Mixture,
    loader: MediaLoader,
    cost: Estimate | None = None,
) -> MicoTrainer:
    """Train stage 1's model to the recipe's end, from the last checkpoint if there is one."""
    model, settings = parts.model, parts.model.config
    settings.mask_probability = recipe.stage1.mask_probability
    rows = settings.context_config.n_corpus_pairs
    if recipe.stage1.cross_corpus > 0 and rows <= model.rows.n:  # paper 3.3
        raise ConfigError(
            f"stage1.cross_corpus needs {model.rows.n + 1} rows of E_Sam, but "
            f"context_config.n_corpus_pairs is {rows}"
        )
    positions, longest = settings.text_config.max_position_embeddings, recipe.stage1.text_length
    if recipe.stage1.cross_corpus > 0 and longest > positions:
        raise ConfigError(
            f"stage1.caption_length: {recipe.stage1.most_corpora} captions side by side have "
            f"{longest} tokens, but text_config.max_position_embeddings is {positions}; lower "
            "caption_length, fused_length or most_corpora, or give a new model more positions"
        )
    if recipe.stage1.subtitles and model.text.subtitle is None:
        raise ConfigError("stage1.subtitles needs a model with text_config.subtitles: true")
    model.hardness, model.smoothing = recipe.stage1.hardness, recipe.stage1.label_smoothing
    model.objective_weights = recipe.stage1.weights.model_dump()
    freeze(model, recipe.train.freeze)
    record_data(settings, recipe, "stage 1", build_model.folder_of(recipe.model) is None)
    if recipe.model.compile:
        build_model.compile_layers(model, "compile")
    if recipe.stage1.chunk is not None:
        run_by_chunks(model, recipe.stage1.chunk)
    dataset: QuestionDataset | ContextDataset | SimulatedCaptions = QuestionDataset(
        mixture, draws(arguments)
    )
    noise: MediaNoise | None = None
    if not recipe.stage1.questions:
        drop, stage1 = recipe.train.drop.modality, recipe.stage1
        joint = (stage1.cross_corpus, stage1.most_corpora)
        dataset = contexts = ContextDataset(mixture, draws(arguments), drop, *joint)
        if stage1.simulate > 0:
            if model.names is None:
                raise ConfigError("stage1.simulate needs a model with text_config.name_tokens")
            dataset = SimulatedCaptions(contexts, settings.concept_names[0], stage1.simulate)
            noise = MediaNoise(model, recipe.train.drop)
    collator = ContextCollator(
        parts.tokenizer, loader, build_model.concept_labels(settings), recipe.stage1, positions
    )
    sound = GoodExamples(dataset, mixture, collator)
    options: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train": recipe.train,
        "noise": noise,
        "bad": BadSamples(recipe.data, mixture.sources, recipe.output),
        "train_dataset": dealt(sound, arguments),
        "data_collator": sound.batch,
    }
    held: Any = partial(ContextDataset, drop=0.0, cross_corpus=0.0)
    held = QuestionDataset if recipe.stage1.questions else held
    loaded = partial(media_loader, recipe, arguments, model, parts.preprocessing)
    options |= measured(recipe, held, sound, loaded)
    trainer = (
        MicoTrainer(**options) if not recipe.stage1.scst else _scst(recipe, parts, mixture, options)
    )
    train(trainer, recipe, "Stage 1: pretraining", cost)
    return trainer


def _scst(
    recipe: Stage1Run, parts: build_model.Pretraining, mixture: Mixture, options: Mapping[str, Any]
) -> ScstTrainer:
    samples = (source[index] for source in mixture.sources for index in range(len(source)))
    reward = Cider([c for own in sample.captions.values() for c in own] for sample in samples)
    length = recipe.stage1.caption_length
    return ScstTrainer(tokenizer=parts.tokenizer, length=length, reward=reward, **options)


def train_stage2(config: Path, overrides: Sequence[str] = (), cost: Estimate | None = None) -> None:
    _train_chat(load_recipe(Stage2Run, config, overrides), "Stage 2: alignment", cost)


def train_stage3(config: Path, overrides: Sequence[str] = (), cost: Estimate | None = None) -> None:
    recipe = load_recipe(Stage3Run, config, overrides)
    packing = recipe.model.llm_quantization
    if recipe.stage3.full and packing is not None:
        raise ConfigError(
            f"stage3.full trains every weight, but model.llm_quantization {packing} freezes them: "
            "use lora, or leave out llm_quantization"
        )
    if recipe.stage3.quantization is not None and packing is not None:
        raise ConfigError(
            f"stage3.quantization {recipe.stage3.quantization} rounds the weights that "
            f"model.llm_quantization {packing} has rounded already: leave one of them out"
        )
    _train_chat(recipe, "Stage 3: instruction tuning", cost)


def _conversations(
    recipe: Stage3Run, arguments: TrainingArguments, mixture: Mixture, chat: build_model.Chat
) -> ChatDataset:
    """Stage 3's examples by draw; the log has the share of each kind of question."""
    stage3 = recipe.stage3
    examples: ChatDataset = ConversationDataset(
        mixture, draws(arguments), stage3.max_turns, stage3.given
    )
    if stage3.simulate > 0:
        concept = chat.model.config.concept_config
        visual, sound = chat.model.config.concept_names
        plain = (None if concept is None else concept.plain_names) or [*visual, *sound]
        concepts = chat.model.concepts
        unsure = concepts is not None and concepts.sure_above is not None
        alike = mistaken(concepts) if concepts is not None and unsure else ()
        names = ([*visual, *sound], plain, len(visual))
        examples = SimulatedNames(examples, mixture, *names, stage3.simulate, alike)
    if stage3.asked and arguments.process_index == 0:
        for line in shares(examples, chat.processor, COUNTED):
            logger.info(line)
    return examples


def _train_chat(recipe: Stage2Run | Stage3Run, title: str, cost: Estimate | None) -> None:
    arguments = training_arguments(recipe)
    dpo = recipe.stage3.dpo if isinstance(recipe, Stage3Run) else None
    asked = recipe.stage3.asked if isinstance(recipe, Stage3Run) else {}
    mixture = open_mixture(recipe.data, need_of(recipe), recipe.train.seed, asked)
    set_seed(recipe.train.seed)
    lora = None
    if isinstance(recipe, Stage3Run) and not recipe.stage3.full:
        lora = recipe.stage3.lora
    chat = build_model.build_chat(recipe.model, tune_adapter=lora is not None)
    model: nn.Module = chat.model
    examples: ChatDataset
    if isinstance(recipe, Stage2Run):
        stage2 = recipe.stage2
        train_only(chat.model, stage2.trainable)
        things = stage2.objective == "things"
        model = SetPrediction(chat.model) if things else model
        examples = CaptionDataset(mixture, draws(arguments), stage2.join, regions=things)
        held: Any = partial(CaptionDataset, join=0.0, regions=things)
    else:
        stage3 = recipe.stage3
        train_only(chat.model, [*stage3.trainable, "llm"] if stage3.full else stage3.trainable)
        if lora is not None:
            build_model.add_lora(chat.model, lora, chat.folder)
        if stage3.quantization is not None:
            round_layers(chat.model.llm, stage3.quantization, "stage3.quantization")
            chat.model.config.gguf_quantization = stage3.quantization
        if stage3.given > 0 and chat.model.things is None:
            raise ConfigError(
                "stage3.given: the model has no things; set bridge_config.things above 0"
            )
        held = partial(ConversationDataset, max_turns=stage3.max_turns)
        examples = _conversations(recipe, arguments, mixture, chat)
        model = model if dpo is None else PreferencePairs(chat.model, dpo)
    freeze(chat.model, recipe.train.freeze)
    new = build_model.folder_of(recipe.model) is None
    record_data(chat.model.config, recipe, title.partition(":")[0].lower(), new)
    build_model.hold_encoder(chat.model, recipe.model)
    if recipe.train.packing:
        build_model.check_packing(chat.model.llm)
    build_model.prepare_llm(chat.model, recipe.model)
    loaded = partial(media_loader, recipe, arguments, chat.model, chat.processor.preprocessing)
    pairs, length = dpo is not None, recipe.train.max_length
    collator = ChatCollator(chat.processor, loaded(mixture), length, pairs, recipe.train.packing)
    sound = GoodExamples(examples, mixture, collator)
    apart = replace(sound, collator=replace(collator, packing=False))  # to measure with
    ordered: Any = dealt(sound, arguments)
    if recipe.train.group_by_length:
        ordered = GroupedByLength(examples, examples_per_step(arguments), recipe.train.seed, sound)
    noise = None if isinstance(model, SetPrediction) else MediaNoise(chat.model, recipe.train.drop)
    trainer = (MicoTrainer if dpo is None else DpoTrainer)(
        model=model,
        args=arguments,
        train=recipe.train,
        noise=noise,
        bad=BadSamples(recipe.data, mixture.sources, recipe.output),
        train_dataset=ordered,
        data_collator=sound.batch,
        **measured(recipe, held, apart, loaded),
    )
    train(trainer, recipe, title, cost)
    put_together(chat.model, chat.is_saved, trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        with room(recipe.output, 0, trainer.onward):
            chat.save(recipe.output)

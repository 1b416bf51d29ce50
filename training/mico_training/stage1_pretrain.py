"""Stage 1: encoder, context and text branch learn from paired media and words (paper 3.3, 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig
from mico_training.build_model import Pretraining, build_pretraining, concept_labels
from mico_training.data.collate_contexts import ContextCollator
from mico_training.data.contexts import CORPUS_PAIRS, ContextDataset, QuestionDataset
from mico_training.data.media import MediaLoader
from mico_training.data.mixture import Mixture
from mico_training.data.sample import Need
from mico_training.data.sources import open_mixture
from mico_training.parallel import put_together
from mico_training.prepare import media_loader
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.trainer import MicoTrainer, draws, freeze, train, training_arguments
from mico_training.vocabulary import captions_of_mixture, learn_vocabulary


def main(config: Path, overrides: Sequence[str] = ()) -> None:
    """Run stage 1 from a recipe, or go on with it; the trained model is in its output folder.

    Raises:
        ConfigError, DataError: what is wrong with the recipe or the data, in one line.
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
    """Train a model to the recipe's end, from the last checkpoint where there is one."""
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

    A learnt one is kept in the output folder, so that a resumed run reads the same tokens.
    """
    if recipe.stage1.tokenizer is not None:
        return AutoTokenizer.from_pretrained(recipe.stage1.tokenizer)
    folder = recipe.output / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        captions = captions_of_mixture(mixture)
        learn_vocabulary(captions, recipe.stage1.vocabulary).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_corpus_pairs(config: MicoConfig, cross_corpus: float) -> None:
    """E_Sam must have a row for every pair of corpora.

    Raises:
        ConfigError: it has fewer.
    """
    context = config.context_config
    if cross_corpus > 0 and context.n_corpus_pairs <= len(CORPUS_PAIRS):
        raise ConfigError(
            f"stage1.cross_corpus needs {len(CORPUS_PAIRS) + 1} rows of E_Sam, but "
            f"context_config.n_corpus_pairs is {context.n_corpus_pairs}"
        )

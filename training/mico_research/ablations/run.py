"""One run of the ablations: a cell with a seed is trained and evaluated.

What the evaluation does: :mod:`mico_research.ablations.evaluation`.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from mico_chat.checkpoints.assemble import usual_preprocessing
from mico_chat.checkpoints.load import STEM_PREPROCESSING
from mico_chat.evaluation.report import machine
from mico_chat.media import MediaFile
from mico_chat.model.mini.stem import Stem
from mico_chat.model.pretraining import MicoForPretraining
from mico_research.ablations.evaluation import Pool, pools, retrieval
from mico_research.ablations.grid import ARCHITECTURES, Architecture, Cell
from mico_training.build_model import Pretraining, kept_vocabulary, pretraining_config, text_config
from mico_training.data.media import LoadedMedium, MediaLoader, media_loader
from mico_training.data.mixture import Mixture, open_mixture, open_source
from mico_training.data.sources.sample import TrainingSample
from mico_training.recipe import DataRecipe, ModelRecipe, Stage1Run, load_recipe
from mico_training.records import RESULT, run_once
from mico_training.stages import pretrain
from mico_training.trainer import last_checkpoint, training_arguments
from mico_world.mini.init import DETAIL, load_stem, set_word_vectors, word_vectors

DEFAULT = Cell("default")
PRETRAINED_STEM = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    A cell's own overrides come after ``overrides``. ``validation`` names the held-out shards, and
    ``pool`` is the number of media of each kind that are ranked, in each half.
    """

    recipe: Path
    overrides: tuple[str, ...]
    validation: str
    output: Path
    pool: int

    @property
    def tokenizer(self) -> Path:
        return self.output / "tokenizer"

    @property
    def words(self) -> Path:
        return self.output / "words.safetensors"

    def load(self, cell: Cell = DEFAULT, seed: int = 0) -> Stage1Run:
        own = (
            f"stage1.tokenizer={self.tokenizer}",
            f"train.seed={seed}",
            f"output={self.folder(cell, seed)}",
        )
        recipe = load_recipe(Stage1Run, self.recipe, (*self.overrides, *cell.overrides, *own))
        train = recipe.train.model_copy(update={"steps": recipe.train.steps * cell.longer})
        return recipe.model_copy(update={"train": train})

    def folder(self, cell: Cell, seed: int) -> Path:
        return self.output / "runs" / f"{cell.name}-{seed}"


def prepare(settings: Settings) -> None:
    """Make once what all runs share: the vocabulary and the features of all media."""
    recipe = settings.load()
    mixture = open_mixture(recipe.data, "caption", 0)
    tokenizer = kept_vocabulary(settings.tokenizer, mixture, recipe.stage1.vocabulary)
    if recipe.features is None:
        return
    parts = build(recipe.model, "shared", tokenizer)
    if _of_mini(parts.model) and not settings.words.is_file():
        width = parts.model.config.text_config.hidden_size
        save_file({"words": word_vectors(tokenizer, width)}, settings.words)
    ranked = [
        TrainingSample(medium.name, {"medium": medium})
        for pool in (pool for halves in held_out(settings) for pool in halves)
        for medium in pool.media
    ]
    for part in (mixture, Mixture([ranked], [1.0], 0)):
        media_loader(recipe, training_arguments(recipe), parts.model, parts.preprocessing, part)


def held_out(settings: Settings) -> list[tuple[Pool, Pool]]:
    return pools(open_source(DataRecipe(path=settings.validation), "caption"), settings.pool)


def _of_mini(model: MicoForPretraining) -> bool:
    return model.config.encoder_config.stem == PRETRAINED_STEM


def build(
    recipe: ModelRecipe,
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    words: Tensor | None = None,
) -> Pretraining:
    """A new model of random weights, with a stem that all runs share, as they share its features.

    The mini's stem is pretrained on ImageNet. ``words``: word vectors to start from.
    """
    config = pretraining_config(recipe, text_config(tokenizer))
    config.concept_config = None
    model = ARCHITECTURES[architecture](config)
    as_wide_as_bert(model.text.bert)
    if words is not None:
        set_word_vectors(model, words)
    preprocessing = usual_preprocessing(config)
    if _of_mini(model):  # its features are those of the mini's own recipes
        load_stem(model)
        cast(nn.Module, model.encoder.stem).to(torch.bfloat16).to(torch.float32)
        preprocessing = STEM_PREPROCESSING.model_copy(update={"detail": DETAIL})
    elif config.encoder_config.stem is not None:
        assert model.encoder.stem is not None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.encoder.stem.load_state_dict(
                Stem(config.encoder_config.stem, config.encoder_config.image_size).state_dict()
            )
    return Pretraining(model, tokenizer, preprocessing)


def as_wide_as_bert(bert: nn.Module) -> None:
    """Give a narrow BERT's linear layers the variance that BERT's own have at its width of 768."""
    for module in bert.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02 * (768 / module.in_features) ** 0.5)


@dataclass(frozen=True)
class CoarseLoader(MediaLoader):
    """Media on a coarser grid than the cached features': a third of the tokens."""

    grid: int = 4

    def load(self, medium: MediaFile, generator: np.random.Generator | None = None) -> LoadedMedium:
        fine = super().load(medium, generator)
        coarse = [
            (units.flatten(2) @ _shares(units.shape[-1], self.grid)).unflatten(2, (self.grid,) * 2)
            for _, units in fine.parts()
        ]
        return LoadedMedium(fine.kind, *coarse)


@cache
def _shares(fine: int, coarse: int) -> Tensor:
    """How much of each fine cell is in each coarse one. Their product is the mean."""
    cells = torch.eye(fine**2).unflatten(1, (fine, fine))
    return F.adaptive_avg_pool2d(cells, coarse).flatten(1)


def described(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    recipe = settings.load(cell, seed).model_dump(
        mode="json", exclude={"output", "features", "expect"}
    )
    recipe["stage1"].pop("tokenizer")
    return {
        "cell": cell.name,
        "architecture": cell.architecture,
        "seed": seed,
        "recipe": recipe,
        "validation": settings.validation,
        "pool": settings.pool,
    }


def run(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    work = partial(_train, settings, cell, seed)
    return run_once(settings.folder(cell, seed), described(settings, cell, seed), work)


def _train(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = settings.load(cell, seed)
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, "caption", seed)
    set_seed(seed)
    words = load_file(settings.words)["words"] if settings.words.is_file() else None
    parts = build(
        recipe.model, cell.architecture, AutoTokenizer.from_pretrained(settings.tokenizer), words
    )
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, None)
    loader = CoarseLoader(
        loader.preprocessing, loader.cache, loader.limits, parts.model.encoder.grid
    )
    resumed = last_checkpoint(arguments) is not None
    built = time.perf_counter()
    trainer = pretrain(recipe, arguments, parts, mixture, loader)
    trained = time.perf_counter()
    found = retrieval(parts, loader, recipe.stage1, held_out(settings))
    return {
        "samples": sum(len(source) for source in mixture.sources),
        "parameters": parameters(parts.model),
        "seconds": {
            "building": round(built - started, 1),
            # A resumed run would count only the time since it was resumed.
            "training": None if resumed else round(trained - built, 1),
            "evaluation": round(time.perf_counter() - trained, 1),
        },
        "device": str(parts.model.device),
        "machine": machine(),
        "losses": [
            {k: round(v, 4) for k, v in entry.items() if k == "step" or k.endswith("loss")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        **found,
    }


def parameters(model: nn.Module) -> dict[str, int]:
    """How many numbers train: what makes tokens of media, the text branch, all."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return {
        "encoder": sum(n for name, n in trained if name.startswith(("encoder.", "others."))),
        "text": sum(n for name, n in trained if name.startswith("text.")),
        "all": sum(n for _, n in trained),
    }


def all_results(settings: Settings, cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    paths = (settings.output / "runs").glob(f"*/{RESULT}")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results.sort(key=lambda result: int(result["seed"]))
    return {cell.name: [r for r in results if r["cell"] == cell.name] for cell in cells}


# --- several runs at a time ----------------------------------------------------------------------


def side_by_side(
    settings: Settings, runs: Sequence[tuple[Cell, int]], processes: int
) -> Iterator[tuple[Cell, int, BaseException | None]]:
    """Do runs, ``processes`` at a time; yields each as it ends, with its error if it failed.

    Each has its share of the cores as threads, or ``OMP_NUM_THREADS`` where that is set.
    """
    share = max(1, (os.cpu_count() or 1) // processes)
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(share)))
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_begin, initargs=(os.getpid(), threads)
    ) as pool:
        begun = {pool.submit(run, settings, cell, seed): (cell, seed) for cell, seed in runs}
        for done in as_completed(begun):
            yield *begun[done], done.exception()


def _begin(parent: int, threads: int) -> None:
    """Give a process of the pool its share of the cores, and let it end with its parent."""

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()

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
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from mico_chat.checkpoints.assemble import Encoder, read_encoder, usual_preprocessing
from mico_chat.errors import ConfigError
from mico_chat.evaluation.report import machine
from mico_chat.model.pretraining import MicoForPretraining
from mico_research.ablations.evaluation import RANKED, Pool, judged, pools
from mico_research.ablations.grid import ARCHITECTURES, Architecture, Cell
from mico_research.ablations.pretrained import CoarseStem, take_text, take_vit
from mico_training.build_model import Pretraining, kept_vocabulary, pretraining_config, text_config
from mico_training.data.media import media_loader
from mico_training.data.mixture import Mixture, open_mixture, open_source
from mico_training.data.sources.sample import TrainingSample
from mico_training.recipe import DataRecipe, ModelRecipe, Stage1Run, load_recipe
from mico_training.records import RESULT, run_once
from mico_training.stages import pretrain
from mico_training.trainer import last_checkpoint, training_arguments

DEFAULT = Cell("default")


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

    def load(self, cell: Cell = DEFAULT, seed: int = 0) -> Stage1Run:
        own = (
            f"stage1.tokenizer={self.tokenizer}",
            f"train.seed={seed + cell.other_seeds}",
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
    if recipe.model.encoder is None:
        kept_vocabulary(settings.tokenizer, mixture, recipe.stage1.vocabulary)
    else:
        _, words = _text_of(read_encoder(recipe.model.encoder), recipe.model)
        words.save_pretrained(settings.tokenizer)
    if recipe.features is None:
        return
    parts = build(recipe.model, "shared", AutoTokenizer.from_pretrained(settings.tokenizer))
    ranked = [
        TrainingSample(medium.name, {"medium": medium})
        for pool in (pool for halves in held_out(settings) for pool in halves)
        for medium in pool.media
    ]
    curve = () if recipe.eval is None else (open_mixture(recipe.eval.data, "caption", 0),)
    for part in (mixture, Mixture([ranked], [1.0], 0), *curve):
        media_loader(recipe, training_arguments(recipe), parts.model, parts.preprocessing, part)


def held_out(settings: Settings) -> list[tuple[Pool, Pool]]:
    return pools(open_source(DataRecipe(path=settings.validation), "caption"), settings.pool)


def build(
    recipe: ModelRecipe, architecture: Architecture, tokenizer: PreTrainedTokenizerBase
) -> Pretraining:
    """A cell's model, with a stem that all runs share, as they share its features.

    ``recipe.encoder`` names the packaged model whose ViT and text branch it starts from. Without
    it all weights are random, and the stem's are of a fixed seed.
    """
    config = pretraining_config(recipe, text_config(tokenizer))
    config.concept_config = None
    model = ARCHITECTURES[architecture](config)
    as_wide_as_bert(model.text.bert)
    own = config.encoder_config
    assert own.stem is not None
    if recipe.encoder is None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.encoder.stem = CoarseStem(own.stem, own.image_size, model.encoder.grid)
        return Pretraining(model, tokenizer, usual_preprocessing(config))
    start = read_encoder(recipe.encoder)
    side = start.preprocessing.image_size
    model.encoder.stem = CoarseStem(own.stem, side, model.encoder.grid)
    given = cast(nn.Module, cast(Any, start.source).encoder.stem).state_dict()
    model.encoder.stem.load_state_dict(given)
    take_text(model, _text_of(start, recipe)[0])
    if own.depth:
        for vit in getattr(model, "vits", [model.encoder.vit]):
            take_vit(vit, cast(Any, start.source).encoder.vit)
    preprocessing = start.preprocessing.model_copy(update={"detail": 1, "max_slices": 1})
    return Pretraining(model, tokenizer, preprocessing)


def _text_of(
    start: Encoder, recipe: ModelRecipe
) -> tuple[MicoForPretraining, PreTrainedTokenizerBase]:
    if start.text is None:
        raise ConfigError(f"model.encoder {recipe.encoder}: it has no text branch to start from")
    return start.text


def as_wide_as_bert(bert: nn.Module) -> None:
    """Give a narrow BERT's linear layers the variance that BERT's own have at its width of 768."""
    for module in bert.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02 * (768 / module.in_features) ** 0.5)


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
        "ranked": RANKED,
    }


def run(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    work = partial(_train, settings, cell, seed)
    return run_once(settings.folder(cell, seed), described(settings, cell, seed), work)


def _train(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    recipe = settings.load(cell, seed)
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, "caption", recipe.train.seed)
    set_seed(recipe.train.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    parts = build(recipe.model, cell.architecture, tokenizer)
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, None)
    resumed = last_checkpoint(arguments) is not None
    built = time.perf_counter()
    trainer = pretrain(recipe, arguments, parts, mixture, loader)
    trained = time.perf_counter()
    found = judged(parts, loader, recipe.stage1, held_out(settings))
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
        "curve": [
            {"step": entry["step"], "R@1": entry["eval_R@1"]}
            for entry in trainer.state.log_history
            if "eval_R@1" in entry
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

"""One run of the ablations: a cell with a seed is trained and evaluated.

The evaluation is text-to-medium retrieval on held-out samples, with a pool of candidates for each
kind. A query is a caption; every medium that has this caption is a right answer. The contrastive
score ranks all candidates; if the matching head was trained, it orders the best ``RERANKED`` of
them, as in the paper's appendix B.
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
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from mico_chat.checkpoints.assemble import usual_preprocessing
from mico_chat.evaluation.report import machine
from mico_chat.evaluation.retrieval import recall_at_k, rerank
from mico_chat.media import KINDS, Kind, MediaFile
from mico_chat.model.context import Units
from mico_chat.model.contrastive import ContrastiveSpace, MediaContext
from mico_chat.model.encoder import Stem
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import Pretraining, kept_vocabulary, pretraining_config, text_config
from mico_training.data.batches import thinned
from mico_training.data.media import LoadedMedium, MediaLoader, media_loader
from mico_training.data.mixture import open_mixture, open_source
from mico_training.data.sample import Source
from mico_training.mini_init import load_stem, set_word_vectors, word_vectors
from mico_training.recipe import DataRecipe, ModelRecipe, Stage1Recipe, Stage1Run, load_recipe
from mico_training.records import RESULT, run_once
from mico_training.research.ablations.grid import ARCHITECTURES, Architecture, Cell
from mico_training.stages import pretrain
from mico_training.trainer import last_checkpoint, training_arguments

DEFAULT = Cell("default")
PRETRAINED_STEM = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    A cell's own overrides come after ``overrides``. ``validation`` names the held-out shards, and
    ``pool`` is the number of media of each kind that are ranked.
    """

    recipe: Path
    overrides: tuple[str, ...]
    validation: str
    output: Path
    pool: int

    @property
    def tokenizer(self) -> Path:
        """The folder of the text branch's tokenizer, which all runs share."""
        return self.output / "tokenizer"

    @property
    def words(self) -> Path:
        """The word vectors from which all runs of a mini start."""
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
    held_out = open_mixture([DataRecipe(path=settings.validation)], "caption", 0)
    for part in (mixture, held_out):
        media_loader(recipe, training_arguments(recipe), parts.model, parts.preprocessing, part)


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
    if words is not None:
        set_word_vectors(model, words)
    if _of_mini(model):
        load_stem(model)
    elif config.encoder_config.stem is not None:
        assert model.encoder.stem is not None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.encoder.stem.load_state_dict(
                Stem(config.encoder_config.stem, config.encoder_config.image_size).state_dict()
            )
    return Pretraining(model, tokenizer, usual_preprocessing(config))


def described(settings: Settings, cell: Cell, seed: int) -> dict[str, Any]:
    """What decides a run's result."""
    recipe = settings.load(cell, seed).model_dump(mode="json", exclude={"output", "features"})
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
    """The result of a cell with a seed, which is trained and evaluated unless that is done."""
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
    resumed = last_checkpoint(arguments) is not None
    built = time.perf_counter()
    trainer = pretrain(recipe, arguments, parts, mixture, loader)
    trained = time.perf_counter()
    held_out = open_source(DataRecipe(path=settings.validation), "caption")
    retrieval = {
        pool.kind: {"media": len(pool.media), "queries": len(pool.queries)}
        | recalls(parts, loader, recipe.stage1, pool)
        for pool in pools(held_out, settings.pool)
    }
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
        "retrieval": retrieval,
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
    """The results that are there, by cell and then in the order of seeds."""
    paths = (settings.output / "runs").glob(f"*/{RESULT}")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results.sort(key=lambda result: int(result["seed"]))
    return {cell.name: [r for r in results if r["cell"] == cell.name] for cell in cells}


# --- several runs at a time ----------------------------------------------------------------------


def side_by_side(
    settings: Settings, runs: Sequence[tuple[Cell, int]], processes: int
) -> Iterator[tuple[Cell, int, BaseException | None]]:
    """Do runs, ``processes`` at a time; yields each as it ends, with its error if it failed."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
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


# --- the evaluation -------------------------------------------------------------------------------

RERANKED = 10
"""Of 250 candidates; the paper re-ranks 50 of 1,000 and more."""


@dataclass(frozen=True)
class Pool:
    """Media of one kind, queries, and for each query the numbers of the right media."""

    kind: Kind
    media: tuple[MediaFile, ...]
    queries: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def pools(source: Source, most: int) -> list[Pool]:
    """A pool of at most ``most`` media for each kind in the source, chosen by a fixed seed.

    The first caption of each medium is a query; media with the same caption share it.
    """
    media: dict[Kind, list[tuple[MediaFile, tuple[str, ...]]]] = {}
    for index in range(len(source)):
        sample = source[index]
        for key, medium in sample.media.items():
            if sample.captions.get(key):
                media.setdefault(medium.kind, []).append((medium, sample.captions[key]))
    found = []
    for kind in (kind for kind in KINDS if kind in media):
        order = np.random.default_rng(0).permutation(len(media[kind]))[:most]
        kept = [media[kind][index] for index in sorted(order)]
        queries = tuple(dict.fromkeys(captions[0] for _, captions in kept))
        relevant = tuple(
            frozenset(place for place, (_, captions) in enumerate(kept) if query in captions)
            for query in queries
        )
        found.append(Pool(kind, tuple(medium for medium, _ in kept), queries, relevant))
    return found


@torch.inference_mode()
def recalls(
    parts: Pretraining, loader: MediaLoader, recipe: Stage1Recipe, pool: Pool
) -> dict[str, dict[str, float]]:
    """R@1, 5, 10 in per cent by the contrastive score, and by the matching head if trained.

    ``recipe`` decides, as in training, how much of a medium and of a caption is used.
    """
    parts.model.train(False)
    space = ContrastiveSpace(parts.model, parts.tokenizer)
    media = [
        _context(parts.model, space, loader, thinned(loader.load(medium), recipe))
        for medium in pool.media
    ]
    rows = space.truncated(pool.queries, recipe.caption_length)
    texts = torch.cat([space.of_texts(rows[i : i + 64]) for i in range(0, len(rows), 64)])
    scores = texts @ torch.stack([medium.vector for medium in media]).T  # (Q, M)
    rankings = {"contrastive": scores}
    if recipe.weights.matching > 0:
        rankings["matching"] = reranked(scores, rows, media, space)
    return {
        name: {f"R@{k}": 100 * share for k, share in recall_at_k(ranked, pool.relevant).items()}
        for name, ranked in rankings.items()
    }


def _context(
    model: MicoForPretraining, space: ContrastiveSpace, loader: MediaLoader, medium: LoadedMedium
) -> MediaContext:
    """A medium, and a clip's sound track beside it."""
    batch = {name: value.to(model.device) for name, value in loader.batch([[medium]]).items()}
    kind, counts = batch["media_kind"], batch["media_units"]
    features = batch.get("stem_features")
    if features is None:
        features = model.encoder.features(batch["pixel_values"])
    units = Units.of(kind, counts)
    tokens = model.in_context(model.unit_tokens(features, units), features, kind, counts)
    row = torch.zeros(len(tokens), dtype=torch.long)
    return space.of_tokens(tokens, units, row, 1)[0]


def reranked(
    scores: Tensor,
    rows: Sequence[list[int]],
    media: Sequence[MediaContext],
    space: ContrastiveSpace,
) -> Tensor:
    """Scores (Q, M) with each query's best candidates above all others, by the matching head."""
    scores = scores.double()  # float32 cannot tell two very sure matches apart
    top = scores.topk(min(RERANKED, len(media)), 1).indices
    matches: list[dict[int, float]] = [{} for _ in rows]
    for number, medium in enumerate(media):
        queries = (top == number).any(1).nonzero().flatten().tolist()
        if queries:
            logits = space.match_logits([rows[query] for query in queries], medium.context)
            for query, match in zip(queries, logits.double().sigmoid().tolist(), strict=True):
                matches[query][number] = match
    rerank(scores, top, matches)
    return scores

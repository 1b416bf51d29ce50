"""How a cell is judged: text-to-medium retrieval on held-out samples, for each kind of media.

A query is a caption; every medium that has this caption is a right answer. The contrastive score
ranks all candidates; if the matching head was trained, it orders the best of them, as in the
paper's appendix B.

The held-out media of a kind are two halves. The first decides how many of the best candidates the
matching head orders, and the second, of other media, gives the figures that are reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mico_chat.evaluation.retrieval import recall_at_k, rerank
from mico_chat.media import KINDS, Kind, MediaFile
from mico_chat.model.context import Units
from mico_chat.model.contrastive import ContrastiveSpace, MediaContext
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import Pretraining
from mico_training.data.batches import thinned
from mico_training.data.media import LoadedMedium, MediaLoader
from mico_training.data.sources.sample import Source
from mico_training.recipe import Stage1Recipe


class Reranking(NamedTuple):
    """How many of the best candidates are ranked again, and the matching logit's weight in it.

    The contrastive logit has the rest of the weight.
    """

    candidates: int
    weight: float


CANDIDATES = (2, 3, 5, 10)
"""So many of at most 250 media are ranked again; the paper takes 50 of 1,000 and more."""

RERANKINGS = tuple(Reranking(*both) for both in product(CANDIDATES, (1.0, 0.75, 0.5, 0.25)))

REPORTED: tuple[Kind, ...] = ("video", "audio", "image")
"""The paper has these kinds: their mean R@1 decides the re-ranking."""


@dataclass(frozen=True)
class Pool:
    """Media of one kind, queries, and for each query the numbers of the right media."""

    kind: Kind
    media: tuple[MediaFile, ...]
    queries: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def pools(source: Source, most: int) -> list[tuple[Pool, Pool]]:
    """For each kind in the source a pool to tune on and one to report, by a fixed seed.

    They share no medium, are equally large but for one, and have at most ``most`` media each. The
    first caption of each medium is a query; media with the same caption share it.
    """
    media: dict[Kind, list[tuple[MediaFile, tuple[str, ...]]]] = {}
    for index in range(len(source)):
        sample = source[index]
        for key, medium in sample.media.items():
            if sample.captions.get(key):
                media.setdefault(medium.kind, []).append((medium, sample.captions[key]))
    found = []
    for kind in (kind for kind in KINDS if len(media.get(kind, ())) > 1):
        order = np.random.default_rng(0).permutation(len(media[kind]))[: 2 * most]
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        tuning, reported = (_pool(kind, [media[kind][n] for n in sorted(half)]) for half in halves)
        found.append((tuning, reported))
    return found


def _pool(kind: Kind, media: Sequence[tuple[MediaFile, tuple[str, ...]]]) -> Pool:
    queries = tuple(dict.fromkeys(captions[0] for _, captions in media))
    relevant = tuple(
        frozenset(place for place, (_, captions) in enumerate(media) if query in captions)
        for query in queries
    )
    return Pool(kind, tuple(medium for medium, _ in media), queries, relevant)


@dataclass(frozen=True)
class Ranked:
    """A pool's cosines (Q, M), and the matching logits of each query's best media.

    ``matches`` is None where the matching head was not trained. Cosines over the ``temperature``
    are contrastive logits.
    """

    pool: Pool
    scores: Tensor
    matches: Sequence[dict[int, float]] | None
    temperature: float = 1.0

    def recalls(self, by: Reranking | None = None) -> dict[str, float]:
        scores = self.scores.clone()
        if self.matches is not None and by is not None:
            top = scores.topk(min(by.candidates, scores.shape[1]), 1).indices
            rest = (1 - by.weight) / self.temperature
            mixed = [
                {n: by.weight * match + rest * float(row[n]) for n, match in of.items()}
                for row, of in zip(self.scores, self.matches, strict=True)
            ]
            rerank(scores, top, mixed)
        found = recall_at_k(scores, self.pool.relevant)
        return {f"R@{k}": 100 * share for k, share in found.items()}


def retrieval(
    parts: Pretraining,
    loader: MediaLoader,
    recipe: Stage1Recipe,
    halves: Sequence[tuple[Pool, Pool]],
) -> dict[str, Any]:
    """What a run's result says of retrieval.

    ``retrieval``: for each kind the figures of the reported half, by contrast and re-ranked.
    ``reranking``: how, and ``tuning``: the tuning half's R@1 by contrast and by each re-ranking.
    ``recipe`` decides, as in training, how much of a medium and of a caption is used.
    """
    parts.model.train(False)
    tuning, reported = (
        [rank(parts, loader, recipe, pair[half]) for pair in halves] for half in (0, 1)
    )
    kinds: dict[str, dict[str, Any]] = {
        of.pool.kind: {
            "media": len(of.pool.media),
            "queries": len(of.pool.queries),
            "contrastive": of.recalls(),
        }
        for of in reported
    }
    if recipe.weights.matching == 0:
        return {"retrieval": kinds}
    tried = {by: mean_recall(tuning, by) for by in RERANKINGS}
    best = max(tried, key=lambda by: tried[by])
    for of in reported:
        kinds[of.pool.kind]["matching"] = of.recalls(best)
    return {
        "retrieval": kinds,
        "reranking": best._asdict(),
        "tuning": {
            "contrastive": round(mean_recall(tuning), 2),
            "matching": [by._asdict() | {"R@1": round(value, 2)} for by, value in tried.items()],
        },
    }


def mean_recall(ranked: Sequence[Ranked], by: Reranking | None = None) -> float:
    """R@1 in per cent, the mean of the kinds that the paper has, or of all if none is there."""
    chosen = [of for of in ranked if of.pool.kind in REPORTED] or ranked
    return fmean(of.recalls(by)["R@1"] for of in chosen)


@torch.inference_mode()
def rank(parts: Pretraining, loader: MediaLoader, recipe: Stage1Recipe, pool: Pool) -> Ranked:
    """A pool's logits, those of matching for each query's best ``max(CANDIDATES)`` media."""
    space = ContrastiveSpace(parts.model, parts.tokenizer)
    media = [
        _context(parts.model, space, loader, thinned(loader.load(medium), recipe))
        for medium in pool.media
    ]
    rows = space.truncated(pool.queries, recipe.caption_length)
    texts = torch.cat([space.of_texts(rows[i : i + 64]) for i in range(0, len(rows), 64)])
    temperature = parts.model.temperature.clamp(0.01, 0.5).item()
    scores = (texts @ torch.stack([medium.vector for medium in media]).T).double()
    if recipe.weights.matching == 0:
        return Ranked(pool, scores, None)
    top = scores.topk(min(max(CANDIDATES), len(media)), 1).indices
    matches: list[dict[int, float]] = [{} for _ in rows]
    for number, medium in enumerate(media):
        queries = (top == number).any(1).nonzero().flatten().tolist()
        if queries:
            logits = space.match_logits([rows[query] for query in queries], medium.context)
            for query, match in zip(queries, logits.tolist(), strict=True):
                matches[query][number] = match
    return Ranked(pool, scores, matches, temperature)


def _context(
    model: MicoForPretraining, space: ContrastiveSpace, loader: MediaLoader, medium: LoadedMedium
) -> MediaContext:
    batch = {name: value.to(model.device) for name, value in loader.batch([[medium]]).items()}
    kind, counts = batch["media_kind"], batch["media_units"]
    inputs = (batch.get("pixel_values"), batch.get("stem_features"))
    tokens, _ = model.seen(kind, counts, *inputs)
    row = torch.zeros(len(tokens), dtype=torch.long)
    return space.of_tokens(tokens, Units.of(kind, counts), row, 1)[0]

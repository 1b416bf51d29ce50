"""Text-to-medium retrieval on held-out samples, a pool of candidates for each kind.

A query is a caption; every medium that has this caption is a right answer. The contrastive score
ranks all candidates; if the matching head was trained, it orders the best ``RERANKED`` of them, as
in the paper's appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from mico_training.data.sample import Source
from mico_training.recipe import Stage1Recipe

RERANKED = 10
"""Of 250 candidates; the paper re-ranks 50 of 1,000 and more."""


@dataclass(frozen=True)
class Pool:
    """Media of one kind, queries, and for each query the numbers of the right media."""

    kind: Kind
    media: tuple[MediaFile, ...]
    queries: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def pools(source: Source, most: int, seed: int = 0) -> list[Pool]:
    """A pool of at most ``most`` media for each kind in the source; the seed chooses the media.

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
        order = np.random.default_rng(seed).permutation(len(media[kind]))[:most]
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
    tokens = model.context(model.unit_tokens(features, units), kind, counts)
    row = torch.zeros(len(tokens), dtype=torch.long)
    return space.of_tokens(tokens, units, row, 1)[0]


def reranked(
    scores: Tensor,
    rows: Sequence[list[int]],
    media: Sequence[MediaContext],
    space: ContrastiveSpace,
) -> Tensor:
    """Scores (Q, M) with each query's best candidates above all others, by the matching head."""
    scores = scores.double()  # between two sure matches there are few numbers
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

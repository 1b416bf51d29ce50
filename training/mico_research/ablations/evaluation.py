"""How a cell is judged: retrieval and captions of held-out samples, for each kind of media.

Retrieval is text to medium. A query is a caption; every medium that has this caption is a right
answer. The contrastive score ranks all candidates; if the matching head was trained, it orders the
best of them, as in the paper's appendix B. Captions, if they were trained, are greedy, and their
figure is CIDEr-D.

The held-out media of a kind are of two parts. The smaller one decides how many of the best
candidates the matching head orders; the other, of other media, gives the figures. All cells have
the same queries, so that two cells can be compared query by query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mico_chat.evaluation.pretrained import padded
from mico_chat.evaluation.retrieval import rerank
from mico_chat.media import KINDS, Kind, MediaFile
from mico_chat.model.context import Units
from mico_chat.model.contrastive import ContrastiveSpace, MediaContext
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import captions
from mico_training.build_model import Pretraining
from mico_training.data.batches import thinned
from mico_training.data.media import LoadedMedium, MediaLoader
from mico_training.data.sources.sample import Source
from mico_training.recipe import Stage1Recipe
from mico_training.scst import Cider


class Reranking(NamedTuple):
    """How many of the best candidates are ranked again, and the matching logit's weight in it.

    The contrastive logit has the rest of the weight.
    """

    candidates: int
    weight: float


CANDIDATES = (2, 5)
"""So many media are ranked again; the paper takes 50 of 1,000 and more."""

RERANKINGS = tuple(Reranking(*both) for both in product(CANDIDATES, (1.0, 0.5, 0.25, 0.1)))

RANKED = 250
"""A query is ranked among about so many media of its pool, as papers average over parts of COCO's
test set: among 2,000, small models find too little for a difference to be seen."""

TUNED_ON = 500
"""At most so many media of a kind decide the re-ranking."""

AT_ONCE = 64
"""So many media are encoded at once, or captioned."""

CAPTIONED = 300
"""So many media of a kind get a caption."""

REPORTED: tuple[Kind, ...] = ("video", "audio", "image")
"""The paper has these kinds: their mean R@1 decides the re-ranking."""


@dataclass(frozen=True)
class Pool:
    """Media of one kind with their captions, queries, and for each query the right media."""

    kind: Kind
    media: tuple[MediaFile, ...]
    captions: tuple[tuple[str, ...], ...]
    queries: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]


def pools(source: Source, most: int) -> list[tuple[Pool, Pool]]:
    """For each kind in the source a pool to tune on and one to report, by a fixed seed.

    They share no medium. At most ``most`` media are reported, and a fifth of a kind's media, at
    most :data:`TUNED_ON`, tune. The first caption of each medium is a query; media with the same
    caption share it.
    """
    media: dict[Kind, list[tuple[MediaFile, tuple[str, ...]]]] = {}
    for index in range(len(source)):
        sample = source[index]
        for key, medium in sample.media.items():
            if sample.captions.get(key):
                media.setdefault(medium.kind, []).append((medium, sample.captions[key]))
    found = []
    for kind in (kind for kind in KINDS if len(media.get(kind, ())) > 1):
        order = np.random.default_rng(0).permutation(len(media[kind]))
        tuned_on = min(max(1, len(order) // 5), TUNED_ON)
        parts = order[:tuned_on], order[tuned_on : tuned_on + most]
        tuning, reported = (_pool(kind, [media[kind][n] for n in sorted(part)]) for part in parts)
        found.append((tuning, reported))
    return found


def _pool(kind: Kind, media: Sequence[tuple[MediaFile, tuple[str, ...]]]) -> Pool:
    files, captions = zip(*media, strict=True)
    queries = tuple(dict.fromkeys(own[0] for own in captions))
    places: dict[str, set[int]] = {}
    for place, own in enumerate(captions):
        for caption in own:
            places.setdefault(caption, set()).add(place)
    return Pool(kind, files, captions, queries, tuple(frozenset(places[q]) for q in queries))


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

    def hits(self, by: Reranking | None = None) -> Tensor:
        """Whether each query (Q,) finds a right medium first."""
        scores = self.scores
        if self.matches is not None and by is not None:
            scores = scores.clone()
            top = scores.topk(min(by.candidates, scores.shape[1]), 1).indices
            rest = (1 - by.weight) / self.temperature
            mixed = [
                {n: by.weight * match + rest * float(row[n]) for n, match in of.items()}
                for row, of in zip(self.scores, self.matches, strict=True)
            ]
            rerank(scores, top, mixed)
        first = scores.argmax(1).tolist()
        right = [n in of for n, of in zip(first, self.pool.relevant, strict=True)]
        return torch.tensor(right)


def bits(hits: Tensor) -> str:
    """Hits (Q,) as hexadecimal digits, four a digit; :func:`hits_of` reads them."""
    return np.packbits(hits.numpy()).tobytes().hex()


def hits_of(digits: str, n: int) -> NDArray[np.float64]:
    """The hits (``n``,) of :func:`bits`, 0 or 1."""
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    return np.unpackbits(packed)[:n].astype(np.float64)


def judged(
    parts: Pretraining,
    loader: MediaLoader,
    recipe: Stage1Recipe,
    halves: Sequence[tuple[Pool, Pool]],
) -> dict[str, Any]:
    """What a run's result says of held-out media.

    ``retrieval``: for each kind the hits of the reported part, by contrast and re-ranked.
    ``reranking``: how, and ``tuning``: the other part's R@1 by contrast and by each re-ranking.
    ``captions``: for each kind the CIDEr-D of each caption, in per cent. ``recipe`` decides, as in
    training, how much of a medium and of a caption is used.
    """
    parts.model.train(False)
    kinds: dict[str, dict[str, Any]] = {}
    scored: dict[str, list[int]] = {}
    ranked: list[Ranked] = []
    for _, pool in halves:
        found, seen = rank(parts, loader, recipe, pool)
        ranked.append(found)
        kinds[pool.kind] = {
            "media": len(pool.media),
            "queries": len(pool.queries),
            "contrastive": bits(found.hits()),
        }
        if recipe.weights.caption > 0:
            scored[pool.kind] = captioned(parts, pool, seen[:CAPTIONED], recipe.caption_length)
    result: dict[str, Any] = {"retrieval": kinds, **({"captions": scored} if scored else {})}
    if recipe.weights.matching == 0:
        return result
    tuning = [rank(parts, loader, recipe, pair[0])[0] for pair in halves]
    tried = {by: mean_recall(tuning, by) for by in RERANKINGS}
    best = max(tried, key=lambda by: tried[by])
    for of in ranked:
        kinds[of.pool.kind]["matching"] = bits(of.hits(best))
    return result | {
        "reranking": best._asdict(),
        "tuning": {
            "contrastive": round(mean_recall(tuning), 2),
            "matching": [by._asdict() | {"R@1": round(value, 2)} for by, value in tried.items()],
        },
    }


def captioned(
    parts: Pretraining, pool: Pool, seen: Sequence[MediaContext], length: int
) -> list[int]:
    """The CIDEr-D, in per cent, of greedy captions of a pool's first media.

    Its n-grams weigh as in the captions of the whole pool.
    """
    said: list[str] = []
    for at in range(0, len(seen), AT_ONCE):
        context, mask = padded(seen[at : at + AT_ONCE])
        options = {"num_beams": 1, "max_new_tokens": length}
        said += captions(parts.model, context, mask, parts.tokenizer, **options)
    scores = Cider(pool.captions)(said, pool.captions[: len(said)])
    return [round(100 * score) for score in scores]


def mean_recall(ranked: Sequence[Ranked], by: Reranking | None = None) -> float:
    """R@1 in per cent, the mean of the kinds that the paper has, or of all if none is there."""
    chosen = [of for of in ranked if of.pool.kind in REPORTED] or ranked
    return fmean(100 * of.hits(by).float().mean().item() for of in chosen)


@torch.inference_mode()
def rank(
    parts: Pretraining, loader: MediaLoader, recipe: Stage1Recipe, pool: Pool
) -> tuple[Ranked, list[MediaContext]]:
    """A pool's logits, those of matching for each query's best media; and the media as seen."""
    space = ContrastiveSpace(parts.model, parts.tokenizer)
    media: list[MediaContext] = []
    for at in range(0, len(pool.media), AT_ONCE):
        shown = [thinned(loader.load(one), recipe) for one in pool.media[at : at + AT_ONCE]]
        media += _contexts(parts.model, space, loader, shown)
    rows = space.truncated(pool.queries, recipe.caption_length)
    texts = torch.cat([space.of_texts(rows[i : i + 64]) for i in range(0, len(rows), 64)])
    temperature = parts.model.temperature.clamp(0.01, 0.5).item()
    scores = (texts @ torch.stack([medium.vector for medium in media]).T).double()
    scores = scores.masked_fill(~among(pool).to(scores.device), -torch.inf)
    if recipe.weights.matching == 0:
        return Ranked(pool, scores, None), media
    top = scores.topk(min(max(CANDIDATES), len(media)), 1).indices
    matches: list[dict[int, float]] = [{} for _ in rows]
    for number, medium in enumerate(media):
        queries = (top == number).any(1).nonzero().flatten().tolist()
        if queries:
            logits = space.match_logits([rows[query] for query in queries], medium.context)
            for query, match in zip(queries, logits.tolist(), strict=True):
                matches[query][number] = match
    return Ranked(pool, scores, matches, temperature), media


def among(pool: Pool) -> Tensor:
    """Which media (Q, M) each query is ranked among: every n-th one, with its first right one."""
    parts = max(1, round(len(pool.media) / RANKED))
    part = torch.arange(len(pool.media)) % parts
    return part == torch.tensor([min(of) % parts for of in pool.relevant]).unsqueeze(1)


def _contexts(
    model: MicoForPretraining,
    space: ContrastiveSpace,
    loader: MediaLoader,
    media: Sequence[LoadedMedium],
) -> list[MediaContext]:
    made = loader.batch([[medium] for medium in media])
    batch = {name: value.to(model.device) for name, value in made.items()}
    kind, counts = batch["media_kind"], batch["media_units"]
    inputs = (batch.get("pixel_values"), batch.get("stem_features"))
    tokens, _ = model.seen(kind, counts, *inputs)
    row = torch.repeat_interleave(batch["media_row"], counts)
    return space.of_tokens(tokens, Units.of(kind, counts), row, len(media))

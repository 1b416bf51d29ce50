"""Recall at k of a retrieval: the share of queries with a relevant candidate among the k best.

Ties count against the model: a relevant candidate ranks behind all others of the same score.

Legend: Q queries, q of them in a part, D candidates, P width of the contrastive space.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mico_chat.errors import DataError

RERANKED = 50
"""The number of candidates of each query that the matching head ranks again (appendix B)."""
QUERIES_AT_ONCE = 1024
ABOVE = 3.0
"""A score above any cosine."""


def recall_at_k(
    scores: Tensor, relevant: Sequence[Collection[int]], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Recall at each k of scores (Q, D); ``relevant`` has the relevant columns of each query."""
    found = ranks(scores, relevant)
    return {k: sum(rank < k for rank in found) / len(found) for k in ks}


def ranks(scores: Tensor, relevant: Sequence[Collection[int]]) -> list[int]:
    """The number of irrelevant candidates before the best relevant candidate of each query."""
    if bool(torch.isnan(scores).any()):
        row = int(torch.isnan(scores).any(dim=1).nonzero()[0])
        raise DataError("recall", None, f"a score of query {row} is not a number")
    found = []
    for query, (row, right) in enumerate(zip(scores, relevant, strict=True)):
        columns = sorted(right)
        if not columns or columns[0] < 0 or columns[-1] >= len(row):
            raise DataError(
                "recall",
                None,
                f"query {query}: relevant candidates {columns[:3]} of {len(row)} candidates",
            )
        of_right = row[columns]
        best = of_right.max()
        found.append(int((row >= best).sum()) - int((of_right >= best).sum()))
    return found


def contrasted(queries: Tensor, candidates: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Cosines of queries (Q, P) and candidates (D, P), in parts that fit into memory.

    Yields the number of a part's first query, the cosines (q, D), and the columns of each query's
    best candidates (q, at most 50).
    """
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE].double()
        cosines = part @ candidates.double().T
        yield start, cosines, cosines.topk(min(RERANKED, len(candidates)), 1).indices


def rerank(rows: Tensor, top: Tensor, logits: Sequence[Mapping[int, float]]) -> None:
    """Order the top candidates (q, k) of scores (q, D) by their logits, above all others.

    The scores are changed in place.
    """
    for row, best in enumerate(top.tolist()):
        known = [candidate for candidate in best if candidate in logits[row]]
        if known:
            values = torch.tensor([logits[row][c] for c in known], dtype=rows.dtype)
            rows[row, known] = ABOVE + values - values.min()

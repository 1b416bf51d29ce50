"""Recall at k of a retrieval, as COCO, Flickr30K, MSRVTT and their kin are reported.

A query is a hit at k where *any* of its relevant candidates is among the k best (five captions
belong to a COCO picture; finding one suffices). R@k is the fraction of queries that hit.

Ties count against the model: a relevant candidate stands behind all others of the same score. The
field sorts and takes whatever order comes, under which a model that gives every candidate the same
score can look perfect where the right ones lie first; without ties the two are equal.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mico_chat.errors import DataError

if TYPE_CHECKING:
    import torch

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recalls:
    """Recall at each k, in both directions."""

    text_to_medium: dict[int, float]
    medium_to_text: dict[int, float]


def recall_at_k(
    scores: torch.Tensor, relevant: Sequence[Collection[int]], ks: Sequence[int] = KS
) -> dict[int, float]:
    """Recall at each k.

    Args:
        scores: (Q, D) scores of D candidates for each of Q queries, higher is better.
        relevant: for each query the columns of its relevant candidates, one or more.
        ks: how many of the best count; a k beyond D counts all.

    Raises:
        DataError: no queries, another number of them in ``relevant``, a query without a relevant
            candidate or with one that is not there, or a score that is not a number.
    """
    found = ranks(scores, relevant)
    return {k: sum(rank < k for rank in found) / len(found) for k in ks}


def both_directions(
    scores: torch.Tensor, medium_of_text: Sequence[int], ks: Sequence[int] = KS
) -> Recalls:
    """Text-to-medium and medium-to-text recall of one score matrix.

    Args:
        scores: (T, M) scores of M media for each of T texts.
        medium_of_text: for each text the column of the medium it belongs to; several texts may
            belong to one medium, and each medium needs one.

    Raises:
        DataError: as ``recall_at_k``.
    """
    texts: list[list[int]] = [[] for _ in range(scores.shape[1] if scores.dim() == 2 else 0)]
    for text, medium in enumerate(medium_of_text):
        if 0 <= medium < len(texts):
            texts[medium].append(text)
    return Recalls(
        text_to_medium=recall_at_k(scores, [{medium} for medium in medium_of_text], ks),
        medium_to_text=recall_at_k(scores.T, texts, ks),
    )


def ranks(scores: torch.Tensor, relevant: Sequence[Collection[int]]) -> list[int]:
    """For each query, how many irrelevant candidates score no less than its best relevant one.

    Raises:
        DataError: as ``recall_at_k``.
    """
    import torch

    if scores.dim() != 2 or not scores.numel():
        raise DataError(
            "recall", None, f"scores must be (queries, candidates), not {shape(scores)}"
        )
    if len(relevant) != len(scores):
        raise DataError(
            "recall",
            None,
            f"the scores are for {len(scores)} queries, but the answers for {len(relevant)}",
        )
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


def shape(scores: torch.Tensor) -> str:
    """``(3, 4)``."""
    return str(tuple(scores.shape))

"""Recall at k equals sorting if all scores differ; several right candidates; ties; faults."""

import pytest
import torch

from mico_chat.errors import DataError
from mico_chat.evaluation.retrieval import recall_at_k


def test_equals_sorting_on_a_thousand_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    media, captions = 200, 5
    scores = torch.randn(media * captions, media, generator=generator, dtype=torch.float64)
    owner = [text // captions for text in range(media * captions)]
    scores += torch.nn.functional.one_hot(torch.tensor(owner), media) * 2
    texts = [range(medium * captions, (medium + 1) * captions) for medium in range(media)]
    for rows, relevant in ((scores, [{medium} for medium in owner]), (scores.T, texts)):
        order = rows.argsort(dim=1, descending=True).tolist()
        best = [min(map(row.index, right)) for row, right in zip(order, relevant, strict=True)]
        found = recall_at_k(rows, relevant)
        assert found == {k: sum(rank < k for rank in best) / len(rows) for k in (1, 5, 10)}
        assert 0.1 < found[1] < found[10] <= 1


def test_any_relevant_candidate_is_a_hit() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert recall_at_k(scores, [{2, 3}, {3}], (1, 2, 3, 100)) == {1: 0.5, 2: 0.5, 3: 1, 100: 1}


def test_ties_count_against_the_model_but_not_among_the_relevant() -> None:
    right = [{0}, {0, 1}, {0, 1, 2, 3}]  # the irrelevant candidates before these: 3, 2 and 0
    found = recall_at_k(torch.zeros(3, 4), right, (1, 2, 3, 4))
    assert found == {1: 1 / 3, 2: 1 / 3, 3: 2 / 3, 4: 1}


@pytest.mark.parametrize(
    ("scores", "relevant", "reason"),
    [
        (torch.zeros(2, 3), [{0}, set()], r"query 1: relevant candidates \[\] of 3"),
        (torch.zeros(1, 3), [{3}], r"query 0: relevant candidates \[3\] of 3"),
        (torch.zeros(1, 3), [{-1}], r"query 0: relevant candidates \[-1\] of 3"),
        (torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), [{0}, {0}], "of query 1 is not a number"),
    ],
)
def test_faults(scores: torch.Tensor, relevant: list[set[int]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        recall_at_k(scores, relevant)

"""Batches of conversations of like length."""

from __future__ import annotations

import numpy as np

from mico_chat.messages import Message, TextPart
from mico_training.data.conversations import WINDOW, ChatExample, GroupedByLength, about_tokens

BATCH = 4


class Examples:
    """Conversations of lengths drawn at random."""

    def __init__(self, n: int) -> None:
        self.lengths = np.random.default_rng(0).integers(4, 400, n)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, draw: int) -> ChatExample:
        text = TextPart("x" * int(self.lengths[draw]))
        return ChatExample(str(draw), (Message("user", (text,)),), ())


def test_each_example_is_drawn_once_and_stays_in_its_window() -> None:
    n = 2 * WINDOW * BATCH + 7
    grouped = GroupedByLength(Examples(n), BATCH, seed=0)
    drawn = [int(grouped[i].id) for i in range(n)]
    assert sorted(drawn) == list(range(n))
    assert all(i // (WINDOW * BATCH) == d // (WINDOW * BATCH) for i, d in enumerate(drawn))


def test_a_batch_holds_like_lengths_and_batches_are_mixed() -> None:
    n = WINDOW * BATCH
    grouped = GroupedByLength(Examples(n), BATCH, seed=0)
    lengths = np.array([about_tokens(grouped[i]) for i in range(n)]).reshape(-1, BATCH)
    plain = np.array([about_tokens(Examples(n)[i]) for i in range(n)]).reshape(-1, BATCH)
    assert np.ptp(lengths, axis=1).max() < np.ptp(plain, axis=1).min()
    assert (np.diff(lengths.max(1)) < 0).any()


def test_a_draw_does_not_depend_on_those_before_it() -> None:
    n = 3 * WINDOW * BATCH
    whole = GroupedByLength(Examples(n), BATCH, seed=0)
    ids = [whole[i].id for i in range(n)]
    for draw in (n - 1, 5, WINDOW * BATCH):
        assert GroupedByLength(Examples(n), BATCH, seed=0)[draw].id == ids[draw]
    other = GroupedByLength(Examples(n), BATCH, seed=1)
    assert [other[i].id for i in range(n)] != ids

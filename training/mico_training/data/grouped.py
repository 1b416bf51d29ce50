"""Conversations of like length in one batch: less of it is padding."""

from __future__ import annotations

import numpy as np

from mico_chat.messages import TextPart
from mico_training.data.conversations import ChatExample
from mico_training.data.mixture import Integers
from mico_training.data.simulated import ChatDataset

WINDOW = 8
"""Batches among which conversations change places. A window of 8 batches of 32 of the mini's
conversations is padded to 132 tokens a row on average, unsorted ones to 190."""

MEDIUM_TOKENS = 36
CHARACTERS = 4  # a token


class GroupedByLength:
    """A data set whose batches hold examples of about one length.

    Within each window of draws the examples are sorted by length and the batches shuffled. What
    draw ``i`` is depends on the seed and ``i`` alone, so that a run resumes at the exact sample.

    Args:
        examples: by draw.
        batch_size: examples a step, over all ranks.
        seed: decides the order of batches.
    """

    def __init__(self, examples: ChatDataset, batch_size: int, seed: int) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self._window = -1
        self._order: Integers = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> ChatExample:
        window, place = divmod(draw, WINDOW * self.batch_size)
        if window != self._window:
            self._order = self._sorted(window)
            self._window = window
        return self.examples[int(self._order[place])]

    def _sorted(self, window: int) -> Integers:
        """The draws of a window in the order in which they are given out."""
        first = window * WINDOW * self.batch_size
        last = min(first + WINDOW * self.batch_size, len(self))
        lengths = [about_tokens(self.examples[draw]) for draw in range(first, last)]
        order = first + np.argsort(lengths, kind="stable")
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        generator = np.random.default_rng((self.seed, 4, window))
        # A last, smaller batch stays last.
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = batches[len(whole) :]
        return np.concatenate([*(whole[i] for i in generator.permutation(len(whole))), *rest])


def about_tokens(example: ChatExample) -> int:
    """A conversation's length, near enough to sort by."""
    text = sum(
        len(part.text)
        for message in example.messages
        for part in message.content
        if isinstance(part, TextPart)
    )
    return text // CHARACTERS + MEDIUM_TOKENS * len(example.media)

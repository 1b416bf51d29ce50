"""A language model without weights: mixed-up slots, positions or prefixes change its tokens.

The next token is a function of all tokens in the slot. The model checks the scheduler's calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from collections.abc import Sequence as Many
from typing import Any

import torch
from tokenizers import decoders
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Chunk, Sampled, Sequence
from mico_chat.errors import RequestError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import PLACEHOLDER
from tests.support.tiny import letters

END = 3
"""``<|im_end|>`` of the tokenizer of letters."""

FIRST_LETTER, LETTERS = 4, 95

Held = list[Hashable]
Rule = Callable[[Held], int]


def joined_letters() -> PreTrainedTokenizerFast:
    tokenizer = letters()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    return tuple(FIRST_LETTER + ord(letter) - 32 for letter in text)


def block(length: int, seed: int = 0) -> ContextBlock:
    rows = torch.arange(length, dtype=torch.float32)[:, None] + 1000 * (seed + 1)
    return ContextBlock(rows, key=b"%d %d" % (seed, length))


def letter_of(held: Held) -> int:
    return FIRST_LETTER + zlib.crc32(repr(held).encode()) % LETTERS


def says(prompt: Prompt, tokens: Many[int]) -> Rule:
    return lambda held: tokens[len(held) - len(prompt)]


class FakeSampler:
    """Follows the model's rule; with a temperature, its tokens depend on seed and index."""

    def __init__(self, model: FakeModel, options: GenerationOptions, index: int) -> None:
        self._model, self._options, self._index = model, options, index
        model.samplers.add(self)

    def sample(self, held: Held) -> Sampled:
        assert self in self._model.samplers, "a sampler is used after it was closed"
        if self._options.temperature:
            held = [*held, f"{self._options.seed} {self._index}"]
        token = self._model.rule(held)
        top = tuple((token + n, -0.5 - n) for n in range(self._options.logprobs or 0))
        return Sampled(token, -9.0 if token == END else -0.5, top)

    def score(self, held: Held, token: int) -> Sampled:
        """The token that the rule gives has -0.5, another one -9."""
        found = self.sample(held)
        return Sampled(token, -0.5 if token == found.token else -9.0, found.top)

    def close(self) -> None:
        self._model.samplers.remove(self)  # KeyError when it was closed before


NO_TOP_K = 13
"""The model refuses this value when it makes a sampler."""


class FakeModel:
    """See :class:`mico_chat.engine.scheduler.Model`; ``before`` is called as a step begins.

    With ``state_bytes`` a slot cannot go back.
    """

    reuses_starts = True
    decodes_apart = False
    scores = True

    def __init__(
        self,
        *,
        n_slots: int = 4,
        n_cells: int = 400,
        max_position: int = 200,
        max_batch: int = 32,
        max_idle_cells: int | None = None,
        state_bytes: int = 0,
        rule: Rule = letter_of,
        before: Callable[[Many[Chunk]], None] = lambda batch: None,
    ) -> None:
        self.n_slots, self.n_cells = n_slots, n_cells
        self.max_position, self.max_batch = max_position, max_batch
        self.max_idle_cells = n_cells if max_idle_cells is None else max_idle_cells
        self.rule, self.before, self.state_bytes = rule, before, state_bytes
        self.slots: list[Held] = [[] for _ in range(n_slots)]
        self.samplers: set[FakeSampler] = set()
        self.batches: list[list[Chunk]] = []
        self.copies: list[tuple[int, int, int]] = []
        self.closed = False

    @property
    def computed(self) -> int:
        return sum(chunk.length for batch in self.batches for chunk in batch)

    def run(self, batch: Many[Chunk]) -> list[Any]:
        assert not self.closed
        self.batches.append(list(batch))
        self.before(batch)
        assert batch
        assert sum(chunk.length for chunk in batch if chunk.causal) <= self.max_batch
        assert len({chunk.slot for chunk in batch}) == len(batch), "two chunks of one slot"
        for chunk in batch:
            held = self.slots[chunk.slot]
            assert chunk.start == len(held), f"{chunk.start} where {len(held)} are held"
            held += _names(chunk.ids, chunk.context)
            assert len(held) == chunk.start + chunk.length <= self.max_position
        assert sum(map(len, self.slots)) <= self.n_cells
        return [
            self.slots[chunk.slot][: chunk.start + chunk.length - before]
            for chunk in batch
            for before in reversed(range(chunk.wanted))
        ]

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self.slots[target], "the target is not empty"
        assert 0 < length <= len(self.slots[source])
        assert length == len(self.slots[source]) or not self.state_bytes
        self.slots[target] = self.slots[source][:length]
        self.copies.append((source, target, length))

    def truncate(self, slot: int, length: int) -> None:
        assert length <= len(self.slots[slot])
        assert length in (0, len(self.slots[slot])) or not self.state_bytes
        del self.slots[slot][length:]

    def sampler(self, sequence: Sequence) -> FakeSampler:
        if sequence.options.top_k == NO_TOP_K:
            raise RequestError("top_k: not here")
        return FakeSampler(self, sequence.options, sequence.index)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def _names(ids: Many[int], context: Many[Tensor]) -> Held:
    rows = iter([tuple(row) for tokens in context for row in tokens.tolist()])
    return [next(rows) if token == PLACEHOLDER else token for token in ids]


def expected(prompt: Prompt, options: GenerationOptions, index: int = 0) -> list[int]:
    model = FakeModel()
    sampler = FakeSampler(model, options, index)
    held = _names(*prompt.tokens(0, len(prompt)))
    tokens: list[int] = []
    while len(tokens) < options.max_tokens and END not in tokens:
        tokens.append(sampler.sample([*held, *tokens]).token)
    return tokens

"""Tokens are picked as the options say, repeatably, and the process's random state is let alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.transformers import TorchSampler

LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, -1.0, -2.0])


def sample(n: int, index: int = 0, logits: Tensor = LOGITS, **options: Any) -> list[int]:
    """Tokens sampled from the same logits again and again."""
    sampler = TorchSampler(GenerationOptions(**options), index, torch.device("cpu"))
    return [sampler.sample(logits).token for _ in range(n)]


def test_seed_repeats_and_index_changes() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, next_answer, other = (
        sample(40, index, temperature=1.0, seed=seed)
        for seed, index in ((1, 0), (1, 0), (1, 1), (7, 0))
    )
    unseeded = [sample(40, temperature=1.0) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    assert first == again
    assert first not in (next_answer, other)
    assert unseeded[0] != unseeded[1]


def test_frequencies_are_the_probabilities() -> None:
    tokens = torch.tensor(sample(4000, temperature=0.8, seed=0))
    found = tokens.bincount(minlength=6) / 4000
    torch.testing.assert_close(found, (LOGITS / 0.8).softmax(0), atol=0.03, rtol=0)


def test_temperature_0_is_greedy() -> None:
    assert sample(3, temperature=0.0) == sample(3, temperature=1e-30) == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1000}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {0}),
        ({"top_p": 0.6}, {0, 1}),  # 0.43 and 0.26
        ({"min_p": 0.5}, {0, 1}),  # of the likeliest: 0.61, then 0.37
        ({"min_p": 1.0}, {0}),
    ],
)
def test_unlikely_tokens_are_cut_off(options: dict[str, Any], kept: set[int]) -> None:
    assert set(sample(2000, temperature=1.0, seed=0, **options)) == kept


def test_penalties_are_for_the_answers_own_tokens() -> None:
    # 2.0 / 2 = 1.0 < 1.5; 1.5 / 2 < 1.0; then all three are repeated, and 1.0 is the most.
    assert sample(4, repetition_penalty=2.0) == [0, 1, 0, 0]
    assert sample(4, presence_penalty=0.75) == [0, 1, 0, 0]
    # 2.0, 1.5, 1.0, 2.0 - 0.75, 1.0, 1.5 - 0.75
    assert sample(6, frequency_penalty=0.75) == [0, 1, 0, 2, 1, 0]
    assert sample(3, frequency_penalty=-1.0) == [0, 0, 0]
    negative = torch.tensor([-1.0, -1.5])
    assert sample(2, logits=negative, repetition_penalty=2.0) == [0, 1]


def test_extreme_options_give_a_token() -> None:
    options: dict[str, Any] = {
        "temperature": 1e-5,
        "repetition_penalty": 1e-300,
        "frequency_penalty": 2.0,
    }
    assert len(sample(5, seed=0, **options)) == 5


def test_logprobs_are_those_of_the_model() -> None:
    options = GenerationOptions(logprobs=3, temperature=1.0, seed=0, presence_penalty=2.0)
    sampler = TorchSampler(options, 0, torch.device("cpu"))
    expected = LOGITS.log_softmax(0).tolist()
    for _ in range(5):
        sampled = sampler.sample(LOGITS)
        assert sampled.logprob == pytest.approx(expected[sampled.token])
        assert [token for token, _ in sampled.top] == [0, 1, 2]
        assert [value for _, value in sampled.top] == pytest.approx(expected[:3])
    whole_options = GenerationOptions(logprobs=20)
    top = TorchSampler(whole_options, 0, torch.device("cpu")).sample(LOGITS).top
    assert sum(torch.tensor([value for _, value in top]).exp().tolist()) == pytest.approx(1.0)


def test_logprobs_only_where_asked_for() -> None:
    bare, one = (
        TorchSampler(GenerationOptions(logprobs=n), 0, torch.device("cpu")).sample(LOGITS)
        for n in (None, 0)
    )
    assert (bare.logprob, bare.top) == (None, ())
    assert one.logprob is not None
    assert one.top == ()

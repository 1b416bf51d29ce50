"""Likelihoods of continuations in a batch equal those of a forward pass for each alone."""

import pytest
import torch

from mico_chat.engine.base import Prompt
from mico_chat.errors import ContextLengthError
from mico_chat.evaluation.chat import log_likelihoods
from mico_chat.media.medium import ContextBlock
from tests.support.tiny import chat_model


def test_a_batch_is_each_alone() -> None:
    llm = chat_model().llm
    width = llm.config.hidden_size
    torch.manual_seed(3)
    block = ContextBlock(torch.randn(5, width), b"x")
    pairs = [
        (Prompt(((7, 8, 9), block, (10, 11))), [12, 13, 14]),
        (Prompt(((7,),)), [40]),
        (Prompt((block, (20, 21, 22, 23))), [5, 6]),
    ]
    found = log_likelihoods(llm, pairs, 100)
    for (prompt, ids), (logprobs, greedy) in zip(pairs, found, strict=True):
        rows = [
            s.tokens if isinstance(s, ContextBlock) else llm.get_input_embeddings()(torch.tensor(s))
            for s in (*prompt.segments, tuple(ids))
        ]
        with torch.no_grad():
            logits = llm(inputs_embeds=torch.cat(rows)[None]).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + i, token] for i, token in enumerate(ids)]
        torch.testing.assert_close(logprobs, torch.stack(expected), atol=1e-5, rtol=1e-4)
        assert not greedy


def test_the_greedy_continuation_is_recognised() -> None:
    llm = chat_model().llm
    prompt = Prompt(((7, 8, 9),))
    ids: list[int] = []
    for _ in range(4):
        with torch.no_grad():
            logits = llm(torch.tensor([[7, 8, 9, *ids]])).logits[0, -1]
        ids.append(int(logits.argmax()))
    other = [*ids[:3], (ids[3] + 1) % 90]
    (_, greedy), (_, not_greedy) = log_likelihoods(llm, [(prompt, ids), (prompt, other)], 100)
    assert greedy
    assert not not_greedy


def test_too_long_is_reported_with_both_numbers() -> None:
    with pytest.raises(
        ContextLengthError, match=r"length is 4 tokens, .* has 3 and the contin.* 2"
    ):
        log_likelihoods(chat_model().llm, [(Prompt(((7, 8, 9),)), [1, 2])], 4)

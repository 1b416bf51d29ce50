"""Text and context tokens meet in reading order, and their numbers must agree."""

from __future__ import annotations

import re

import pytest
import torch

from mico_chat.errors import ModelError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import segments, splice

TABLE = torch.nn.Embedding.from_pretrained(10.0 * torch.arange(8)[:, None].expand(8, 2))
ONE, TWO = torch.tensor([[1.0, 1]]), torch.tensor([[2.0, 2], [3, 3]]).bfloat16()


def test_context_tokens_come_in_reading_order() -> None:
    ids = torch.tensor([[5, -1, -1], [-1, 7, 0]])
    found = splice(TABLE, ids, [ONE, TWO])
    assert found.dtype == torch.float32
    assert found[..., 0].tolist() == [[50, 1, 2], [3, 70, 0]]
    plain = torch.tensor([[1, 2]])
    assert torch.equal(splice(TABLE, plain, []), TABLE(plain))


def test_a_gradient_reaches_the_context_tokens() -> None:
    context = ONE.clone().requires_grad_()
    splice(TABLE, torch.tensor([3, 9]), [context], 9).sum().backward()
    assert context.grad is not None
    assert context.grad.tolist() == [[1, 1]]


def test_a_prompts_segments_are_its_ids_and_blocks() -> None:
    one, two = ContextBlock(ONE, b"1"), ContextBlock(TWO, b"2")
    assert segments([9, 9, 9, 4, 5], [one, two], 9) == (one, two, (4, 5))
    assert segments([1, 2, 9, 3, 9, 9], [one, two], 9) == ((1, 2), one, (3,), two)
    assert segments([1], [], 9) == ((1,),)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([9, 9, 9, 9], "4 context placeholders in the prompt but 3 context tokens"),
        ([1, 2], "0 context placeholders in the prompt but 3 context tokens"),
    ],
)
def test_the_numbers_must_agree(ids: list[int], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)):
        splice(TABLE, torch.tensor(ids), [ONE, TWO], 9)
    with pytest.raises(ModelError, match=re.escape(said)):
        segments(ids, [ContextBlock(ONE, b"1"), ContextBlock(TWO, b"2")], 9)


def test_a_run_of_placeholders_must_be_its_mediums() -> None:
    with pytest.raises(ModelError, match="1 context placeholders in the prompt but 2 context"):
        segments([9, 1, 9, 9], [ContextBlock(TWO, b"2"), ContextBlock(ONE, b"1")], 9)

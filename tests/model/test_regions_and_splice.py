"""Regions ask tokens for the words of their place; text and context tokens keep their order."""

import re

import pytest
import torch
from torch import Tensor

from mico_chat.errors import ModelError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.encoder import cell_centres
from mico_chat.model.mini.regions import WHOLE, RegionBatch, region_loss
from mico_chat.model.splice import segments, splice

LEFT = (0.0, 0.0, 0.5, 1.0)
WHOLE_BOX = (WHOLE,) * 4


def batch(
    boxes: list[tuple[float, ...]],
    media: list[int] | None = None,
    words: list[list[int]] | None = None,
) -> RegionBatch:
    n = len(boxes)
    medium, box, said = map(torch.tensor, (media or [0] * n, boxes, words or [[7]] * n))
    none = torch.full((n, 1), -1)
    return RegionBatch(medium, box, said, none, none[:, 0] * torch.nan, none[:, 0])


def grid(own: Tensor) -> list[list[int]]:
    return own.int().view(4, 4).tolist()


@pytest.mark.parametrize(
    ("box", "places"),
    [
        ((0.0, 0.0, 0.5, 1.0), [0, 1, 4, 5, 8, 9, 12, 13]),
        ((0.9, 0.95, 0.95, 0.99), [15]),  # between places: the nearest
        ((1.2, -0.6, 1.4, -0.4), [3]),  # outside the picture
    ],
)
def test_the_places_of_a_box(box: tuple[float, ...], places: list[int]) -> None:
    own = batch([box]).places(cell_centres(4))
    assert own[0].nonzero().flatten().tolist() == places


def test_a_place_belongs_to_the_smallest_box_of_its_own_medium() -> None:
    small = (0.0, 0.0, 0.25, 0.25)
    own = batch([LEFT, small, small], [0, 0, 1]).places(cell_centres(4))
    assert grid(own[0])[0] == [0, 1, 0, 0]
    assert grid(own[1]) == grid(own[2])
    assert own[1].sum() == 1


def test_a_whole_medium_has_no_place_and_takes_none() -> None:
    regions = batch([WHOLE_BOX, LEFT])
    assert regions.whole.tolist() == [True, False]
    assert regions.places(cell_centres(4)).sum(1).tolist() == [0, 8]


def test_the_vocabulary_leaves_padding_out() -> None:
    regions = batch([LEFT, LEFT], words=[[9, 4], [4, -1]])
    words, wanted = regions.vocabulary(regions.both)
    assert words.tolist() == [4, 9]
    assert wanted.tolist() == [[True, True], [True, False]]


def test_the_right_words_at_the_right_place_cost_least() -> None:
    wanted = torch.tensor([[True, True, False], [False, False, True]])
    region = torch.tensor([0, 0, 1])
    right = torch.tensor([[5.0, 5, -5], [5, 5, -5], [-5, -5, 5]])
    assert region_loss(right, region, wanted) < 0.01
    assert region_loss(right.roll(1, 1), region, wanted) > 3
    # One of two right words alone is half right: neither has to give way to the other.
    half = torch.tensor([[5.0, -5, -5], [5, -5, -5], [-5, -5, 5]])
    assert region_loss(right, region, wanted) < region_loss(half, region, wanted) < 3


def test_a_large_region_counts_as_much_as_a_small_one() -> None:
    wanted = torch.tensor([[True, False], [False, True]])
    good, bad = torch.tensor([[5.0, -5]]), torch.tensor([[5.0, -5]])
    one = region_loss(torch.cat([good, bad]), torch.tensor([0, 1]), wanted)
    many = region_loss(torch.cat([good] * 9 + [bad]), torch.tensor([0] * 9 + [1]), wanted)
    torch.testing.assert_close(one, many)


TABLE = torch.nn.Embedding.from_pretrained(10.0 * torch.arange(8)[:, None].expand(8, 2))
ONE, TWO = torch.tensor([[1.0, 1]]), torch.tensor([[2.0, 2], [3, 3]]).bfloat16()


def test_context_tokens_come_in_reading_order() -> None:
    ids = torch.tensor([[5, -1, -1], [-1, 7, 0]])
    found = splice(TABLE, ids, [ONE, TWO])
    assert found.dtype == torch.float32
    assert found[..., 0].tolist() == [[50, 1, 2], [3, 70, 0]]
    plain = torch.tensor([[1, 2]])
    assert torch.equal(splice(TABLE, plain, []), TABLE(plain))


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

"""Regions: which places are whose, and that a token is asked for the words of its own region."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mico_chat.model.encoder import cell_centres
from mico_chat.model.regions import WHOLE, RegionBatch, region_loss

LEFT = (0.0, 0.0, 0.5, 1.0)
WHOLE_BOX = (WHOLE,) * 4


def batch(
    boxes: list[tuple[float, ...]],
    media: list[int] | None = None,
    words: list[list[int]] | None = None,
) -> RegionBatch:
    return RegionBatch(
        torch.tensor(media or [0] * len(boxes)),
        torch.tensor(boxes),
        torch.tensor(words or [[7]] * len(boxes)),
        torch.full((len(boxes), 1), -1),
    )


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

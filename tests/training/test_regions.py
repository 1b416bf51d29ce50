"""What a sample's truth says of each place."""

from __future__ import annotations

from typing import Any

import torch

from mico_chat.model.regions import WHOLE
from mico_training.data.regions import ROOM_SIDE, Region, region_batch, regions_of
from mico_training.world import room_scenes


def thing(name: str, x: float, y: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y, "width": 0.2, "height": 0.1, **more}


def words(kind: Any, *things: dict[str, Any]) -> list[set[str]]:
    return [set(region.words) for region in regions_of(kind, {"things": list(things)})]


def test_colour_side_and_number_are_bound_to_each_thing() -> None:
    cup, hat, other = thing("cup", 0.2, colour="red"), thing("hat", 0.8), thing("cup", 0.5)
    first, second, third, whole = words("image", cup, hat, other)
    assert first == {"red", "left", "two"}
    assert second == {"right", "one"}
    assert third == {"middle", "two"}
    assert whole == {"three"}


def test_a_box_lies_within_its_thing() -> None:
    (region, whole) = regions_of("image", {"things": [thing("cup", 0.5)]})
    left, top, right, bottom = region.box
    assert 0.4 < left < right < 0.6
    assert 0.45 < top < bottom < 0.55
    assert set(whole.box) == {WHOLE}


def test_above_and_below_are_words_for_two_things() -> None:
    high, low, _ = words("image", thing("cup", 0.5, 0.2), thing("hat", 0.5, 0.8))
    assert {"above", "top"} <= high
    assert {"below", "bottom"} <= low
    assert not {"left", "right"} & (high | low)


def test_depth_has_nearness_but_no_colour() -> None:
    near, far = thing("cup", 0.2, depth=1.0, colour="red"), thing("hat", 0.8, depth=2.0)
    first, second, _ = words("depth", near, far)
    assert "nearer" in first
    assert "far" in second
    assert "red" not in first
    # Nearly equal depths are not told apart.
    alike, other, _ = words("depth", thing("a", 0.2, depth=1.0), thing("b", 0.8, depth=1.05))
    assert not {"nearer", "far"} & (alike | other)


def test_a_room_counts_pixels_where_others_have_boxes() -> None:
    room = {"name": "cup", "x": 0.5, "y": 0.5, "near": 1.0, "depth": 1.2, "pixels": 3600}
    left, _, right, _ = regions_of("image", {"things": [room]})[0].box
    assert 0.15 < right - left < 0.31
    assert room_scenes.SIZE == ROOM_SIDE


def test_a_clip_has_the_way_of_what_moves_if_it_is_one() -> None:
    def way(*ways: str) -> list[set[str]]:
        return words("video", *({"name": "ball", "way": way} for way in ways))

    assert way("left") == way("left", "still") == way("left", "left") == [{"left"}]
    assert way("still") == [{"still"}]
    assert way("left", "up") == []


def test_sounds_and_foreign_truths_have_no_regions() -> None:
    assert regions_of("audio", {"things": [thing("bell", 0.5)]}) == ()
    assert regions_of("image", {}) == ()
    assert regions_of("image", {"things": ["cup"]}) == ()
    assert regions_of("image", {"things": [{"name": "cup"}]}) == ()
    assert regions_of("image", {"belong": True, "thing": "cup"}) == ()


def test_a_batch_numbers_media_and_leaves_wordless_regions_out() -> None:
    known = {"red": [3], "left": [4, 5], "cup": [6]}
    box = (0.0, 0.0, 1.0, 1.0)
    found = [
        [Region(box, "cup", ("red",))],
        [],
        [Region(box, "", ("nowhere",))],
        [Region(box, "", ("left", "red"))],
    ]
    batch = region_batch(found, lambda word: known.get(word, []))
    assert batch is not None
    assert batch.medium.tolist() == [0, 3]
    assert batch.words.tolist() == [[3, -1, -1], [4, 5, 3]]
    assert batch.names.tolist() == [[6], [-1]]
    assert region_batch([[], []], lambda word: [1]) is None
    assert torch.equal(batch.inputs()["region_box"][0], torch.tensor(box))

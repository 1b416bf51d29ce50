"""The data engine's pictures say the truth, checked by their pixels; procedural shapes only."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from mico_training.world import colours, pictures, room_scenes, rooms
from mico_training.world.compose import Item, render
from mico_training.world.language import article, countable, plural
from mico_training.world.sample import Sample, Split
from mico_training.world.things import Catalogue, Thing, confusable, shape_things


@pytest.fixture(scope="module")
def things() -> Catalogue:
    return Catalogue(shape_things())


def shape(name: str) -> Thing:
    return next(t for t in shape_things() if t.name == name)


Make = Callable[[np.random.Generator, Split, Catalogue], Sample]


def drawn(make: Make, things: Catalogue, n: int) -> list[Sample]:
    return [make(np.random.default_rng(seed), "train", things) for seed in range(n)]


@pytest.mark.parametrize("colour", colours.COLOURS)
def test_a_sampled_colour_is_named_so(colour: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        patch = np.full((20, 20, 4), 255, np.uint8)
        patch[..., :3] = colours.sample(rng, colour)
        assert colours.dominant(patch) == colour
    painted = colours.tint(shape("star").load(), colours.sample(rng, colour))
    assert colours.dominant(painted) in (colour, None)


def test_two_colours_have_no_dominant_one_and_two_names_may_be_confused() -> None:
    patch = np.full((20, 20, 4), 255, np.uint8)
    patch[:10, :, :3], patch[10:, :, :3] = (255, 0, 0), (0, 0, 255)
    assert colours.dominant(patch) is None
    assert confusable(shape("circle"), shape("ball"))
    assert not confusable(shape("star"), shape("heart"))


def test_a_painted_thing_is_where_it_is_said_to_be_and_covers_the_farther() -> None:
    rng = np.random.default_rng(2)
    items = [
        Item(
            shape(name), colour, colours.tint(shape(name).load(), np.array(rgb, np.uint8)),
            0.25, 0.7, 0.3, depth,
        )
        for name, colour, rgb, depth in (
            ("circle", "red", (220, 20, 20), 1.0), ("square", "blue", (20, 20, 220), 3.0),
        )
    ]  # fmt: skip
    scene = render(rng, items)
    one, farther = scene.placed
    red, _, blue = np.median(scene.pixels[one.mask].astype(int), axis=0)
    assert red > blue + 60
    rows, columns = np.nonzero(one.mask)
    assert columns.mean() / 256 == pytest.approx(0.25, abs=0.02)
    assert rows.mean() / 256 == pytest.approx(0.7, abs=0.02)
    assert (one.x, one.y) == pytest.approx((0.25, 0.7), abs=0.02)
    assert one.width == pytest.approx(0.3, abs=0.02)
    assert one.mask.sum() > farther.mask.sum()


def test_neither_side_nor_order_tells_the_answer(things: Catalogue) -> None:
    answers: Counter[str] = Counter()
    first = []
    for sample in drawn(pictures.make_pair, things, 75):
        for turn in sample.turns:
            if turn.skill == "position":
                first.append(turn.choices[0] in turn.accept)
                if set(turn.choices) == {"left", "right"}:
                    answers[turn.accept[0]] += 1
    assert min(answers["left"], answers["right"]) > 0.35 * sum(answers.values())
    assert 0.4 < np.mean(first) < 0.6


def test_side_turn_is_true_both_ways_round(things: Catalogue) -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        two = zip(things.distinct(rng, "train", 2), (0.25, 0.75), strict=True)
        a, b = render(rng, [Item(t, None, t.load(), x, 0.5, 0.3) for t, x in two]).placed
        assert pictures.side_turn(rng, a, b, "x").accept == ("left",)
        assert pictures.side_turn(rng, b, a, "x").accept == ("right",)
        which = pictures.which_side_turn(rng, a, b, "x")
        asked_left = "left" in which.question.lower()
        assert which.accept == (a if asked_left else b).thing.accept


def test_counts_are_even_and_true_by_pixels(things: Catalogue) -> None:
    counts: Counter[str] = Counter()
    for sample in drawn(pictures.make_count, things, 100):
        turn = sample.turns[0]
        kind = sample.truth["things"][0]["name"]
        n = sum(t["name"] == kind for t in sample.truth["things"])
        assert turn.skill == "count"
        assert turn.accept[1] == str(n)
        assert all(t["width"] > 0.02 for t in sample.truth["things"])
        counts[turn.accept[0]] += 1
    assert set(counts) == {"one", "two", "three", "four"}
    assert min(counts.values()) > 15


def test_yes_and_no_are_even(things: Catalogue) -> None:
    answers: Counter[str] = Counter()
    for sample in drawn(pictures.make_scene, things, 100):
        names = {t["name"] for t in sample.truth["things"]}
        for turn in sample.turns:
            if turn.skill == "present":
                answers[turn.accept[0]] += 1
                present = any(f" {n} " in f" {turn.question[:-1]} " for n in names)
                assert present == (turn.accept == ("yes",))
    assert 0.4 < answers["yes"] / sum(answers.values()) < 0.6


def test_colour_does_not_depend_on_the_thing(things: Catalogue) -> None:
    seen: Counter[str] = Counter()
    for sample in drawn(pictures.make_colour, things, 220):
        seen.update(t["colour"] for t in sample.truth["things"])
    assert set(seen) == set(colours.COLOURS)
    assert max(seen.values()) < 2.2 * min(seen.values())


def test_depth_answers_agree_with_the_depth_map(things: Catalogue) -> None:
    checked = 0
    for sample in drawn(rooms.make_layers, things, 25):
        by_name = {t["name"]: t for t in sample.truth["things"]}
        for turn in sample.turns:
            if turn.skill == "nearer" and set(turn.choices) <= set(by_name):
                asks_near = any(w in turn.question.lower() for w in ("nearer", "closer"))
                order = sorted(turn.choices, key=lambda n: by_name[n]["depth"])
                right = order[0] if asks_near else order[-1]
                assert right in turn.accept
                checked += 1
    assert checked > 10


def test_depth_of_a_thing_is_its_depth(things: Catalogue) -> None:
    rng = np.random.default_rng(7)
    items = [Item(shape("square"), None, shape("square").load(), 0.3, 0.5, 0.3, 1.5)]
    placed = render(rng, items).placed
    depth = room_scenes.depth_of(placed, 4.0, None)
    assert np.median(depth[placed[0].mask]) == pytest.approx(1.5, rel=0.05)
    assert depth[0, -1] == 4.0
    normal = room_scenes.normals_of(np.full((64, 64), 2.0, np.float32), 0.5)
    np.testing.assert_allclose(normal[32, 32], [0, 0, 1])


@pytest.mark.parametrize(
    ("name", "with_article", "many"),
    [
        ("apple", "an apple", "apples"),
        ("unicorn", "a unicorn", "unicorns"),
        ("toy mouse", "a toy mouse", "toy mice"),
        ("fish", "a fish", "fish"),
        ("cherry", "a cherry", "cherries"),
        ("bus", "a bus", "buses"),
        ("cup of coffee", "a cup of coffee", "cups of coffee"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("scissors", "scissors", None),
        ("bread", "bread", None),
    ],
)
def test_nouns(name: str, with_article: str, many: str | None) -> None:
    assert article(name) == with_article
    assert countable(name) == (many is not None)
    assert many is None or plural(name) == many

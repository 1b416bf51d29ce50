"""The data engine's pictures say the truth, checked by their pixels; procedural shapes only."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mico_training.data.language.english import article, countable, plural
from mico_training.data.sources.written import Sample, Split
from mico_world.pictures import compose, pictures
from mico_world.pictures.compose import SIDE, Item, Placed, beside, render
from mico_world.rooms import rooms
from mico_world.rooms import scenes as room_scenes
from mico_world.sources import split_of
from mico_world.things import colours
from mico_world.things.catalogue import Catalogue, Thing, confusable, shape_things
from mico_world.things.photographs import Photograph, Photographs


@pytest.fixture(scope="module")
def things() -> Catalogue:
    return Catalogue(shape_things())


def shape(name: str) -> Thing:
    return next(t for t in shape_things() if t.name == name)


Make = Callable[[np.random.Generator, Split, Catalogue], Sample]


def drawn(make: Make, things: Catalogue, n: int) -> list[Sample]:
    return [make(np.random.default_rng(seed), "train", things) for seed in range(n)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, for tests that count what is said of many: their pixels say nothing of it."""
    monkeypatch.setattr(compose, "SIDE", 160)


@pytest.mark.parametrize("colour", colours.COLOURS)
def test_a_sampled_colour_is_named_so(colour: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
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
    assert columns.mean() / SIDE == pytest.approx(0.25, abs=0.02)
    assert rows.mean() / SIDE == pytest.approx(0.7, abs=0.02)
    assert (one.x, one.y) == pytest.approx((0.25, 0.7), abs=0.02)
    assert one.width == pytest.approx(0.3, abs=0.03)
    assert one.mask.sum() > farther.mask.sum()
    assert one.visible > 0.98
    assert farther.visible < 0.5
    # The box of what is partly hidden is that of its visible part.
    rows, columns = np.nonzero(farther.mask)
    assert farther.width == pytest.approx((np.ptp(columns) + 1) / SIDE)
    assert farther.y == pytest.approx((rows.min() + rows.max() + 1) / 2 / SIDE)


def placed(rng: np.random.Generator, *places: tuple[str, float, float]) -> tuple[Placed, ...]:
    items = [Item(shape(n), None, shape(n).load(), x, y, 0.25) for n, x, y in places]
    return render(rng, items).placed


def test_pictures_beside_each_other_have_their_things_where_they_are() -> None:
    rng = np.random.default_rng(3)
    panels = []
    for name, x in (("star", 0.3), ("heart", 0.5), ("circle", 0.5), ("square", 0.7)):
        item = Item(shape(name), None, shape(name).load(), x, 0.5, 0.5)
        panels.append(render(rng, [item], shape=(100, 120)))
    scene = beside(panels, rows=2, gap=10, line=255)
    assert scene.pixels.shape == (210, 250, 3)
    assert (scene.pixels[100:110] == 255).all()
    for panel, one in zip(panels, scene.placed, strict=True):
        rows, columns = np.nonzero(one.mask)
        assert one.x == pytest.approx((columns.min() + columns.max() + 1) / 2 / 250)
        assert one.y == pytest.approx((rows.min() + rows.max() + 1) / 2 / 210)
        assert one.width == pytest.approx(panel.placed[0].width * 120 / 250)
    assert [p.x < 0.5 for p in scene.placed] == [True, False, True, False]
    assert [p.y < 0.5 for p in scene.placed] == [True, True, False, False]


def test_what_is_at_a_place_is_the_only_thing_there() -> None:
    rng = np.random.default_rng(4)
    three = placed(rng, ("star", 0.15, 0.5), ("heart", 0.5, 0.2), ("square", 0.85, 0.5))
    at = {place: p.name for p, place in pictures._places(three)}
    assert at == {"left": "star", "middle": "heart", "right": "square", "top": "heart"}
    level = placed(rng, ("star", 0.3, 0.2), ("heart", 0.35, 0.8))
    assert {place for _, place in pictures._places(level)} == {"top", "bottom"}
    places = {"left": (0.2, 0.5), "right": (0.8, 0.52), "top": (0.45, 0.2), "middle": (0.52, 0.5)}
    for side, (x, y) in places.items():
        (one,) = placed(rng, ("star", x, y))
        assert pictures.where_turn(rng, one).accept[0] == side
    (corner,) = placed(rng, ("star", 0.15, 0.85))
    assert "bottom left" in pictures.where_turn(rng, corner).answer.lower()


def test_colours_are_compared_truly() -> None:
    rng = np.random.default_rng(6)
    seen: Counter[str] = Counter()
    for _ in range(60):
        look = [str(c) for c in rng.choice(["red", "blue"], 2)]
        a, b = (
            replace(p, colour=c)
            for p, c in zip(placed(rng, ("star", 0.2, 0.5), ("heart", 0.8, 0.5)), look, strict=True)
        )
        for turn in pictures._colours(rng, (a, b)):
            seen[turn.skill] += 1
            if turn.skill == "compare":
                assert turn.accept[0] == ("yes" if look[0] == look[1] else "no")
                assert any(word in turn.answer.lower() for word in turn.accept)
            elif turn.skill == "colour_name":
                asked = next(p for p in (a, b) if p.name in turn.accept)
                assert look[0] != look[1]
                assert str(asked.colour) in turn.question
    assert min(seen["compare"], seen["colour"], seen["colour_name"]) > 5


@pytest.mark.usefixtures("small")
def test_no_question_is_about_clutter_and_a_place_has_no_things(things: Catalogue) -> None:
    cluttered = 0
    for sample in drawn(pictures.make_scene, things, 40):
        clutter = [t["name"] for t in sample.truth["things"] if t["clutter"]]
        asked = [t for t in sample.truth["things"] if not t["clutter"]]
        assert 1 <= len(asked) <= 5
        cluttered += bool(clutter)
        for turn in sample.turns:
            words = f"{turn.question} {turn.answer}".lower()
            assert not any(f"the {name}" in words for name in clutter)
            if turn.skill == "count" and "thing" in turn.question:
                assert not clutter
    assert 5 < cluttered < 25
    for sample in drawn(pictures.make_place, things, 5):
        assert sample.truth["things"] == []
        assert all({"no", "none"} & set(turn.accept) for turn in sample.turns)


def test_what_a_background_may_show_is_never_said_to_be_absent() -> None:
    rng = np.random.default_rng(8)
    tree, palm = (replace(shape("star"), name=name, names=()) for name in ("tree", "palm tree"))
    split = split_of(tree.identity)
    found = Catalogue([tree, palm, replace(shape("star"), name="dog", names=())])
    assert {pictures._absent(rng, split, found, ()) for _ in range(20)} == {"dog"}


def test_a_photograph_is_cropped_and_a_room_has_a_floor_below_its_wall(tmp_path: Path) -> None:
    wall, floor = Image.new("RGB", (300, 240), "red"), Image.new("RGB", (260, 300), "blue")
    stored = []
    for number, image in enumerate((wall, floor)):
        path = tmp_path / f"{number}.jpg"
        image.save(path)
        stored.append(Photograph("a", "surface", str(path), 0, path.stat().st_size))
    rng = np.random.default_rng(0)
    view = Photographs(stored).view(rng, split_of("a"), "surface", (90, 160))
    assert view.size == (160, 90)
    for _ in range(20):
        room = np.asarray(
            compose.room(rng, (90, 160), Photographs(stored), split_of("a"), 0.3, 0.6)
        )
        colours_of = [np.median(part, axis=(0, 1)) for part in (room[:40], room[60:])]
        assert all(colour[1] < 60 for colour in colours_of)


@pytest.mark.usefixtures("small")
def test_neither_side_nor_order_tells_the_answer(things: Catalogue) -> None:
    answers: Counter[str] = Counter()
    first = []
    for sample in drawn(pictures.make_pair, things, 75):
        for turn in sample.turns:
            if turn.skill == "position" and turn.choices:
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


@pytest.mark.usefixtures("small")
def test_the_larger_of_two_things_is_clearly_larger(things: Catalogue) -> None:
    found = 0
    for sample in drawn(pictures.make_scene, things, 40):
        area = {t["name"]: t["width"] * t["height"] for t in sample.truth["things"]}
        for turn in (turn for turn in sample.turns if turn.skill == "larger"):
            small, large = sorted(turn.choices, key=area.__getitem__)
            assert large in turn.answer
            assert area[large] > 1.6 * area[small]
            found += 1
    assert 0 < found < 15


@pytest.mark.usefixtures("small")
def test_counts_are_even_and_true_by_pixels(things: Catalogue) -> None:
    counts: Counter[str] = Counter()
    for sample in drawn(pictures.make_count, things, 60):
        turn = sample.turns[0]
        kind = sample.truth["things"][0]["name"]
        n = sum(t["name"] == kind for t in sample.truth["things"])
        assert turn.skill == "count"
        assert turn.accept[1] == str(n)
        assert all(t["width"] > 0.02 for t in sample.truth["things"])
        counts[turn.accept[0]] += 1
    assert set(counts) == {"one", "two", "three", "four", "five"}
    assert min(counts.values()) > 3  # of 12 on average


@pytest.mark.usefixtures("small")
def test_yes_and_no_are_even(things: Catalogue) -> None:
    answers: Counter[str] = Counter()
    for sample in drawn(pictures.make_scene, things, 120):
        names = {t["name"] for t in sample.truth["things"]}
        for turn in sample.turns:
            if turn.skill == "present":
                answers["yes" if turn.accept == ("yes",) else "no"] += 1
                present = any(f" {n} " in f" {turn.question[:-1]} " for n in names)
                assert present == (turn.accept == ("yes",))
    assert 0.4 < answers["yes"] / sum(answers.values()) < 0.6


@pytest.mark.usefixtures("small")
def test_colour_does_not_depend_on_the_thing(things: Catalogue) -> None:
    seen: Counter[str] = Counter()
    for sample in drawn(pictures.make_colour, things, 160):
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

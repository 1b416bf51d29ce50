"""Clips show what their truth, captions and answers say; procedural shapes only."""

import io
import itertools
from collections import Counter
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from mico_training.data.sources.written import Sample
from mico_world.motion import motion
from mico_world.motion.motion import make_motion
from mico_world.motion.paths import REVERSED, WAYS
from mico_world.motion.turns import VIDEO
from mico_world.things.catalogue import Catalogue, shape_things


@pytest.fixture(scope="module")
def clips() -> list[Sample]:
    things = Catalogue(shape_things())
    return [make_motion(np.random.default_rng(seed), "train", things) for seed in range(80)]


def frames(sample: Sample) -> NDArray[np.float32]:
    with av.open(io.BytesIO(sample.files[VIDEO]), "r") as container:
        shown = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return np.stack(shown).astype(np.float32)


def way_of(start: list[float], end: list[float]) -> str:
    """The way from one box to another."""
    grows = np.log(end[2] / start[2])
    dx, dy = end[0] - start[0], end[1] - start[1]
    if abs(grows) > 0.25:
        return "nearer" if grows > 0 else "away"
    if max(abs(dx), abs(dy)) < 0.01:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def test_a_thing_before_a_still_camera_goes_its_way(clips: list[Sample]) -> None:
    checked: Counter[str] = Counter()
    for sample in clips:
        if sample.truth["camera"] == "still":
            for thing in sample.truth["things"]:
                assert way_of(thing["start"], thing["end"]) == thing["way"]
                checked[thing["way"]] += 1
    assert set(checked) == set(WAYS)


def test_what_changes_in_the_frames_is_where_the_truth_says(clips: list[Sample]) -> None:
    checked = 0
    for sample in clips:
        things = sample.truth["things"]
        if sample.truth["camera"] != "still" or len(things) != 1:
            continue
        thing, shown = things[0], frames(sample)
        assert len(shown) == sample.truth["frames"]
        if thing["way"] not in ("left", "right", "up", "down"):
            continue
        changed = np.abs(shown - np.median(shown, axis=0)) > 40
        axis = 1 if thing["way"] in ("left", "right") else 0
        if any(changed[i].sum() < 60 for i in (0, -1)):
            continue  # it leaves or hardly stands out
        start, end = (np.nonzero(changed[i])[axis].mean() for i in (0, -1))
        assert (end > start) == (thing["way"] in ("right", "down"))
        checked += 1
    assert checked > 5


def shift(before: NDArray[np.float32], after: NDArray[np.float32]) -> tuple[float, float]:
    """How far the content moved to the right and down, in pixels, by phase correlation."""
    cross = np.fft.fft2(after - after.mean()) * np.conj(np.fft.fft2(before - before.mean()))
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-6)).real
    y, x = np.unravel_index(int(peak.argmax()), peak.shape)
    height, width = peak.shape
    return (x + width / 2) % width - width / 2, (y + height / 2) % height - height / 2


@pytest.mark.parametrize("way", ["left", "right", "up", "down"])
def test_everything_moves_against_the_camera(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(motion, "_cast", lambda rng: (way, (), False))
    sample = make_motion(np.random.default_rng(5), "train", Catalogue(shape_things()))
    shown = frames(sample)
    steps = [shift(a, b) for a, b in itertools.pairwise(shown)]
    dx, dy = np.sum(steps, axis=0)
    moved = {"left": -dx, "right": dx, "up": -dy, "down": dy}
    assert max(moved, key=lambda w: moved[w]) == REVERSED[way]
    everything = [t for t in sample.turns if t.skill == "motion"]
    assert [t.accept[0] for t in everything] == [REVERSED[way]]
    assert f"everything moves to the {REVERSED[way]}" in sample.captions[VIDEO][0] or way in (
        "up",
        "down",
    )


def test_a_thing_that_the_camera_follows_stays_in_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(motion, "_cast", lambda rng: ("right", ("right",), True))
    things = Catalogue(shape_things())
    for seed in range(4):
        thing = make_motion(np.random.default_rng(seed), "train", things).truth["things"][0]
        assert thing["way"] == "right"
        assert abs(thing["end"][0] - thing["start"][0]) < 0.2


def answers(clips: list[Sample], skill: str, **truth: Any) -> Counter[str]:
    found = (t for s in clips for t in s.turns if t.skill == skill)
    return Counter(t.accept[0] for t in found)


def test_yes_and_no_are_even_and_no_way_is_more_likely(clips: list[Sample]) -> None:
    for skill in ("moves", "present"):
        said = answers(clips, skill)
        assert set(said) == {"yes", "no"}
        assert min(said.values()) > 0.3 * sum(said.values())
    camera = Counter(
        t.accept[0] for s in clips for t in s.turns if t.choices == ("yes", "no")
        and t.skill == "camera"
    )  # fmt: skip
    assert min(camera["yes"], camera["no"]) > 0.3 * sum(camera.values())
    first = Counter(motion._cast(np.random.default_rng(i))[1][:1] for i in range(3000))
    moving = [first[(way,)] for way in WAYS[:-1]]
    assert max(moving) < 1.35 * min(moving)


def test_a_question_about_it_is_asked_of_a_single_thing_alone(clips: list[Sample]) -> None:
    for sample in clips:
        things = sample.truth["things"]
        for turn in sample.turns:
            if turn.skill == "motion" and " it " in f" {turn.question[:-1].lower()} ":
                assert len(things) == 1
                assert turn.accept[0] in ("still" if things[0]["way"] == "still" else turn.accept)


def test_what_moves_names_all_that_does(clips: list[Sample]) -> None:
    seen = Counter[str]()
    for sample in clips:
        moving = [t["name"] for t in sample.truth["things"] if t["way"] != "still"]
        for turn in sample.turns:
            if turn.skill == "motion_name" and not turn.choices:
                assert all(f"the {name}" in turn.answer.lower() for name in moving)
                if not moving:
                    still = sample.truth["camera"] == "still"
                    assert ("nothing" if still else "camera") in turn.answer.lower()
                seen[str(len(moving))] += 1
    assert set(seen) == {"0", "1", "2"}

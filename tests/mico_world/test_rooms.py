"""Rooms from solids and layers alone: the truth must be what the pixels say."""

import io
from collections import Counter
from functools import cache

import numpy as np
import pytest
import trimesh
from PIL import Image

from mico_training.data.sources.written import Sample, Split
from mico_world.rooms import meshes, rooms
from mico_world.rooms import scenes as room_scenes
from mico_world.sources import split_of
from mico_world.things import colours


@cache
def samples() -> tuple[Sample, ...]:
    rng = np.random.default_rng(5)
    return tuple(rooms.make(rng, "train", use_models=False) for _ in range(60))


def test_depth_and_normals_of_a_ball_are_exact() -> None:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    centre = np.array([0, 0, -3])
    # inside out: the orientation of the triangles must not matter
    for faces in (ball.faces, ball.faces[:, ::-1]):
        hits = meshes.cast([(ball.vertices + centre, faces)], 161, 0.5)
        assert hits.depth[80, 80] == pytest.approx(2.5, abs=1e-3)
        seen = hits.owner == 0
        assert not hits.depth[~seen].any()
        rays = meshes.directions(161, 0.5)[seen]
        outward = (rays * hits.depth[seen, None] - centre) / 0.5
        np.testing.assert_allclose(np.linalg.norm(outward, axis=-1), 1, atol=4e-3)
        np.testing.assert_allclose(np.linalg.norm(hits.normal[seen], axis=-1), 1, atol=1e-5)
        assert ((hits.normal[seen] * rays).sum(axis=-1) <= 0).all()
        assert ((hits.normal[seen] * outward).sum(axis=-1) > 0.99).all()


def test_normal_picture_has_x_in_red_y_in_green_and_facing_in_blue() -> None:
    normal = np.array([[[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]], np.float32)
    picture = meshes.normal_picture(normal)[0].tolist()
    assert picture == [[128, 128, 255], [255, 128, 128], [128, 255, 128], [0, 0, 0]]


def test_a_shadow_falls_on_the_far_side_of_the_sun() -> None:
    box = trimesh.creation.box(extents=(0.4, 0.4, 0.4))
    wall = np.array([[-9, -9, -5], [9, -9, -5], [9, 9, -5], [-9, 9, -5]], np.float32)
    solids = [
        (box.vertices + np.array([0, 0, -4]), box.faces),
        (wall, np.array([[0, 1, 2], [0, 2, 3]], np.int32)),
    ]
    sun = np.array([0.7, 0, 0.7], np.float32)  # from the right: the shadow lies to the left
    hits = meshes.cast(solids, 96, 0.5, sun / np.linalg.norm(sun))
    dark = np.nonzero((hits.owner == 1) & ~hits.lit)
    assert len(dark[1]) > 50
    assert dark[1].mean() < 48


def test_solids_stand_on_the_ground_one_metre_at_most() -> None:
    for shape in meshes.SOLIDS:
        mesh = meshes.solid(shape, np.array([9, 8, 7], np.uint8), np.random.default_rng(1))
        assert mesh.vertices[:, 1].min() == pytest.approx(0, abs=1e-6)
        assert np.ptp(mesh.vertices, axis=0).max() == pytest.approx(1, abs=1e-5)
        assert len(mesh.colours) == len(mesh.faces)


def test_a_dome_is_nearest_in_its_middle_and_a_flat_layer_is_flat() -> None:
    rng = np.random.default_rng(0)
    square, circle = (room_scenes.outline_of(outline, rng) for outline in ("square", "circle"))
    flat = room_scenes.sheet(square, (-0.5, 0.0), (0.3, 0.3), 2.0, 0.5)
    leaning = room_scenes.sheet(square, (-0.5, 0.8), (0.1, 0.1), 2.0, 0.5, slant=(1.0, 0.0))
    dome = room_scenes.sheet(circle, (0.5, 0.0), (0.3, 0.3), 3.0, 0.5, bulge=0.5)
    hits = meshes.cast([flat, leaning, dome], 96, 0.5)
    np.testing.assert_allclose(hits.depth[hits.owner == 0], 2.0, rtol=1e-5)
    np.testing.assert_allclose(hits.normal[48, 24], [0, 0, 1], atol=1e-5)
    assert hits.depth[48, 72] == pytest.approx(2.5, abs=0.01)
    assert 2.9 < hits.depth[hits.owner == 2].max() <= 3.0
    assert (np.diff(hits.depth[9, 20:28]) > 0).all()


def test_truth_agrees_with_the_depth_map() -> None:
    checked = 0
    for sample in samples():
        metric = sample.truth["depth_map"] == "metric"
        if "depth.png" not in sample.files or sample.truth["spoilt"] or not metric:
            continue
        depth = np.asarray(Image.open(io.BytesIO(sample.files["depth.png"]))) / 1000
        assert depth.shape == (room_scenes.SIZE, room_scenes.SIZE)
        for thing in sample.truth["things"]:
            # within the thing's box there are pixels of its depth, at each of its sides
            half = thing["width"] / 2, thing["height"] / 2
            left, right = ((thing["x"] + s * half[0]) * len(depth) for s in (-1, 1))
            top, bottom = ((thing["y"] + s * half[1]) * len(depth) for s in (-1, 1))
            box = depth[round(top) : round(bottom), round(left) : round(right)]
            close = np.abs(box - thing["depth"]) < 0.1 * thing["depth"]
            assert close.mean() > 0.1
            assert thing["near"] <= thing["depth"]
            assert box.size >= 0.012 * depth.size
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("form", rooms.DEPTH_FORMS)
def test_a_relative_depth_map_keeps_the_order(form: str) -> None:
    rng = np.random.default_rng(1)
    depth = np.repeat(np.linspace(1, 5, 64, dtype=np.float32)[:, None], 64, axis=1)
    depth[0] = 0
    for _ in range(4):
        if form == "metric":
            break
        grey = np.asarray(Image.open(io.BytesIO(rooms._relative(rng, depth, form))), np.int32)
        nearest, farthest = grey[3:9].mean(), grey[-9:-3].mean()
        assert (nearest < farthest) == (form == "distance")
        assert grey.max() <= (65535 if form == "inverse 16" else 255)
        assert (grey[0] == 0).all() or (grey > 0).all()


def test_a_distance_is_asked_of_a_metric_map_alone() -> None:
    forms = Counter(
        sample.truth["depth_map"] == "metric"
        for sample in samples()
        for turn in sample.turns
        if turn.skill == "distance"
    )
    assert forms[True] > 5
    assert not forms[False]


def test_answers_follow_from_the_truth() -> None:
    for sample in samples():
        things = sample.truth["things"]
        assert things == sorted(things, key=lambda thing: thing["x"])
        for turn in sample.turns:
            assert turn.media
            assert set(turn.media) <= set(sample.files)
            low = f" {turn.answer.lower()} "
            assert turn.skill in ("name", "shape") or any(word in low for word in turn.accept)
            if turn.skill == "count":
                assert str(len(things)) in turn.accept
            if turn.skill == "nearer" and turn.choices == ("left", "right"):
                far = "far" in turn.question
                first_is_near = things[0]["near"] < things[1]["near"]
                assert turn.accept == ("left" if first_is_near != far else "right",)
            if turn.skill == "nearer" and turn.choices != ("yes", "no"):
                assert sum(any(w in c for w in turn.accept) for c in turn.choices) == 1


def test_neither_side_nor_order_tells_the_answer() -> None:
    assert rooms.make(np.random.default_rng(5), "train", use_models=False) == samples()[0]
    turns = [
        turn
        for sample in samples()
        for turn in sample.turns
        if turn.skill == "nearer" and len(turn.choices) == 2
    ]
    sides = Counter(t.accept[0] for t in turns if t.choices == ("left", "right"))
    yes = Counter(t.accept[0] for t in turns if t.choices == ("yes", "no"))
    first = [
        any(word in t.choices[0] for word in t.accept)
        for t in turns
        if t.choices[0] not in ("left", "yes") and t.choices[0] not in colours.COLOURS
    ]
    assert 0.35 < sides["left"] / sum(sides.values()) < 0.65
    assert 0.3 < yes["yes"] / sum(yes.values()) < 0.7
    assert 0.3 < np.mean(first) < 0.7


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_split_has_its_own_variants(split: Split) -> None:
    rng = np.random.default_rng(3)
    for _ in range(8):
        sample = rooms.make(rng, split, use_models=False)
        assert sample.split == split
        assert {split_of(thing["identity"]) for thing in sample.truth["things"]} == {split}

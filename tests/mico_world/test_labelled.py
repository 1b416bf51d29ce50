"""Photographs with names: each file of the table is found, and a sample shows what it names."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mico_chat.errors import ConfigError
from mico_world.pictures import labelled
from mico_world.sources import packages
from tests.mico_world.test_photographs import write_panorama


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A table of one photograph, 900 x 600, which is red and has a transparent corner."""
    image = Image.new("RGBA", (900, 600), "red")
    image.paste((0, 0, 0, 0), (0, 0, 9, 9))
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep" / "one.png")
    table = tmp_path / "photo_names.yaml"
    table.write_text("album:\n  deep/one.png: [city, sky]\n")
    monkeypatch.setattr(labelled, "TABLE", table)
    monkeypatch.setattr(labelled, "source", lambda name: tmp_path)
    monkeypatch.setattr(labelled, "split_of", lambda identity: "train")
    monkeypatch.setattr(labelled, "gloss", lambda name: f"gloss of a {name}")
    monkeypatch.setattr(labelled, "use", lambda name: "to live in")
    labelled.labelled.cache_clear()
    yield tmp_path
    labelled.labelled.cache_clear()


def test_a_sample_shows_and_names_the_photograph(album: Path) -> None:
    sample = labelled.make(np.random.default_rng(0), "train")
    turn, told, used, there = sample.turns
    assert sample.concepts == {"image.jpg": "city"}
    assert turn.accept == ("city", "sky")
    assert "city" in turn.answer
    assert told.skill == "gloss"
    assert "gloss of a city" in told.answer
    assert used.skill == "use"
    assert "used to live in" in used.answer
    assert there.accept == ("yes",)
    one, rng = labelled.labelled("train")["city"][0], np.random.default_rng(0)
    for turn in [labelled._presence(rng, one, ["city", "dog", "night sky"]) for _ in range(20)]:
        assert ("city" in turn.question) == (turn.accept == ("yes",)) != ("dog" in turn.question)
    assert sample.captions["image.jpg"][1] == "a photo of a city and a sky"
    image = Image.open(io.BytesIO(sample.files["image.jpg"]))
    assert 0.7 * 480 - 1 <= image.width <= 480
    assert np.asarray(image)[image.height // 2, image.width // 2, 0] > 240, "it is red"


def test_transparent_parts_are_white(album: Path) -> None:
    (one,) = labelled.labelled("train")["city"]
    assert one.image().getpixel((1, 1)) == (255, 255, 255)


def test_a_missing_file_is_named(album: Path) -> None:
    (album / "deep" / "one.png").unlink()
    (one,) = labelled.labelled("train")["city"]
    with pytest.raises(ConfigError, match=r"album has no deep/one\.png"):
        one.image()


def test_a_panorama_has_views_of_one_split_also_in_a_module(album: Path) -> None:
    path = album / "sky.exr"
    write_panorama(path, np.ones((64, 128, 3), np.float32))
    packed = base64.b64encode(path.read_bytes()).decode()
    (album / "sky.exr.js").write_text(f"export default 'data:application/exr;base64,{packed}'\n")
    labelled.TABLE.write_text("album:\n  sky.exr: [sky]\n  sky.exr.js: [cloud]\n")
    found = labelled.labelled("train")
    assert [one.view for one in found["sky"]] == list(range(6))
    assert found["sky"][2].image().size == (480, 360)
    assert found["sky"][2].image().tobytes() == found["cloud"][2].image().tobytes()


def test_every_package_of_the_table_can_be_fetched() -> None:
    named = [
        p
        for split in ("train", "validation")
        for of in labelled.labelled(split).values()
        for p in of
    ]
    assert {one.package for one in named} <= packages().keys()
    assert len(named) > 250

"""Photographs are found in packages, stored small, and told from drawings."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mico_world.sources import split_of
from mico_world.things import photographs
from mico_world.things.catalogue import PictureEntry


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package with an archive of four pictures, and an empty cache."""
    clear = noise(300, 300).convert("RGBA")
    clear.putalpha(7)
    pictures = {"wall1.png": noise(900, 700), "wall2.png": noise(300, 100), "wall3.png": clear}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, picture in {**pictures, "wall_sign.png": noise(300, 300)}.items():
            data = io.BytesIO()
            picture.save(data, "PNG")
            archive.writestr(f"textures/{name}", data.getvalue())
    monkeypatch.setattr(photographs, "source", lambda name: tmp_path)
    monkeypatch.setenv("MICO_CACHE_DIR", str(tmp_path / "cache"))
    photographs.photographs.cache_clear()
    yield tmp_path
    photographs.photographs.cache_clear()


def test_a_package_gives_its_fit_pictures_with_crops(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = package / "groups.yaml"
    table.write_text(
        "groups: [{source: paint, archive: all.zip, kind: surface, crops: 2,"
        " files: [textures/wall*], skip: [sign]}]"
    )
    groups = photographs.Groups.read(table)
    monkeypatch.setattr(photographs, "groups", lambda: groups)
    # The second picture is small, the third transparent, the fourth skipped.
    found = photographs.photographs()
    assert len(found) == 3
    split = split_of("paint/textures/wall1.png")
    view = found.view(np.random.default_rng(0), split, "surface", (120, 200))
    assert view.size == (200, 120)
    kept = found._found[split, "surface"]
    assert kept[0].image().size == (640, 498)
    assert all(max(one.image().size) < 640 for one in kept[1:])


def write_panorama(path: Path, light: NDArray[np.float32]) -> None:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("exr", rate=1)
        stream.height, stream.width = light.shape[:2]
        stream.pix_fmt = "gbrpf32le"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(light, format="gbrpf32le")))
        container.mux(stream.encode())


def test_a_panorama_gives_views_in_all_directions(tmp_path: Path) -> None:
    path = tmp_path / "sky.exr"
    light = np.ones((64, 128, 3), np.float32)
    light[32:] = 0.01  # the ground is dark
    light[10, 5:9] = np.inf  # the sun
    write_panorama(path, light)
    with path.open("rb") as panorama:
        views = [np.asarray(view).mean(axis=(1, 2)) for view in photographs.views(panorama)]
    assert len(views) == 6
    for rows in views:
        assert rows[:100].min() > 2 * rows[-100:].max()


def test_a_stamp_of_many_colours_is_a_photograph_and_a_flat_one_is_not() -> None:
    stamp = PictureEntry(Path("a.png"), "stamp/a", "dog")
    assert stamp.photograph(noise(80, 60))
    assert not stamp.photograph(Image.new("RGB", (80, 60), "red"))
    assert not stamp._replace(identity="emoji/a").photograph(noise(80, 60))

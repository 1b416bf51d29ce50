"""Depth and normals by tiny random models, and what their PNGs say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    DPTImageProcessor,
    GLPNConfig,
    ViTConfig,
)

from mico_chat.errors import ConfigError, MediaError, ModelError
from mico_chat.media import Depth, MediaFile, Normal, decode
from mico_chat.media.maps import encode_depth
from mico_chat.reading.depths import gives_metres
from mico_corpus.describing.base import Annotation
from tests.mico_corpus.clips import Scene
from tests.mico_corpus.describing.drawn import drawn, made, plain
from tests.support.depth_models import LAYERS, depth_model


def read(said: Annotation) -> Depth:
    found = decode(MediaFile("depth", said.data, "d.png"))
    assert isinstance(found, Depth)
    return found


def test_a_plane_at_two_metres_is_at_two_metres(tmp_path: Path) -> None:
    annotator = made("depth", model=depth_model(tmp_path / "flat", "metric", 4, flat=True))
    clips = [drawn(plain(9)), drawn(plain(1, 99, size=(20, 30))), drawn(plain(7))]
    found = annotator(clips)
    for clip, shape, (said,) in zip(clips, [(36, 48), (20, 30), (36, 48)], found, strict=True):
        depth = read(said)
        assert depth.metric
        assert depth.estimated == depth.report.estimated == "flat"
        assert depth.values.shape == shape
        np.testing.assert_allclose(depth.values, 2.0, atol=5e-4)
        assert (said.annotator, said.role, said.medium) == ("depth", "depth", "image")
        assert clip.asked == [(1, 448)]
    assert annotator.version.startswith("flat@")


def raw_output(folder: str, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    model = DepthAnythingForDepthEstimation.from_pretrained(folder)
    processor = DPTImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        found = model(**processor(images=picture, return_tensors="pt"))
    (one,) = processor.post_process_depth_estimation(found, [picture.shape[:2]])
    return np.asarray(one["predicted_depth"])


def test_inverse_depth_keeps_its_order_and_its_unit(tmp_path: Path) -> None:
    folder = depth_model(tmp_path / "relative", "relative")
    picture = Scene(3).frames(1, (48, 36))[0]
    ((said,),) = made("depth", model=folder)([drawn(picture[None])])
    depth = read(said)
    nearness = raw_output(folder, picture)
    assert nearness.min() > 0
    assert np.ptp(nearness) > 0.01
    assert (depth.metric, depth.estimated) == (False, "relative")
    np.testing.assert_allclose(depth.values, 1 - nearness / nearness.max(), atol=3e-5)
    assert depth.values.max() < 1, "the farthest point is not made the end of the world"


def test_a_clip_has_the_same_bytes_whoever_is_beside_it(tmp_path: Path) -> None:
    annotator = made("depth", model=depth_model(tmp_path / "m", "metric", 20))
    clips = [drawn(np.stack(Scene(n).frames(1, (48, 36)))) for n in range(3)]
    alone = [annotator([clip])[0] for clip in clips]
    assert annotator(clips) == alone
    assert len({said.data for (said,) in alone}) == 3
    together = made("depth", model=str(tmp_path / "m"), at_once=2)
    for (one,), (other,) in zip(alone, together(clips), strict=True):
        np.testing.assert_allclose(read(one).values, read(other).values, atol=2e-3)
    assert together.version == annotator.version


def test_who_gives_metres(tmp_path: Path) -> None:
    assert gives_metres(DepthAnythingConfig(depth_estimation_type="metric", max_depth=20))
    assert not gives_metres(DepthAnythingConfig())
    assert gives_metres(GLPNConfig())
    with pytest.raises(ConfigError, match=r"'vit' does not say whether .*: set metric to true or"):
        gives_metres(ViTConfig())
    folder = depth_model(tmp_path / "m", "relative")
    said = made("depth", model=folder, metric=True)([drawn(plain(9))])[0][0]
    assert read(said).metric


def test_what_is_no_depth_model(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="is of the type 'vit', which AutoModelForDepthEst"):
        made("depth", model=str(tmp_path / "vit"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"^depth: .*empty cannot be loaded: .*config.json"):
        made("depth", model=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        made("depth", model=str(tmp_path / "vit"), dtype="int3")


def test_a_broken_clip_is_a_media_error(tmp_path: Path) -> None:
    annotator = made("depth", model=depth_model(tmp_path / "m", "metric", 4))
    with pytest.raises(MediaError, match=r"^x: no frame"):
        annotator([drawn(id="x")])


def with_depth(metres: NDArray[Any], unit: Any = "metre") -> Annotation:
    return Annotation("depth", "1", "depth", "image", data=encode_depth(metres, unit))


def normals(metres: NDArray[Any], **options: Any) -> NDArray[np.float64]:
    ((said,),) = made("normal", **options)([drawn(said=[with_depth(metres)])])
    assert (said.role, said.medium) == ("normal", "image")
    found = decode(MediaFile("normal", said.data, "n.png"))
    assert isinstance(found, Normal)
    return found.pixels / 127.5 - 1


def test_normals_follow_from_metric_depth() -> None:
    height, width, fov = 30, 40, 60.0
    wall = normals(np.full((height, width), 3.0))
    np.testing.assert_allclose(wall, np.broadcast_to([0, 0, 1], wall.shape), atol=0.02)
    focal = width / (2 * np.tan(np.radians(fov) / 2))
    across = (np.arange(width) + 0.5 - width / 2) / focal
    down = (np.arange(height) + 0.5 - height / 2)[:, None] / focal
    # A wall that recedes to the right, z = 4 + x: its normal points right and to the viewer.
    right = normals(np.broadcast_to(4 / (1 - across), (height, width)), fov=fov)
    np.testing.assert_allclose(right.mean((0, 1)), np.array([1, 0, 1]) / np.sqrt(2), atol=0.03)
    # A floor, which recedes upwards in the picture, z = 4 - y: its normal points up.
    floor = normals(np.broadcast_to(4 / (1 + down), (height, width)), fov=fov)
    np.testing.assert_allclose(floor.mean((0, 1)), np.array([0, 1, 1]) / np.sqrt(2), atol=0.03)


def test_a_hole_has_no_normal_and_relative_depth_none_at_all() -> None:
    metres = np.full((12, 12), 3.0)
    metres[4:8, 4:8] = np.nan
    assert (normals(metres)[5, 5] == -1).all()
    with pytest.raises(ConfigError, match="'depth' gives relative depth, from which no normals"):
        made("normal")([drawn(said=[with_depth(metres, "inverse")])])
    assert made("normal")([drawn()]) == [[]]
    with pytest.raises(ConfigError, match="fov: expected 5 to 170 degrees, got 180"):
        made("normal", fov=180)


def test_normals_by_a_model(tmp_path: Path) -> None:
    from transformers import Tipsv2DptConfig, Tipsv2DptForNormalEstimation, Tipsv2DptImageProcessor
    from transformers.models.tipsv2 import Tipsv2VisionConfig

    torch.manual_seed(0)
    backbone = Tipsv2VisionConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        apply_layernorm=True,
        reshape_hidden_states=False,
        **LAYERS,
    )
    config = Tipsv2DptConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8
    )
    Tipsv2DptForNormalEstimation(config).save_pretrained(tmp_path / "tips")
    processor = Tipsv2DptImageProcessor(size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "tips")
    clip = drawn(np.stack(Scene(3).frames(1, (48, 36))))
    found = [
        decode(
            MediaFile(
                "normal",
                made("normal", model=str(tmp_path / "tips"), opencv=opencv)([clip])[0][0].data,
            )
        )
        for opencv in (False, True)
    ]
    plain_axes, opencv_axes = (one.pixels / 127.5 - 1 for one in found if isinstance(one, Normal))
    assert plain_axes.shape == (36, 48, 3)
    np.testing.assert_allclose(np.linalg.norm(plain_axes, axis=-1), 1, atol=0.03)
    np.testing.assert_allclose(opencv_axes, plain_axes * (1, -1, -1), atol=0.02)


def test_the_small_network_sees_what_is_near() -> None:
    """A box on a floor, before a wall: the floor is nearer below, and the box than the wall."""
    room = np.full((120, 160, 3), 120, np.uint8)
    room[70:] = np.linspace(90, 60, 50)[:, None, None]
    room[50:100, 60:100] = (170, 60, 40)
    annotator = made("depth")
    ((said,),) = annotator([drawn(room[None])])
    depth = read(said)
    assert (depth.metric, depth.estimated, depth.values.shape) == (False, "mini-depth", (120, 160))
    box = depth.values[52:68, 65:95].mean()
    assert box < depth.values[10:40].mean()
    assert depth.values[112:].mean() < box
    beside = depth.values[52:68, 5:35].mean()  # a map of any room would have the same there
    assert box < 0.95 * beside
    assert annotator.version.startswith("mini-depth@")

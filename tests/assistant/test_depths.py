"""Estimated depth maps: behind their pictures, marked, computed once, and never beside others."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import ViTConfig, ViTImageProcessor

from mico_chat.adapters.pictures import as_picture
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MediaError, MicoError, RequestError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Depth, Image, MediaDecoder, MediaFile, MediaLimits, decode
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message
from mico_chat.model.mini.depth import load_depth_net
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.reading import depths
from mico_chat.reading.depths import DepthEstimator, SmallDepth, depth_estimator
from tests.assistant.test_assistant import tiny_assistant
from tests.server.support import sent
from tests.support.depth_models import depth_model
from tests.support.tiny import chat_model, run

ASKED = GenerationOptions(max_tokens=4)
PHOTO = MediaFile("image", sent.png(sent.square()), "photo.png")


class Wall:
    """Sees a wall that runs away to the right, from 1 to 4 metres; counts the pictures."""

    name = "a wall!"

    def __init__(self, unit: Literal["metre", "inverse"] = "metre") -> None:
        self.unit: Literal["metre", "inverse"] = unit
        self.seen: list[tuple[int, ...]] = []

    def __call__(
        self, pictures: Sequence[NDArray[np.uint8]]
    ) -> Iterator[tuple[int, NDArray[np.floating]]]:
        for place, picture in enumerate(pictures):
            self.seen.append(picture.shape)
            far = np.tile(np.linspace(1, 4, picture.shape[1]), (picture.shape[0], 1))
            yield place, far if self.unit == "metre" else 1 / far


class Nothing(Wall):
    def __call__(self, pictures: Any) -> Iterator[tuple[int, NDArray[np.floating]]]:
        return ((place, np.full((4, 4), np.nan)) for place, _ in enumerate(pictures))


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def assistant(processor: MicoChatProcessor, wall: Wall) -> Iterator[Assistant]:
    with (
        MediaDecoder(MediaLimits(), workers=1) as decoder,
        closing(
            tiny_assistant(chat_model(), processor, decoder=decoder, depths=DepthEstimator(wall))
        ) as assistant,
    ):
        yield assistant


def kinds(messages: Sequence[Message]) -> list[list[Kind]]:
    return [[medium.kind for medium in message.media] for message in messages]


async def with_depth(
    assistant: Assistant, messages: Sequence[Message], tenant: str = ""
) -> Sequence[Message]:
    asked = Ask(messages, GenerationOptions(estimate_depth=True), tenant)
    return (await assistant.shown(asked)).messages


def test_a_map_stands_behind_its_picture_and_says_what_it_is(assistant: Assistant) -> None:
    plain = [Message.user("Here: ", PHOTO, "How far?")]
    deep = run(with_depth(assistant, plain))
    picture, depth = deep[0].media
    assert [getattr(part, "text", None) for part in deep[0].content] == [
        *("Here: ", None, None, "How far?")
    ]
    assert (picture, depth.name) == (PHOTO, "depth of photo.png.png")
    answer = run(assistant.answer(Ask(deep, ASKED)))
    before, after = answer.media
    assert (before.kind, before.estimated, before.metric) == ("image", None, None)
    assert (after.kind, after.estimated, after.metric) == ("depth", "a_wall_", True)
    assert after.name == depth.name
    counted = run(assistant.estimate(Ask(deep, ASKED)))
    assert counted.prompt_tokens == answer.usage.prompt_tokens
    assert counted.media_tokens == answer.usage.media_tokens
    assert counted.media_tokens == sum(one.tokens or 0 for one in answer.media)
    assert [one.estimated for one in counted.media] == [None, "a_wall_"]
    explained = run(assistant.explain(Ask(deep), answer.text or "far"))
    assert len(explained.media) == 2


def test_the_prompt_says_that_it_is_estimated(assistant: Assistant) -> None:
    given = MediaFile("depth", sent.depth(), "given.png")

    def prompt(message: Message) -> str:
        asked, _ = run(assistant.prepare(Ask([message])))
        tokens = [part for part in asked.segments if isinstance(part, tuple)]
        letters = (assistant.adapter.tokenizer.convert_ids_to_tokens(part) for part in tokens)
        return "".join("".join(part) for part in letters)

    estimated = prompt(run(with_depth(assistant, [Message.user(PHOTO, "Far?")]))[0])
    assert "Estimated depth map: " in estimated
    assert "Estimated" not in prompt(Message.user(PHOTO, given, "Far?"))


@pytest.mark.parametrize(
    ("unit", "words"), [("metre", "estimated by a_wall_, as"), ("inverse", "without a unit, as")]
)
def test_other_models_get_a_legend(unit: Literal["metre", "inverse"], words: str) -> None:
    data = DepthEstimator(Wall(unit)).estimate(Image(sent.square()))
    depth = decode(MediaFile("depth", data))
    assert isinstance(depth, Depth)
    _, legend = as_picture(depth)
    assert words in legend
    assert ("(1 m)" in legend) == depth.metric == (unit == "metre")
    assert np.nanmean(depth.values[:, :9]) < np.nanmean(depth.values[:, -9:]), "left is nearer"


def test_which_pictures_get_one(assistant: Assistant, wall: Wall) -> None:
    depth = MediaFile("depth", sent.depth(), "measured.png")
    clip = MediaFile("video", sent.mp4(), "clip.mp4")
    normal = MediaFile("normal", sent.normal(), "wall.png")
    messages = [
        Message.system("Be brief."),
        Message.user(PHOTO, depth, "With a map of its own"),
        Message.user(clip, normal, "No picture"),
        Message.assistant("Well."),
        Message.user(PHOTO, clip, PHOTO, "Two"),
    ]
    found = run(with_depth(assistant, messages))
    two: list[Kind] = ["image", "depth", "video", "image", "depth"]
    assert kinds(found) == [[], ["image", "depth"], ["video", "normal"], [], two]
    assert found[1] == messages[1]
    assert len(wall.seen) == 1, "one picture, shown twice"
    assert kinds(run(with_depth(assistant, found))) == kinds(found), "not one more"


def test_a_picture_is_estimated_once_for_each_tenant(assistant: Assistant, wall: Wall) -> None:
    for tenant, seen in (("a", 1), ("a", 1), ("b", 2), ("a", 2)):
        asked = run(with_depth(assistant, [Message.user(PHOTO, "Far?")], tenant))
        answer = run(assistant.answer(Ask(asked, ASKED, tenant)))
        assert len(wall.seen) == seen
    assert [report.cached for report in answer.media] == [True, True]
    array = Image(sent.square())  # decoded already, as the command line has it
    run(with_depth(assistant, [Message.user(array, "Far?")]))
    assert wall.seen == [(518, 518, 3)] * 3


def test_pictures_without_an_estimate(assistant: Assistant) -> None:
    def error(picture: MediaFile) -> str:
        with pytest.raises(MediaError) as found:
            run(with_depth(assistant, [Message.user(picture, "Far?")]))
        return str(found.value)

    line = np.zeros((2, 5000, 3), np.uint8)
    assert error(MediaFile("image", sent.png(line), "line.png")).startswith(
        "line.png: no depth can be estimated: its longer side may be at most 10 times"
    )
    assert "damaged" in error(MediaFile("image", sent.png(line)[:60], "broken.png"))
    assistant.encoder.depths = DepthEstimator(Nothing())
    assert error(MediaFile("image", sent.png(line[:, :4]), "x.png")).endswith("a wall! sees none")
    assistant.encoder.depths = None
    assert assistant.depth_model is None
    with pytest.raises(RequestError, match=r"^estimate_depth: .* MICO_DEPTH_MODEL to mini"):
        run(with_depth(assistant, [Message.user("No picture")]))


@pytest.mark.parametrize("size", [(1, 1), (3, 20), (20, 3), (700, 900)])
def test_pictures_of_any_size(size: tuple[int, int], tmp_path: Path) -> None:
    picture = Image(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    for model in ("mini", depth_model(tmp_path / "m", "metric", 20)):
        depth = decode(MediaFile("depth", depth_estimator(model).estimate(picture)))
        assert isinstance(depth, Depth)
        assert max(depth.values.shape) == 518
        assert depth.values.shape[0] / depth.values.shape[1] == pytest.approx(
            size[0] / size[1], rel=0.02
        )


def test_metres_stay_metres_and_the_small_one_gives_none(tmp_path: Path) -> None:
    picture = Image(sent.square())

    def seen(model: str) -> Depth:
        estimator = depth_estimator(model)
        assert depth_estimator(model) is estimator, "loaded once"
        found = decode(MediaFile("depth", estimator.estimate(picture)))
        assert isinstance(found, Depth)
        return found

    flat = seen(depth_model(tmp_path / "flat", "metric", 4, flat=True))
    assert (flat.metric, flat.estimated) == (True, "flat")
    np.testing.assert_allclose(flat.values, 2.0, atol=1e-3)
    relative = seen(depth_model(tmp_path / "some", "relative"))
    assert (relative.metric, relative.estimated) == (False, "some")
    small = seen("mini")
    assert (small.metric, small.estimated) == (False, "mini-depth")
    assert np.ptp(small.values) > 0.1


def test_the_small_network_is_offered_and_loaded_for_the_first_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[Path] = []

    def counted(folder: Path) -> Any:
        loads.append(folder)
        return load_depth_net(folder)

    monkeypatch.setattr(depths, "load_depth_net", counted)
    name = depths.offered(["image", "depth"])
    assert name == "mini"
    assert depths.offered(["image"]) is None, "a model that reads no depth map"
    estimator = DepthEstimator(SmallDepth())
    assert (estimator.name, loads) == ("mini-depth", [])
    for _ in range(2):
        estimator.estimate(Image(sent.square()))
    assert len(loads) == 1
    monkeypatch.setattr(depths, "named_folder", lambda name: (name, tmp_path))
    assert depths.offered(["image", "depth"]) is None, "it is not there"


def test_models_that_cannot_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ViTConfig().save_pretrained(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    good = depth_model(tmp_path / "good", "metric", 4)
    for name in ("torn", "mapless"):
        shutil.copytree(good, tmp_path / name)
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "mapless")
    for name, reason in (
        ("minni", "no model 'minni'.* did you mean mini"),
        (str(tmp_path / "nowhere"), "there is no such folder"),
        (str(tmp_path / "empty"), "no config.json"),
        (str(tmp_path / "vit"), "is of the type 'vit', which AutoModelForDepthEst"),
        (str(tmp_path / "torn"), "torn cannot be loaded: "),
        (str(tmp_path / "mapless"), "mapless cannot estimate depth: .*post_process_depth"),
        ("nobody/nothing", "nobody/nothing cannot be loaded: "),
        ("a/b/c", "there is no such folder"),
    ):
        with pytest.raises(MicoError, match=rf"^depth \(MICO_DEPTH_MODEL\): .*{reason}") as found:
            depth_estimator(name)
        assert "\n" not in str(found.value)
        assert "mini" in str(found.value)
    with MediaDecoder(MediaLimits(), workers=1) as decoder:
        options = EngineOptions(depth_model="minni")
        with pytest.raises(MicoError, match="MICO_DEPTH_MODEL"):
            load_assistant("no-such-model-either", decoder, options)

"""How finely pictures and clips are shown: as the model's own processor does, within a budget of
tokens, and as a request asks; what cannot be done is refused."""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers.video_utils import VideoMetadata

from mico_chat.adapters.processor import ProcessorAdapter
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.errors import ConfigError, RequestError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.file import MediaLimits
from mico_chat.media.medium import Image, MediaReport, Medium, Video
from mico_chat.media.view import View
from mico_chat.media.worker import decode
from mico_chat.messages import Message, from_openai, to_openai
from mico_chat.options import GenerationOptions
from tests.support import replicas
from tests.support.made import write_clip
from tests.support.tiny import run, saved

A4 = (1240, 1754)
"""A page at 150 dots an inch."""


class HereDecoder:
    """Decodes in this process, within ``limits``."""

    limits = MediaLimits()

    def decode(self, file: MediaFile) -> Medium:
        return decode(file, self.limits)


def png(width: int, height: int, seed: int = 0) -> bytes:
    drawn = np.full((height, width, 3), 40 * seed, np.uint8)
    drawn[: height // 2, seed::7] = 250
    file = io.BytesIO()
    PIL.Image.fromarray(drawn).save(file, "PNG", compress_level=1)
    return file.getvalue()


def page(width: int, height: int, detail: Any = "auto", seed: int = 0) -> MediaFile:
    return MediaFile("image", png(width, height, seed), "page.png", view=View(detail))


def clip(seconds: int = 6, **view: Any) -> MediaFile:
    file = io.BytesIO()
    write_clip(file, "mpeg4", container_format="mp4", n=20 * seconds)
    return MediaFile("video", file.getvalue(), "clip.mp4", view=View(**view))


def load(folder: Path, **options: Any) -> Any:
    return closing(load_assistant(folder, HereDecoder(), EngineOptions(dtype="float32", **options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.build("qwen2_5_vl", tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def qwen(folder: Path) -> Iterator[Assistant]:
    with load(folder) as assistant:
        yield assistant


def reports(assistant: Assistant, *media: MediaFile | Image, **options: Any) -> list[MediaReport]:
    asked = Ask([Message.user(*media, "What?")], GenerationOptions.of(options))
    return list(run(assistant.estimate(asked)).media)


def tokens(assistant: Assistant, *media: MediaFile | Image, **options: Any) -> list[int]:
    return [report.tokens or 0 for report in reports(assistant, *media, **options)]


def own(folder: Path, *sizes: tuple[int, int], **settings: Any) -> int:
    """The tokens of the library's own prompt with pictures of these sizes."""
    pictures = [{"type": "image", "image": PIL.Image.new("RGB", size)} for size in sizes]
    processor = replicas.load(folder)[1]
    given = replicas.inputs(processor, [replicas.user(*pictures, "What?")], **settings)
    return int(given["input_ids"].shape[1])


CLIPPED: tuple[str, ...]
CLIPPED = ("smolvlm", "minicpmv4_6", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
CLIPPED += ("ernie4_5_vl_moe", "kimi_k25", "molmo2", "glm4v", "internvl")


@pytest.fixture(scope="module")
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder() as decoder:
        yield decoder


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # MiniCPM-V's and InternVL's
@pytest.mark.parametrize("name", CLIPPED)
def test_a_clip_has_the_frames_that_the_models_own_processor_takes(
    name: str, tmp_path: Path, decoder: MediaDecoder
) -> None:
    """Of several lengths and rates; and the processor writes the times of these frames."""
    model, processor = replicas.load(replicas.build(name, tmp_path))
    adapter = TransformersAdapter(model, processor, name)
    part = processor.video_processor
    if name == "smolvlm":  # as published
        part.num_frames, part.fps = 64, 1
    given: dict[str, Any] = {"do_sample_frames": True}
    if not part.do_sample_frames and not part.num_frames:
        given |= {"num_frames": 32} if name == "internvl" else {"fps": 2}
    for n, rate in ((45, 10), (40, 20), (130, 25), (301, Fraction(30_000, 1_001))):
        file = io.BytesIO()
        write_clip(file, "mpeg4", container_format="mp4", n=n, fps=rate)
        medium = MediaFile("video", file.getvalue(), "clip.mp4")
        whole = decoder.decode(replace(medium, view=View(num_frames=n, pixels=10**7)))
        seen = replace(medium, view=adapter.viewed("video", View(tokens=100_000)))
        taken = replace(decoder.decode(seen), view=seen.view)
        assert isinstance(whole, Video)
        assert isinstance(taken, Video)
        about = VideoMetadata(n, fps=float(rate), duration=float(n / rate), width=64, height=48)
        clips: Any = {"videos": [whole.frames], "video_metadata": [about], **given}
        sampled = part(return_metadata=True, return_tensors="pt", **clips)["video_metadata"][0]
        numbers = sorted({int(one) for one in sampled.frames_indices})
        assert taken.times == pytest.approx(whole.times[numbers])
        if name == "kimi_k25" and isinstance(rate, Fraction):
            continue  # it cuts times off to milliseconds, as the last bit of a rate decides
        text = adapter._alone("video", 1)
        right = processor(text=[text], return_tensors="pt", **clips)
        assert adapter._processed(text, [taken], {})["input_ids"].equal(right["input_ids"])
    two = decoder.decode(replace(seen, view=replace(seen.view, num_frames=2)))
    assert two.report.frames_used == 2, "a request's number counts"


def answered(assistant: Assistant, *messages: Message, **options: Any) -> tuple[Any, str]:
    """The reports of an answer's media, and its text."""
    wanted = GenerationOptions.of({"max_tokens": 4, **options})
    answer = run(assistant.answer(Ask(messages, wanted)))
    return answer.media, answer.text


@pytest.mark.parametrize("size", [A4, (3000, 600), (200, 100)])
def test_a_page_has_the_tokens_of_the_models_own_processor(
    folder: Path, qwen: Assistant, size: tuple[int, int]
) -> None:
    found = run(qwen.estimate(Ask([Message.user(page(*size), "What?")])))
    assert (found.prompt_tokens, found.media[0].cut) == (own(folder, size), [])
    assert size != A4 or found.media_tokens > 2772


def test_a_small_budget_makes_fewer_and_several_pictures_share_it(folder: Path) -> None:
    with load(folder, media_token_budget=0.125) as assistant:  # 4,096 tokens
        (one,) = reports(assistant, page(*A4))
        several = reports(assistant, *(page(*A4, seed=n) for n in range(3)), page(56, 56))
        high = tokens(assistant, page(*A4, "high"))
    assert (one.tokens or 0) > 2772
    assert not one.cut
    assert all(900 < (report.tokens or 0) <= 1024 for report in several[:3])
    assert several[3].tokens == 6, "a small one is not cut"
    assert several[0].cut[-1].startswith("scaled down from ")
    assert high == [one.tokens]
    with pytest.raises(ConfigError, match=r"media_token_budget: expected a share .* got 2"):
        EngineOptions(media_token_budget=2)


def test_detail_acts_and_is_kept_apart_in_a_second_turn(qwen: Assistant) -> None:
    first = Message.user(page(600, 800), "What?")
    (low,), _ = answered(qwen, Message.user(page(600, 800, "low"), "What?"))
    (auto,), _ = answered(qwen, first)
    assert low.tokens <= 258 < auto.tokens
    later = [first, Message.assistant("A page."), Message.user(page(600, 800, "low"), "And now?")]
    (again, other), _ = answered(qwen, *later)
    assert (again.tokens, again.cached) == (auto.tokens, True)
    assert (other.tokens, other.cached) == (low.tokens, True)


def test_a_picture_of_which_nothing_was_cut_stays_in_the_cache_beside_others(
    qwen: Assistant,
) -> None:
    answered(qwen, Message.user(page(300, 400, seed=5), "What?"))
    (first, *_), _ = answered(
        qwen, Message.user(*(page(300, 400, seed=n) for n in (5, 1, 2)), "What?")
    )
    assert first.cached


def test_the_frames_of_a_clip(qwen: Assistant) -> None:
    def frames(file: MediaFile, **options: Any) -> int | None:
        return reports(qwen, file, **options)[0].frames_used

    assert frames(clip()) == 12, "two a second"
    assert frames(clip(fps=1)) == 6
    assert frames(clip(num_frames=40)) == 40
    assert frames(clip(fps=1, num_frames=3)) == 3
    assert frames(clip(), media_io_kwargs={"video": {"fps": 0.5}}) == 3
    assert frames(clip(), mm_processor_kwargs={"fps": 2, "do_sample_frames": True}) == 12
    assert frames(clip(fps=1), media_io_kwargs={"video": {"num_frames": 5}}) == 6, "its own counts"
    (few,), _ = answered(qwen, Message.user(clip(fps=1), "What?"))
    (more,), _ = answered(qwen, Message.user(clip(fps=2), "What?"))
    (again,), _ = answered(qwen, Message.user(clip(fps=1), "What?"))
    assert (few.cached, more.cached, again.cached) == (False, False, True)
    assert few.tokens == again.tokens < more.tokens


def test_a_limit_that_somebody_set_holds(
    qwen: Assistant, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HereDecoder, "limits", MediaLimits(max_frames=5, max_side=300))
    assert reports(qwen, clip(7))[0].frames_used == 5
    assert reports(qwen, page(*A4, seed=6))[0].cut[0].endswith("to 212 x 300 pixels")
    with pytest.raises(RequestError, match=r"7 frames of a clip.*limit of 5 \(max_frames"):
        reports(qwen, clip(7, num_frames=7))


def test_settings_of_the_processor_act_on_a_batch_of_different_sizes(
    folder: Path, qwen: Assistant
) -> None:
    size = {"longest_edge": 400 * 784}
    sizes = (A4, (500, 900), (90, 60))
    found = [answered(qwen, Message.user(page(*one), "What?"), mm_processor_kwargs={"size": size})
             for one in sizes]  # fmt: skip
    assert [one[0][0].tokens <= 402 for one in found] == [True] * 3
    for one in sizes:
        asked = Ask(
            [Message.user(page(*one), "What?")],
            GenerationOptions.of({"mm_processor_kwargs": {"max_pixels": 400 * 784}}),
        )
        bounds = {"shortest_edge": 4 * 784, **size}
        assert run(qwen.estimate(asked)).prompt_tokens == own(folder, one, size=bounds)

    options = GenerationOptions.of({"max_tokens": 4, "mm_processor_kwargs": {"size": size}})
    batch = [[Message.user(page(*one), "What?")] for one in sizes]
    together = qwen.try_all(batch, options, tenant="b")
    assert [one.text for one in together if isinstance(one, Answer)] == [one[1] for one in found]
    decoded = Image(np.zeros((1754, 1240, 3), np.uint8))
    (limited,) = tokens(qwen, decoded, mm_processor_kwargs={"size": size})
    assert limited <= 402, "of a picture that is decoded, too"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mm_processor_kwargs": {"patch_size": 7}}, "takes max_pixels, .*min_pixels.* size"),
        ({"mm_processor_kwargs": {"max_pixels": 10**12}}, "at most 12845056, got 1000000000000"),
        ({"mm_processor_kwargs": {"min_pixels": "big"}}, "expected a number above 0"),
        ({"mm_processor_kwargs": {"size": {"height": 5}}}, "some of longest_edge, shortest_edge"),
        ({"mm_processor_kwargs": {"size": {"longest_edge": 10**10}}}, "size.longest_edge: .*most"),
        ({"mm_processor_kwargs": {"do_sample_frames": False}}, "do_sample_frames: .* takes"),
        ({"mm_processor_kwargs": {"fps": -1}}, "mm_processor_kwargs.fps: expected a number"),
        ({"media_io_kwargs": {"image": {"mode": "L"}}}, "known are video.fps and video.num_frames"),
        ({"media_io_kwargs": {"video": {"fps": True}}}, "media_io_kwargs.video.fps: expected"),
        ({"media_io_kwargs": {"video": {"num_frames": 1.5}}}, "num_frames: expected a number"),
    ],
)
def test_what_cannot_be_done_is_refused(
    qwen: Assistant, options: dict[str, Any], reason: str
) -> None:
    for media in ((page(60, 60),), (clip(1),), ()):
        with pytest.raises(RequestError, match=reason):
            reports(qwen, *media, **options)


def of_part(kind: str, **given: Any) -> dict[str, Any]:
    (message,) = to_openai([Message.user(MediaFile("image", png(60, 60)), "What?")])
    url = message["content"][0]["image_url"]["url"]
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url, **given}}


def test_what_a_part_of_a_message_says() -> None:
    def view(part: dict[str, Any]) -> View:
        (medium,) = from_openai([{"role": "user", "content": [part]}])[0].media
        return medium.view

    assert view(of_part("image")) == view(of_part("image", detail=None)) == View()
    assert view(of_part("image", detail="high")) == View("high")
    assert view(of_part("video", fps=2, num_frames=9)) == View(fps=2, num_frames=9)
    assert view({**of_part("video"), "fps": 0.5}) == View(fps=0.5), "beside the URL, too"
    for part, reason in (
        (of_part("image", detail="fine"), "detail: .*auto, low, high"),
        (of_part("image", fps=2), r"image_url.fps: only a clip has frames"),
        (of_part("audio", detail="low"), "audio_url.detail"),
        (of_part("video", num_frames=0), "video_url.num_frames: expected a number above 0"),
        (of_part("video", num_frames=10**6), "at most 1024, got 1000000"),
    ):
        with pytest.raises(RequestError, match=reason):
            view(part)


@pytest.mark.parametrize("name", ["smolvlm", "gemma4"])
def test_a_processor_with_knobs_of_its_own(tmp_path: Path, name: str) -> None:
    knobs: dict[str, dict[str, Any]] = {"smolvlm": {"do_image_splitting": False}}
    knob = knobs.get(name, {"max_soft_tokens": 140})
    with load(replicas.build(name, tmp_path / name)) as assistant:
        adapter = assistant.adapter
        assert isinstance(adapter, ProcessorAdapter)
        assert knob.keys() <= adapter._knobs("image").keys()
        (usual,) = tokens(assistant, page(600, 800))
        (report,), _ = answered(
            assistant, Message.user(page(600, 800), "What?"), mm_processor_kwargs=knob
        )
    assert report.tokens < usual if name == "smolvlm" else report.tokens > usual


def test_a_model_of_one_size_takes_each_detail_and_no_settings(tmp_path: Path) -> None:
    with load(saved(tmp_path / "own")) as assistant:
        counts = {tuple(tokens(assistant, page(600, 800, detail))) for detail in
                  ("auto", "low", "high")}  # fmt: skip
        assert len(counts) == 1
        assert reports(assistant, clip())[0].frames_used == 8
        assert reports(assistant, clip(num_frames=3))[0].frames_used == 3
        with pytest.raises(RequestError, match="32 frames of a clip, more than the limit of 8"):
            reports(assistant, clip(num_frames=32))
        with pytest.raises(RequestError, match=r"mm_processor_kwargs\.size: .*none; leave it out"):
            reports(assistant, page(60, 60), mm_processor_kwargs={"size": 4})

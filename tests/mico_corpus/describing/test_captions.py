"""Captions by any model: what it is shown, which answers count, and who is named."""

import base64
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from scipy.io import wavfile

from mico_chat.errors import ConfigError, MediaError, ModelError
from mico_corpus.describing.asking import ModelAtUrl
from mico_corpus.describing.base import Annotation, Clip
from tests.evaluation.models.openai_endpoint import answering, body, parts, text
from tests.mico_corpus.clips import Scene, make_video
from tests.mico_corpus.describing.drawn import drawn, made, plain

URL = "http://127.0.0.1:9/v1"
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)).astype(np.float32)


def captions(answer: Any, clips: Any, **options: Any) -> tuple[list[list[Annotation]], list[Any]]:
    """What a model behind a URL says of clips, and the requests it got."""
    with (
        answering(answer) as (url, requests),
        closing(made("caption", url=url, model="m", **options)) as one,
    ):
        return one(clips), requests


def grey(part: dict[str, Any]) -> int:
    """The grey of the picture in a part, which a JPEG changes a little."""
    data = part["image_url"]["url"].partition(";base64,")[2]
    return int(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data)))).mean())


def test_a_clip_is_shown_as_frames_in_order() -> None:
    clip = drawn(plain(20, 90, 160, 230))
    ((said,),), (request,) = captions(
        lambda _: (200, ' "A wall gets\n brighter." '), [clip], frames=4
    )
    assert (said.annotator, said.role, said.medium) == ("caption", "caption", "video")
    assert said.text == "A wall gets brighter."
    assert np.isnan(said.score)
    *frames, question = parts(request)
    assert [grey(frame) for frame in frames] == pytest.approx([20, 90, 160, 230], abs=3)
    assert "one video clip" in question["text"]
    assert clip.asked == [(4, 448)]


def test_the_middle_frame_and_the_sound() -> None:
    clip = drawn(plain(0, 128, 250), TONE)
    _, (request,) = captions(
        lambda _: (200, "Grey."), [clip], medium="image", side=100, prompt="Hm?"
    )
    picture, question = parts(request)
    assert grey(picture) == pytest.approx(128, abs=3)
    assert question["text"] == "Hm?"
    ((said,),), (request,) = captions(lambda _: (200, "A tone."), [clip], medium="audio")
    assert (said.medium, said.text) == ("audio", "A tone.")
    sound = parts(request)[0]["input_audio"]
    rate, samples = wavfile.read(io.BytesIO(base64.b64decode(sound["data"])))
    assert (sound["format"], rate, len(samples)) == ("wav", 16_000, 16_000)


def test_several_media_by_one_model() -> None:
    clips = [drawn(plain(0, 128, 250)), drawn(plain(5), TONE)]
    prompts = {"image": "Look.", "audio": "Listen."}
    found, requests = captions(
        lambda request: (200, f"To {text(request)}"),
        clips,
        medium=["image", "audio", "video"],
        prompt=prompts,
        at_once=1,
    )
    assert [[one.medium for one in said] for said in found] == [
        ["image", "video"],
        ["image", "audio", "video"],
    ]
    assert [one.text for one in found[1][:2]] == ["To Look.", "To Listen."]
    assert "one video clip" in found[0][1].text
    assert len(requests) == 5


def test_many_clips_are_asked_at_once_and_answers_come_to_their_clips() -> None:
    clips = [drawn(plain(10 * n)) for n in range(20)]

    def answer(request: dict[str, Any]) -> tuple[int, str]:
        return 200, f"Grey {round(grey(parts(request)[0]) / 10)}."

    found, _ = captions(answer, clips, medium="image", at_once=5)
    assert [said.text for (said,) in found] == [f"Grey {n}." for n in range(20)]


@pytest.mark.parametrize(
    ("status", "said"), [(200, ""), (200, '""'), (200, "I'm sorry, but I can't help."), (400, "no")]
)
def test_no_answer_is_no_annotation(status: int, said: str) -> None:
    found, _ = captions(lambda _: (status, said), [drawn(plain(0))])
    assert found == [[]]


@pytest.mark.parametrize(
    ("said", "kept"), [("A cat. It slee", ["A cat."]), ("A cat that sle", []), ("At 3.5 m a c", [])]
)
def test_an_answer_that_was_cut_loses_its_last_sentence(said: str, kept: list[str]) -> None:
    whole = json.dumps(body(200, said, "length")).encode()
    found, _ = captions(lambda _: (200, whole), [drawn(plain(0))])
    assert [one.text for one in found[0]] == kept


def test_the_confidence_is_the_score_and_a_low_one_is_left_out() -> None:
    said = body(200, "A cat.")
    said["choices"][0]["confidence"] = 0.25
    answer = (200, json.dumps(said).encode())
    ((one,),), _ = captions(lambda _: answer, [drawn(plain(0))])
    assert one.score == 0.25
    assert captions(lambda _: answer, [drawn(plain(0))], least=0.3)[0] == [[]]


def test_clips_without_the_medium_have_no_annotation_and_broken_ones_an_error() -> None:
    found, requests = captions(
        lambda _: (200, "A tone."), [drawn(), drawn(None, TONE)], medium="audio"
    )
    assert [len(of_one) for of_one in found] == [0, 1]
    assert len(requests) == 1
    with pytest.raises(MediaError, match=r"^broken: no frame can be decoded"):
        captions(lambda _: (200, "A."), [drawn(plain(1)), drawn(id="broken")])


def test_a_dead_url_ends_the_run() -> None:
    with pytest.raises(ModelError, match=r"^'m' at http.* does not answer: .*no such key"):
        captions(lambda _: (401, "no such key"), [drawn(plain(0))])


def test_a_version_names_all_that_answers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")

    def version(**options: Any) -> str:
        given: dict[str, Any] = {"url": URL, "model": "org/m"}
        with closing(made("caption", **given | options)) as one:
            return str(one.version)

    first = version()
    assert first.startswith("org/m@url+")
    same: list[dict[str, Any]] = [{"api_key_env": "MY_KEY"}, {"at_once": 3}, {"url": f"{URL}/x"}]
    assert {version(**options) for options in same} == {first}
    others: list[dict[str, Any]] = [
        {"prompt": "Hm?"},
        {"frames": 2},
        {"side": 99},
        {"max_tokens": 9},
        {"revision": "7"},
    ]
    others += [{"model": "n"}, {"medium": "image"}, {"least": 0.5}]
    assert len({version(**options) for options in others} | {first}) == 9
    assert "secret" not in version(api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"medium": "depth"}, "medium: expected image or video or audio, got 'depth'"),
        ({"medium": ["image", "smell"]}, "medium: expected image or video or audio, got .*smell"),
        ({"medium": []}, r"expected image or video or audio, got \[\]"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1, got 0"),
        ({"tempo": 3}, "tempo: extra inputs are not permitted"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env names NO_SUCH_KEY, which is not set"),
    ],
)
def test_bad_options(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made("caption", **{"url": URL} | options)


def test_a_model_that_does_not_read_the_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelAtUrl, "reads", ("image", "video"))
    with pytest.raises(ConfigError, match="caption: medium: m reads image or video, not audio"):
        made("caption", url=URL, model="m", medium="audio")


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    moving = np.stack(Scene(1).frames(12, (64, 48)))
    return [drawn(moving, TONE), drawn(plain(0, 255)), drawn(moving[::-1].copy())]


def test_a_model_in_this_process(tiny_chat: Path, scenes: list[Any]) -> None:
    options: dict[str, Any] = {"model": str(tiny_chat), "engine": "transformers", "max_tokens": 6}
    with (
        closing(made("caption", **options)) as one,
        closing(made("caption", **options, at_once=3)) as three,
    ):
        alone = [one([clip])[0] for clip in scenes]
        assert one(scenes) == alone, "an answer does not depend on who else is asked"
        assert one.version == three.version
        assert len(three(scenes)) == 3


@pytest.mark.slow
def test_the_mini_describes_files(base_llm_folder: Path, tmp_path: Path) -> None:
    clips = []
    for n, sound in enumerate((0.3, None)):
        file = make_video(tmp_path / f"{n}.mp4", [Scene(n, 5.0)], sound=sound, audio_codec="aac")
        size = file.stat().st_size
        where = {"address": str(file), "member": "", "offset": 0, "size": size}
        clips.append(Clip(where | {"id": str(n), "start": 0.0, "end": 5.0}))
    with closing(made("caption", medium=["image", "video", "audio"], max_tokens=24)) as mini:
        found = mini(clips)
        assert mini(clips[1:]) == found[1:]
    assert [[one.medium for one in said] for said in found] == [
        ["image", "video", "audio"],
        ["image", "video"],
    ]
    for said in (one for of_clip in found for one in of_clip):
        assert 0 < said.score <= 1
        assert said.version.startswith("mini@")

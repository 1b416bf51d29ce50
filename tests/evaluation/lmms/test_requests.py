"""Requests of lmms-eval: media in all of their forms, and generation options."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mico_chat.chats import conversation, png, wav
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MediaError, RequestError
from mico_chat.evaluation.lmms.requests import options_of, question
from mico_chat.media import Audio, MediaFile, MediaLimits, decode
from mico_chat.media import Image as Picture
from mico_chat.messages import Message, TextPart
from tests.server.support import sent
from tests.support.made import write_clip, write_sound

LIMITS = MediaLimits()
RED = sent.square()


def parts(*content: dict[str, Any]) -> tuple[Any, ...]:
    (message,) = conversation([{"role": "user", "content": list(content)}], LIMITS)
    return message.content


def medium(kind: str, url: Any, **more: Any) -> MediaFile:
    (part,) = parts({"type": kind, "url": url, **more})
    assert isinstance(part, MediaFile)
    return part


def webm(write: Callable[..., None], codec: str, **options: Any) -> bytes:
    file = io.BytesIO()
    write(file, codec, container_format="webm", **options)
    return file.getvalue()


def table(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def test_a_conversation() -> None:
    hello, answer = ([{"type": "text", "text": text}] for text in ("Hello", "Hello!"))
    said = [("system", "Be brief."), ("user", hello), ("assistant", answer), ("user", [])]
    shown = conversation([{"role": role, "content": content} for role, content in said], LIMITS)
    asked = [Message.system("Be brief."), Message.user("Hello")]
    assert shown == [*asked, Message.assistant("Hello!"), Message.user()]


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGB", "RGBA", "CMYK", "F"])
def test_pictures_of_every_mode(mode: str) -> None:
    """A picture becomes a PNG file; in RGB if PNG cannot hold its mode."""
    picture = Image.fromarray(RED).convert(mode if mode != "LA" else "L").convert(mode)
    decoded = decode(MediaFile("image", png(picture)))
    assert isinstance(decoded, Picture)
    if mode in ("RGB", "RGBA"):
        assert (decoded.pixels == RED).all()
    assert decoded.pixels.shape == (224, 224, 3)


def test_a_depth_map_of_16_bits_keeps_them() -> None:
    picture = Image.open(io.BytesIO(sent.depth()))
    part = medium("depth", picture)
    assert part.kind == "depth"
    assert isinstance(part.source, bytes)
    again = np.asarray(Image.open(io.BytesIO(part.source)))
    assert (again == np.asarray(picture)).all()
    assert again.max() == 5000


@pytest.mark.parametrize("channels", [None, 0, 1])
def test_samples_become_a_file(channels: int | None) -> None:
    samples = 0.5 * np.sin(np.arange(16_000) / 10)
    given = samples if channels is None else np.stack([samples, samples], channels)
    # lmms-eval names "video" as the kind of every dictionary.
    part = medium("video", {"array": given, "sampling_rate": 16_000, "path": None})
    assert part.kind == "audio"
    assert isinstance(part.source, bytes)
    decoded = decode(MediaFile("audio", part.source))
    assert isinstance(decoded, Audio)
    assert np.abs(decoded.samples - samples).max() < 1e-3
    assert part.source == wav(given, 16_000)


@pytest.mark.parametrize(
    ("said", "name", "data", "kind"),
    [
        ("video", "a.mp4", sent.mp4(), "video"),
        ("video", "a.wav", sent.wav(), "audio"),
        ("video", "a", sent.png(RED), "image"),
        ("audio", "a.webm", webm(write_clip, "libvpx", n=5), "video"),
        ("audio", "a.webm", webm(write_sound, "libopus", rate=48_000), "audio"),
        ("image", "a.png", sent.png(RED), "image"),
    ],
)
def test_the_bytes_decide_the_kind(
    tmp_path: Path, said: str, name: str, data: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    for url in (str(path), path, path.as_uri(), data, {"bytes": data, "path": "x"},
                {"bytes": None, "path": str(path)}, {"type": said, "url": str(path)},
                sent.data_uri("application/octet-stream", data)):  # fmt: skip
        part = medium(said, url)
        assert part.kind == kind, url
        decode(part)


def test_the_openai_format_and_the_simple_interface() -> None:
    sound = {"type": "audio", "url": sent.wav()}
    url = {"url": sent.data_uri("image/png", sent.normal())}
    (part,) = parts({"type": "normal_url", "normal_url": url})
    assert part == MediaFile("normal", sent.normal(), "messages[0].content[0].normal_url.url")
    (message,) = question([Image.fromarray(RED), sound], "What is it?", LIMITS)
    assert [part.kind for part in message.media] == ["image", "audio"]
    assert message.content[-1] == TextPart("What is it?")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *table("refused.yaml"),
        ({"type": "audio", "url": Image.new("L", (2, 2))}, "the value is a picture, but its kind"),
    ],
)
def test_what_cannot_be_shown(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        parts(content)
    assert reason in str(caught.value)


def test_a_missing_file_and_a_role_that_there_is_not() -> None:
    with pytest.raises(MediaError, match="no such file"):
        medium("video", "/nowhere/a.mp4")
    with pytest.raises(RequestError, match="'robot' is not one of system, user, assistant"):
        conversation([{"role": "robot", "content": []}], LIMITS)


@pytest.mark.parametrize(("given", "differs"), table("options.yaml"))
def test_options(given: dict[str, Any], differs: dict[str, Any]) -> None:
    assert options_of(given) == GenerationOptions.of({"max_tokens": 1024, **differs})


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "n", "best_of"])
def test_beams_and_several_answers_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}: got 5, but a request gets one answer"):
        options_of({name: 5})


def test_what_no_engine_has_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            options_of({"image_aspect_ratio_of_a_test": "pad"})
    (record,) = caplog.records
    said = "the generation option 'image_aspect_ratio_of_a_test' is ignored: no engine supports it"
    assert record.getMessage() == said

"""What an endpoint is sent: the parts of the field, and less for those that know fewer kinds."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.errors import MediaError, MissingFileError
from mico_chat.evaluation.chat.wire import Sending, Wire
from mico_chat.media import MediaFile, decode
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message, TextPart, from_openai
from tests.made import write_clip, write_sound


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each sort."""
    folder = tmp_path_factory.mktemp("wire")
    paths = {n: folder / n for n in ("a.png", "a.wav", "a.mp3", "a.ogg", "a.mp4", "depth.png")}
    Image.new("RGB", (20, 10), (200, 30, 30)).save(paths["a.png"])
    Image.fromarray(np.full((10, 20), 1500, np.uint16)).save(paths["depth.png"])
    write_sound(str(paths["a.wav"]), "pcm_s16le")
    write_sound(str(paths["a.mp3"]), "libmp3lame")
    write_sound(str(paths["a.ogg"]), "libopus", rate=48_000)
    write_clip(str(paths["a.mp4"]), "libx264", n=40, sound="aac")
    return paths


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Sends files as they are."""
    with closing(Wire(Sending())) as wire:
        yield wire


def sent(wire: Wire, kind: Kind, source: Path | bytes) -> list[dict[str, Any]]:
    """The parts of a question about one medium; the last must be the question."""
    (message,) = wire.messages([Message.user(MediaFile(kind, source), "What?")])
    assert message["role"] == "user"
    *parts, question = message["content"]
    assert question == {"type": "text", "text": "What?"}
    return list(parts)


@pytest.mark.parametrize(
    ("kind", "name", "start"),
    [
        ("image", "a.png", "data:image/png;base64,"),
        ("audio", "a.ogg", "data:audio/ogg;base64,"),
        ("video", "a.mp4", "data:video/mp4;base64,"),
        ("depth", "depth.png", "data:image/png;base64,"),
    ],
)
def test_media_are_urls_of_their_kind(
    kind: Kind, name: str, start: str, media: dict[str, Path], wire: Wire
) -> None:
    (part,) = sent(wire, kind, media[name])
    assert part["type"] == f"{kind}_url"
    url = part[f"{kind}_url"]["url"]
    assert url.startswith(start)
    assert base64.b64decode(url.removeprefix(start)) == media[name].read_bytes()


@pytest.mark.parametrize("audio_format", ["wav", "mp3"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_sounds_that_openai_takes_are_input_audio(
    audio_format: str, as_bytes: bool, media: dict[str, Path], wire: Wire
) -> None:
    path = media[f"a.{audio_format}"]
    (part,) = sent(wire, "audio", path.read_bytes() if as_bytes else path)
    assert part["type"] == "input_audio"
    assert part["input_audio"]["format"] == audio_format
    assert base64.b64decode(part["input_audio"]["data"]) == path.read_bytes()


def test_a_plain_question_is_a_string(wire: Wire) -> None:
    assert wire.messages([Message.user("Hi?")]) == [{"role": "user", "content": "Hi?"}]


def test_our_own_server_understands_all_of_it(media: dict[str, Path], wire: Wire) -> None:
    kinds: list[tuple[Kind, str]] = [
        ("image", "a.png"),
        ("audio", "a.wav"),
        ("audio", "a.ogg"),
        ("video", "a.mp4"),
        ("depth", "depth.png"),
        ("normal", "a.png"),
    ]
    asked = Message.user(*(MediaFile(kind, media[name]) for kind, name in kinds), "What?")
    (got,) = from_openai(wire.messages([asked]))
    assert [(part.kind, part.source) for part in got.files] == [
        (kind, media[name].read_bytes()) for kind, name in kinds
    ]
    assert got.content[-1] == TextPart("What?")


def test_a_video_as_frames_is_spread_over_all_of_it(media: dict[str, Path]) -> None:
    with closing(Wire(Sending(video_as_frames=4))) as wire:
        parts = sent(wire, "video", media["a.mp4"])
        assert len(sent(wire, "image", media["a.png"])) == 1
    assert [part["type"] for part in parts] == ["image_url"] * 4
    greys = []
    for part in parts:
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (64, 48)
            greys.append(np.asarray(picture.convert("L"))[30:].mean())
    # Brightness is time: 20 at the start, 215 at the end.
    assert greys == sorted(greys)
    assert greys[0] < 60
    assert greys[-1] > 170


def test_a_sound_as_wav_is_what_was_heard(media: dict[str, Path]) -> None:
    with closing(Wire(Sending(audio_as_wav=True))) as wire:
        (part,) = sent(wire, "audio", media["a.ogg"])
        (same,) = sent(wire, "audio", media["a.mp3"])
    assert same["input_audio"]["format"] == "mp3"
    assert part["input_audio"]["format"] == "wav"
    heard = decode(MediaFile("audio", base64.b64decode(part["input_audio"]["data"])))
    true = decode(MediaFile("audio", media["a.ogg"]))
    np.testing.assert_allclose(heard.samples, true.samples, atol=2**-14)  # type: ignore[union-attr]


def test_what_cannot_be_read_is_named(tmp_path: Path, wire: Wire) -> None:
    with pytest.raises(MissingFileError, match=r"none\.ogg: no such file"):
        sent(wire, "audio", tmp_path / "none.ogg")
    (tmp_path / "torn.mp4").write_bytes(b"torn")
    with (
        closing(Wire(Sending(video_as_frames=4, audio_as_wav=True))) as other,
        pytest.raises(MediaError, match=r"torn\.mp4: "),
    ):
        sent(other, "video", tmp_path / "torn.mp4")


def test_what_is_changed_is_said() -> None:
    assert str(Sending()) == ""
    assert str(Sending(3, True)) == "videos as 3 stills without sound, sounds as WAV"

"""Messages, and their two wire formats with errors that name the place."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import MissingFileError, RequestError
from mico_chat.media.kinds import KINDS
from mico_chat.messages import MediaPart, Message, TextPart, from_llava, from_openai, to_openai
from tests.fakes import medium

PNG = b"\x89PNG\r\n\x1a\n rest"
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_kinds_are_the_models_ids() -> None:
    assert KINDS == ("image", "audio", "video", "depth", "normal")


def test_parts_keep_their_order() -> None:
    message = Message.user(MediaPart("audio", "a.wav"), "and", MediaPart("image", b"x"), "match?")
    assert [type(part) for part in message.content] == [MediaPart, TextPart, MediaPart, TextPart]
    assert message.text == "andmatch?"
    assert [part.name for part in message.media] == ["a.wav", "image"]


def test_openai_round_trip_of_every_kind() -> None:
    parts = [MediaPart(kind, PNG + kind.encode()) for kind in KINDS]
    messages = [
        Message.system("Be brief."),
        Message.user(*parts, "What?"),
        Message.assistant("A cat."),
        Message.user("Sure?"),
    ]
    again = from_openai(to_openai(messages))
    assert [message.role for message in again] == ["system", "user", "assistant", "user"]
    assert [message.text for message in again] == [message.text for message in messages]
    assert [(p.kind, p.source) for p in again[1].media] == [(p.kind, p.source) for p in parts]


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF0000WEBP", "image/webp"),
        (b"RIFF0000WAVE", "audio/wav"),
        (b"0000ftypisom", "video/mp4"),
        (b"\x93NUMPY", "application/octet-stream"),
    ],
)
def test_sent_media_say_what_they_are(data: bytes, mime: str) -> None:
    (message,) = to_openai([Message.user(MediaPart("image", data))])
    assert message["content"][0]["image_url"]["url"].startswith(f"data:{mime};base64,")


def test_openai_audio_and_percent_encoding() -> None:
    audio = {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}
    (message,) = from_openai(
        user(
            {"type": "input_audio", "input_audio": audio},
            {"type": "image_url", "image_url": {"url": "data:image/svg,a%20b"}},
        )
    )
    assert [part.source for part in message.media] == [b"RIFF", b"a b"]


def test_developer_is_system() -> None:
    assert from_openai([{"role": "developer", "content": "x"}]) == [Message.system("x")]


def test_other_urls_go_to_the_resolver() -> None:
    asked = []

    def resolve(kind: str, url: str) -> bytes:
        asked.append((kind, url))
        return b"fetched"

    part = {"type": "depth_url", "depth_url": {"url": "https://example.org/d.png"}}
    (message,) = from_openai(user(part), resolve=resolve)
    assert message.media[0].source == b"fetched"
    assert asked == [("depth", "https://example.org/d.png")]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: expected a list with at least one"),
        ([3], r"messages\[0\]: expected an object, got a number"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role: 'robot' is none of system"),
        ([{"role": "user"}], r"messages\[0\]\.content: .*got nothing"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content: .*an empty list"),
        (user("x"), r"messages\[0\]\.content\[0\]: expected an object, got a string"),
        (user({"type": "text"}), r"content\[0\]\.text: expected a string, got nothing"),
        (user({"type": "text", "text": "a"}, {"type": "pdf"}), r"content\[1\]\.type: 'pdf' is"),
        (user({"type": "image_url", "image_url": URI}), r"image_url: expected an object, got a s"),
        (user({"type": "image_url", "image_url": {}}), r"image_url\.url: expected a string"),
        (user({"type": "image_url", "image_url": {"url": "cat.png"}}), "no URL; send .* data URI"),
        (user({"type": "image_url", "image_url": {"url": "file:///etc/x"}}), "a 'file' URL; send"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}), "comma"),
        (user({"type": "image_url", "image_url": {"url": "data:;base64,@@"}}), "not valid base64"),
        (user({"type": "image_url", "image_url": {"url": "data:;base64,"}}), "no data"),
        (
            user({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "flac"}}),
            r"input_audio\.format: 'flac' is none of wav, mp3",
        ),
        (
            [{"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": URI}}]}],
            "only the user's messages carry media, not assistant's",
        ),
    ],
)
def test_openai_errors_name_the_place(messages: list[Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        from_openai(messages)
    param = caught.value.param
    assert param is not None
    assert str(caught.value).startswith(f"{param}: ")


def test_paths_are_read_when_sent(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    with pytest.raises(MissingFileError, match=r"cat\.png: no such file"):
        to_openai([Message.user(MediaPart("image", path, name="cat.png"))])
    path.write_bytes(PNG)
    (message,) = from_openai(to_openai([Message.user(MediaPart("image", path))]))
    assert message.media[0].source == PNG


def test_decoded_media_cannot_be_sent() -> None:
    with pytest.raises(RequestError, match="a decoded depth has no file"):
        to_openai([Message.user(MediaPart("depth", medium("depth")))])


def llava(*turns: tuple[str, str], **media: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **media}


def test_llava_markers_are_where_media_stand() -> None:
    record = llava(
        ("system", "Be brief."),
        ("human", "<image>\nDo <audio> and\n<image> match?"),
        ("gpt", "Yes."),
        ("human", "And <depth>?"),
        image=["a.png", "b.png"],
        audio="c.wav",
        depth="d.png",
    )
    messages = from_llava(record, root="data")
    assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1].content == (
        MediaPart("image", Path("data/a.png")),
        TextPart("Do "),
        MediaPart("audio", Path("data/c.wav")),
        TextPart(" and"),
        MediaPart("image", Path("data/b.png")),
        TextPart(" match?"),
    )
    assert messages[3].media == (MediaPart("depth", Path("data/d.png")),)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "conversations: expected a list"),
        (llava(("robot", "x")), r"conversations\[0\]\.from: 'robot' is none of"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]\.value: expected a string"),
        (llava(("human", "<image><image>"), image="a"), "2 <image> markers but 1 in 'image'"),
        (llava(("human", "look"), video=["a"]), "0 <video> markers but 1 in 'video'"),
        (llava(("human", "<image>"), image=[3]), "image: expected a path .* got a number"),
    ],
)
def test_llava_errors_say_both_sides(record: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        from_llava(record)
    assert str(caught.value).startswith(f"{caught.value.param}: ")

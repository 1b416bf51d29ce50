"""Messages, and their two wire formats with errors that name the place."""

import base64
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from mico_chat import messages
from mico_chat.errors import MissingFileError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS, MODALITIES, Kind
from mico_chat.messages import Message, TextPart, from_llava, from_openai, to_openai, urls_of
from tests.support.fakes import medium

WHITE = ("", "", "", "", " ", "\r\n", "\t")
PNG = b"\x89PNG\r\n\x1a\n rest"
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


IMAGE = {"type": "image_url", "image_url": {"url": URI}}


def called(**change: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": "{}", **change}
    call = {"id": "1", "type": "function", "function": function}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


def test_kinds_are_the_models_ids() -> None:
    assert KINDS[:5] == MODALITIES == ("image", "audio", "video", "depth", "normal")


def test_parts_keep_their_order() -> None:
    message = Message.user(MediaFile("audio", "a.wav"), "and", MediaFile("image", b"x"), "match?")
    assert [type(part) for part in message.content] == [MediaFile, TextPart, MediaFile, TextPart]
    assert message.text == "andmatch?"
    assert [part.name for part in message.media] == ["a.wav", "image"]


def test_openai_round_trip_of_every_kind() -> None:
    parts = [MediaFile(kind, PNG + kind.encode()) for kind in KINDS]
    messages = [
        Message.system("Be brief."),
        Message.user(*parts, "What?"),
        Message.assistant("A cat."),
        Message.user("Sure?"),
    ]
    again = from_openai(to_openai(messages))
    assert [message.role for message in again] == ["system", "user", "assistant", "user"]
    assert [message.text for message in again] == [message.text for message in messages]
    assert [(p.kind, p.source) for p in again[1].files] == [(p.kind, p.source) for p in parts]


def test_openai_round_trip_of_a_call() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "b"}]},
        {"role": "tool", "content": "7", "tool_call_id": "b"},
        {"role": "assistant", "content": "Once more.", "tool_calls": [call]},
    ]
    read = from_openai(chat)
    assert [called.values for called in read[1].tool_calls] == [{"x": [1]}] * 2
    assert (read[2].role, read[2].name, read[2].text) == ("tool", "f", "7")
    assert to_openai(read) == chat


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
    (message,) = to_openai([Message.user(MediaFile("image", data))])
    assert message["content"][0]["image_url"]["url"].startswith(f"data:{mime};base64,")


def test_data_uris_are_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(0)
    for piece in (5, 7, 1 << 20):
        monkeypatch.setattr(messages, "_PIECE", piece)
        for _ in range(1000):
            text = "".join(random.choices("%%%%0aFgz4é,", k=random.randrange(40)))
            assert messages.data_of(f"data:,{text}", "a") == unquote_to_bytes(text)
            data = random.randbytes(1 + random.randrange(40))
            text = "".join(f"{c}{random.choice(WHITE)}" for c in base64.b64encode(data).decode())
            assert messages.data_of(f"DATA:image/png;Base64,{text}", "a") == data
            assert (
                messages.data_of(f"data:;base64,{''.join(text.split()).rstrip('=')}===", "a")
                == data
            )
        for wrong in ("QUI=QUJD", "QQ==QQ==", "QUJDQ", "QUJDR0", "QU=J", "QUJDé", "Q-JD", "=QUJ"):
            with pytest.raises(RequestError, match="a: not valid base64"):
                messages.data_of(f"data:;base64,{wrong}", "a")


@pytest.mark.parametrize("audio_format", ["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac"])
def test_openai_audio_and_percent_encoding(audio_format: str) -> None:
    audio = {"data": base64.b64encode(b"RIFF").decode(), "format": audio_format}
    (message,) = from_openai(
        user(
            {"type": "input_audio", "input_audio": audio},
            {"type": "image_url", "image_url": {"url": "data:image/svg,a%20b"}},
        )
    )
    assert [file.source for file in message.files] == [b"RIFF", b"a b"]


@pytest.mark.parametrize(
    "value",
    [URI, {"url": URI, "detail": "low"}, {"url": URI, "detail": None}, {"url": URI, "more": 1}],
)
def test_ways_to_write_a_url(value: Any) -> None:
    (message,) = from_openai(user({"type": "image_url", "image_url": value}))
    assert message.files[0].source == PNG


def test_answers_that_clients_send_back_are_accepted() -> None:
    none = {"refusal": None, "audio": None, "tool_calls": None, "function_call": None}
    messages = from_openai(
        [
            {"role": "developer", "content": "Be brief.", "name": "boss"},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "ann"},
            {"role": "assistant", "content": "Hello.", **none, "annotations": []},
            {"role": "user", "content": "Bye", "name": None},
            {"role": "assistant", "content": "", "tool_calls": [], "name": "mini"},
            {"role": "user", "content": "Still there?"},
        ]
    )
    assert messages[0] == Message.system("Be brief.")
    said = ["Be brief.", "Hi", "Hello.", "Bye", "", "Still there?"]
    assert [message.text for message in messages] == said


def test_other_urls_go_to_the_resolver() -> None:
    asked = []

    def resolve(kind: Kind, url: str) -> MediaFile:
        asked.append((kind, url))
        return MediaFile(kind, b"fetched")

    part = {"type": "depth_url", "depth_url": {"url": "https://example.org/d.png"}}
    (message,) = from_openai(user(part), resolve=resolve)
    assert message.files[0].source == b"fetched"
    assert asked == [("depth", "https://example.org/d.png")]


def test_a_resolved_medium_keeps_its_name() -> None:
    stored = MediaFile("image", Path("/store/ab12"), name="cat.jpg")
    part = {"type": "image_url", "image_url": "media-1"}
    (message,) = from_openai(user(part), resolve=lambda kind, url: stored)
    assert message.media == (stored,)
    other = {"type": "audio_url", "audio_url": {"url": "media-1"}}
    said = r"audio_url\.url: expected a medium of kind audio, but cat\.jpg is of kind image$"
    with pytest.raises(RequestError, match=said) as caught:
        from_openai(user(other), resolve=lambda kind, url: stored)
    assert caught.value.param == "messages[0].content[0].audio_url.url"


def test_urls_for_the_resolver_are_known_before() -> None:
    messages = [
        {"role": "user", "content": "https://example.org/no.png"},
        *user(
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": {"url": URI}},
            {"type": "text", "text": "https://example.org/no.png"},
            {"type": "video_url", "video_url": "HTTP://example.org/b.mp4"},
        ),
        {"role": "assistant", "content": "So."},
        *user(
            {"type": "depth_url", "depth_url": {"url": "media-1"}},
            {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
            {"type": "image_url", "image_url": {"url": "DATA:image/png,x"}},
        ),
    ]
    asked: dict[tuple[Kind, str], None] = {}

    def resolve(kind: Kind, url: str) -> MediaFile:
        asked[kind, url] = None
        return MediaFile(kind, b"x")

    from_openai(messages, resolve=resolve)
    assert urls_of(messages) == list(asked)
    assert urls_of(messages) == [
        ("image", "https://example.org/a.png"),
        ("video", "HTTP://example.org/b.mp4"),
        ("depth", "media-1"),
    ]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages: expected a list with at least one"),
        (None, "messages: expected a list"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "messages: expected a list"),
        (user({"type": "image_url"}), r"image_url: expected an object, got nothing"),
        (user({"type": {}, "image_url": "x"}), r"type: \{\} is none of"),
        (user({"type": "pdf_url", "pdf_url": "https://example.org/a.pdf"}), "'pdf_url' is none"),
        ([{"role": "user", "content": {"type": "image_url"}}], r"content: .*got an object"),
        ([3], r"messages\[0\]: expected an object, got a number"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\]\.role: 'robot' is none of system"),
        ([{"role": "user"}], r"messages\[0\]\.content: .*got nothing"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content: .*an empty list"),
        (user("x"), r"messages\[0\]\.content\[0\]: expected an object, got a string"),
        (user({"type": "text"}), r"content\[0\]\.text: expected a string, got nothing"),
        (user({"type": "text", "text": "a"}, {"type": "pdf"}), r"content\[1\]\.type: 'pdf' is"),
        (3, "messages: expected a list"),
        ("hi", "messages: expected a list"),
        (user({"type": "image_url", "image_url": 3}), r"image_url: expected an object, got a num"),
        (user({"type": "image_url", "image_url": "cat.png"}), r"\.image_url: no URL; send .* data"),
        (user({"type": "image_url", "image_url": {"url": URI, "detail": 3}}), "detail: 3 is none"),
        (user({"type": ["text"], "text": "a"}), r"type: \['text'\] is none of"),
        (user({"type": "text", "text": "a\ud800"}), r"\.text: character 1 is half of a surrogate"),
        (user({"type": "image_url", "image_url": "data:,\udfff"}), "character 6 is half of a surr"),
        ([{"role": "user", "content": "\ud83d"}], r"content: character 0 is half"),
        ([{"role": {}, "content": "x"}], r"role: \{\} is none of"),
        ([{"role": "x" * 9999, "content": "x"}], r"role: '.{1,40}' is none of"),
        ([{"role": "tool", "content": "3", "tool_call_id": "a"}], "'a' is the id of no tool call"),
        ([{"role": "tool", "content": "3"}], "tool_call_id: expected a string, got nothing"),
        ([{"role": "function", "content": "3"}], "role: 'function' is .* send the role 'tool'"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\]\.function: .*got nothing"),
        ([{"role": "user", "tool_calls": [{}]}], "tool_calls: only the assistant calls tools"),
        ([{"role": "assistant", "tool_calls": {"id": "a"}}], "tool_calls: expected a list, got an"),
        (called(name="a b"), r"function\.name: 'a b' is not 1 to 64 of"),
        (called(arguments={}), r"function\.arguments: expected a string, got an object"),
        (called(arguments="{"), r"function\.arguments: not JSON"),
        (called(arguments="[" * 9999), r"function\.arguments: "),
        (called(arguments="[1]"), r"function\.arguments: expected an object, got a list"),
        (called(arguments='{"a": "\\ud83d"}'), r"arguments: character 0 is half of a surrogate"),
        (called(arguments='{"a":' * 80 + "1" + "}" * 80), "arguments: nested deeper than 64"),
        (
            [*called(), {"role": "tool", "tool_call_id": "1", "content": [IMAGE]}],
            "a tool's result is text; show its media in a message of the user",
        ),
        ([{"role": "assistant", "function_call": {"name": "f"}}], "function_call: .* tool_calls"),
        ([{"role": "assistant", "content": "x", "audio": {"id": "a"}}], "audio: .* not speak"),
        ([{"role": "assistant", "content": None}], r"messages\[0\]\.content: .*got nothing"),
        ([{"role": "assistant", "tool_calls": []}], r"messages\[0\]\.content: .*got nothing"),
        ([{"role": "user", "content": "x", "name": 3}], "name: expected a string, got a number"),
        (user({"type": "image_url", "image_url": {}}), r"image_url\.url: expected a string"),
        (user({"type": "image_url", "image_url": {"url": "cat.png"}}), "no URL; send .* data URI"),
        (user({"type": "image_url", "image_url": {"url": "file:///etc/x"}}), "a 'file' URL; send"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}), "comma"),
        (user({"type": "image_url", "image_url": {"url": "data:;base64,@@"}}), "not valid base64"),
        (user({"type": "image_url", "image_url": {"url": "data:;base64,"}}), "no data"),
        (
            user({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "midi"}}),
            r"input_audio\.format: 'midi' is none of wav, mp3, flac",
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
    assert str(caught.value).startswith(f"{caught.value.param}: ")
    assert all(kind in KINDS for kind, _ in urls_of(messages))  # malformed messages too


def test_paths_are_read_when_sent(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    with pytest.raises(MissingFileError, match=r"cat\.png: no such file"):
        to_openai([Message.user(MediaFile("image", path, name="cat.png"))])
    path.write_bytes(PNG)
    (message,) = from_openai(to_openai([Message.user(MediaFile("image", path))]))
    assert message.files[0].source == PNG


def test_decoded_media_cannot_be_sent() -> None:
    with pytest.raises(RequestError, match="a decoded depth has no file"):
        to_openai([Message.user(medium("depth"))])


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
        MediaFile("image", Path("data/a.png")),
        TextPart("Do "),
        MediaFile("audio", Path("data/c.wav")),
        TextPart(" and"),
        MediaFile("image", Path("data/b.png")),
        TextPart(" match?"),
    )
    assert messages[3].media == (MediaFile("depth", Path("data/d.png")),)


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

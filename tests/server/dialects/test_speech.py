"""POST /v1/audio/speech: OpenAI's fields and formats, by the voice that is installed."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from mico_chat import speech
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.reading.speech import Listener
from tests.server.conftest import Start
from tests.server.support.running import error_of, new_key
from tests.support.fakes import FakeAssistant

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")

PATH = "/v1/audio/speech"
TEXT = "The train to Berlin leaves at nine. Please take your umbrella with you."


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "tts-1", "voice": "alloy", "input": TEXT, **fields}


@pytest.fixture(scope="module")
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder() as one:
        yield one


@pytest.mark.parametrize("form", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_each_format(client: httpx.Client, decoder: MediaDecoder, form: str) -> None:
    response = client.post(PATH, json=asked(response_format=form))
    assert response.status_code == 200, response.text
    kinds = {"mp3": "mpeg", "opus": "ogg"}
    assert response.headers["content-type"] == f"audio/{kinds.get(form, form)}"
    assert response.headers["transfer-encoding"] == "chunked"
    if form == "pcm":
        seconds = len(response.content) / 48_000
    else:
        found = decoder.decode(MediaFile("audio", response.content, f"a.{form}"))
        seconds = found.report.seconds or 0.0
    assert 3 < seconds < 6


def test_what_is_spoken_is_heard(start: Start, decoder: MediaDecoder) -> None:
    pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")
    from mico_chat.reading.speech import folder

    if not folder().is_dir():
        pytest.skip("the weights are not there: mico-chat setup")
    listener: Any = Listener()
    http = start(FakeAssistant(decoder=decoder, listener=listener))
    with OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        for model, voice, form in (("tts-1", "nova", "mp3"), ("fake", "heart", "opus")):
            given = {"model": model, "voice": voice, "input": TEXT, "response_format": form}
            made = client.audio.speech.create(**given)  # type: ignore[arg-type]
            file = (f"a.{form}", made.content)
            heard = client.audio.transcriptions.create(model="whisper-1", file=file).text
            assert re.findall(r"\w+", heard.lower()) == [
                "9" if word == "nine" else word for word in re.findall(r"\w+", TEXT.lower())
            ]


def test_the_first_sentence_is_sent_while_the_second_is_made(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = speech.HibariVoice.say
    said: list[str] = []

    def watched(self: Any, text: str, speed: float = 1.0) -> Iterator[Any]:
        for samples in before(self, text, speed):
            said.append("sentence")
            yield samples

    monkeypatch.setattr(speech.HibariVoice, "say", watched)
    fields = asked(input=f"{TEXT} " * 40, response_format="pcm")
    with client.stream("POST", PATH, json=fields) as response:
        next(response.iter_raw())
        assert 1 <= len(said) < 80
    assert client.post(PATH, json=asked()).status_code == 200  # what was left is served no more


def test_events(client: httpx.Client) -> None:
    response = client.post(PATH, json=asked(stream_format="sse", response_format="pcm"))
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    kinds = [one["type"] for one in events]
    assert kinds == ["speech.audio.delta", "speech.audio.delta", "speech.audio.done"]
    pieces = b"".join(base64.b64decode(one["audio"]) for one in events[:-1])
    assert pieces == client.post(PATH, json=asked(response_format="pcm")).content


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "gpt-9"}, 404, None, "this server has 'fake'"),
        ({"voice": "emma"}, 400, "voice", "is not on this machine"),
        ({"voice": {"id": "../../etc/passwd"}}, 400, "voice", "no voice '../../etc/passwd'"),
        ({"voice": 7}, 400, "voice.str", "valid string"),
        ({"response_format": "midi"}, 400, "response_format", "'mp3', 'opus'"),
        ({"speed": 9}, 400, "speed", "less than or equal to 4"),
        ({"speed": "fast"}, 400, "speed", "number"),
        ({"input": ""}, 400, "input", "at least 1 character"),
        ({"input": "x" * 4097}, 400, "input", "at most 4096 characters"),
        ({"input": "a\0b"}, 400, "input", "NUL"),
        ({"input": "```\ncode\n```\n"}, 400, "input", "nothing in it can be read aloud"),
        ({"input": "...", "response_format": "pcm"}, 400, "input", "nothing in it can be read"),
        ({"input": "Привет"}, 400, "input", "Cyrillic"),
        ({"language": "fr"}, 400, "language", "no voice here speaks 'fr'"),
        ({"instructions": "Whisper."}, 400, "instructions", "not permitted"),
    ],
)
def test_what_is_refused(
    client: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    said: str,
) -> None:
    monkeypatch.setenv("HIBARI_HOME", str(tmp_path))
    response = client.post(PATH, json=asked(**fields))
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert said in error["message"]


@pytest.mark.parametrize(
    "text", ["9" * 600, "x" * 4096, "a, " * 1365, "\u0301" * 99 + "hm", "|" * 4096]
)
def test_odd_texts(client: httpx.Client, text: str) -> None:
    response = client.post(PATH, json=asked(input=text, response_format="pcm"))
    assert response.status_code == (400 if "|" in text else 200), response.text


def test_a_key_is_needed_where_keys_are(client: httpx.Client, tmp_path: Path) -> None:
    key = new_key(tmp_path / "data", "someone")
    assert client.post(PATH, json=asked()).status_code == 401
    client.headers["authorization"] = f"Bearer {key}"
    assert client.post(PATH, json=asked()).status_code == 200


def test_a_server_that_cannot_speak_says_why(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "installed", lambda: False)
    response = client.post(PATH, json=asked())
    assert response.status_code == 501
    assert "pip install 'mico-chat[speech]'" in error_of(response)["message"]

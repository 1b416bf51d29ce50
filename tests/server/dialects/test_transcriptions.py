"""POST /v1/audio/transcriptions: OpenAI's fields and formats; the listener is a stand-in."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from openai import OpenAI, UnprocessableEntityError

from mico_chat.media import MediaFile
from mico_chat.reading import speech
from mico_chat.reading.speech import Listening
from tests.server.conftest import Start
from tests.server.support import sent
from tests.server.support.running import error_of, new_key
from tests.support.fakes import FakeAssistant, FakeEar, FakeListener
from tests.support.waiting import PATIENCE_S

SAID = ("Good morning.", "The train --> leaves now.")
PATH = "/v1/audio/transcriptions"


@pytest.fixture
def listener() -> FakeListener:
    return FakeListener(*SAID)


@pytest.fixture
def client(start: Start, listener: FakeListener) -> httpx.Client:
    return start(FakeAssistant(listener=listener))


def post(client: httpx.Client, data: Any = b"x", **fields: Any) -> httpx.Response:
    asked = {"model": "whisper-1", **fields}
    return client.post(PATH, data=asked, files={"file": ("talk.wav", data)})


def test_json_and_text(client: httpx.Client, listener: FakeListener) -> None:
    fields = {"language": "de", "prompt": "Names: Ana", "temperature": "0.5"}
    found = post(client, **fields)
    text = "Good morning. The train --> leaves now."
    assert found.json() == {"text": text, "usage": {"type": "duration", "seconds": 0.0}}
    assert listener.asked == [Listening("de", "Names: Ana", 0.5)]
    plain = post(client, model="fake", response_format="text")
    assert (plain.text, plain.headers["content-type"]) == (
        f"{text}\n",
        "text/plain; charset=utf-8",
    )


def test_verbose_json(client: httpx.Client) -> None:
    found = post(client, response_format="verbose_json").json()
    assert (found["task"], found["language"], found["words"]) == ("transcribe", "english", None)
    first, second = found["segments"]
    assert (first["start"], first["end"], first["text"]) == (0.0, 1.25, " Good morning.")
    assert (second["avg_logprob"], second["no_speech_prob"]) == (-0.25, 0.01)
    granularities = {"timestamp_granularities[]": ["word"]}
    by_word = post(client, response_format="verbose_json", **granularities).json()
    assert by_word["segments"] is None
    assert by_word["words"][1] == {"word": "morning.", "start": 0.0, "end": 1.0}


def test_events(client: httpx.Client) -> None:
    """OpenAI's own client reads them; a refusal before the first has a status of its own."""
    with OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as openai:
        asked = {"model": "whisper-1", "file": ("talk.wav", b"x"), "stream": True}
        events = list(openai.audio.transcriptions.create(**asked))  # type: ignore[call-overload]
        assert [one.type for one in events] == [
            *("transcript.text.delta", "transcript.text.delta", "transcript.text.done"),
        ]
        assert "".join(one.delta for one in events[:-1]) == events[-1].text == " ".join(SAID)
        with pytest.raises(UnprocessableEntityError, match=r"talk\.wav"):
            openai.audio.transcriptions.create(**{**asked, "file": ("talk.wav", b"broken")})  # type: ignore[call-overload]
    verbose = post(client, stream="true", response_format="verbose_json").text.split("data: ")[-1]
    done = json.loads(verbose)
    assert (done["language"], len(done["segments"])) == ("english", 2)


def test_events_come_while_the_rest_is_written(start: Start) -> None:
    heard = threading.Event()

    class Slow(FakeListener):
        def _segment(self, number: int) -> Any:
            assert number == 0 or heard.wait(PATIENCE_S)
            return super()._segment(number)

    class Aside(FakeEar):
        async def listened(self, file: MediaFile, listen: Any, *, tenant: str) -> Any:
            return await asyncio.to_thread(listen, self._decoder.decode(file), threading.Event())

    assistant = FakeAssistant()
    assistant.encoder = Aside(assistant.decoder, Slow(*SAID))
    client = start(assistant)
    fields, files = {"model": "whisper-1", "stream": "true"}, {"file": ("talk.wav", b"x")}
    with client.stream("POST", PATH, data=fields, files=files) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[6:])["delta"] == SAID[0]
        heard.set()
        assert SAID[1] in "".join(lines)


def test_nobody_speaks_in_events(start: Start) -> None:
    client = start(FakeAssistant(listener=FakeListener()))
    assert json.loads(post(client, stream="true").text[6:])["text"] == ""


def test_subtitles(client: httpx.Client) -> None:
    assert post(client, response_format="srt").text == (
        "1\n00:00:00,000 --> 00:00:01,250\nGood morning.\n\n"
        "2\n00:01:01,500 --> 00:01:02,750\nThe train -> leaves now.\n\n"
    )
    assert post(client, response_format="vtt").text.startswith(
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.250\nGood morning.\n\n00:01:01.500 --> "
    )


def test_nobody_speaks(start: Start) -> None:
    client = start(FakeAssistant(listener=FakeListener()))
    assert post(client).json()["text"] == ""
    assert post(client, response_format="srt").text == ""


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "gpt-4o-transcribe"}, 404, None, "this server has 'fake'"),
        ({"language": "xx"}, 400, "language", "none of de, en"),
        ({"temperature": "2"}, 400, "temperature", "less than or equal to 1"),
        ({"response_format": "xml"}, 400, "response_format", "'json', 'text'"),
        ({"stream": "soon"}, 400, "stream", "boolean"),
        ({"stream": "true", "response_format": "srt"}, 400, "stream", "only response_format json"),
        ({"loudness": "1"}, 400, "loudness", "unknown field"),
        (
            {"timestamp_granularities[]": "word"},
            400,
            "timestamp_granularities[]",
            "only response_format verbose_json has times",
        ),
    ],
)
def test_what_is_refused(
    client: httpx.Client, fields: dict[str, str], status: int, param: str | None, said: str
) -> None:
    response = post(client, **fields)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert said in error["message"]


def test_files_that_are_refused(client: httpx.Client) -> None:
    missing = client.post(PATH, files={"model": (None, "whisper-1")})
    assert (missing.status_code, error_of(missing)["param"]) == (400, "file")
    broken = post(client, b"broken")
    assert (broken.status_code, "talk.wav" in error_of(broken)["message"]) == (422, True)
    two = client.post(PATH, data={"model": "fake"}, files=[("file", b"a"), ("file", b"b")])
    assert (two.status_code, error_of(two)["message"]) == (400, "file: expected one file")


def test_a_recording_that_would_be_cut_is_refused(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICO_MEDIA_MAX_SECONDS", "0.001")
    response = post(client)
    assert response.status_code == 413
    assert "MICO_MEDIA_MAX_SECONDS" in error_of(response)["message"]


def test_a_key_is_needed_where_keys_are(client: httpx.Client, tmp_path: Any) -> None:
    key = new_key(tmp_path / "data", "someone")
    assert post(client).status_code == 401
    client.headers["authorization"] = f"Bearer {key}"
    assert post(client).status_code == 200


def test_a_server_that_cannot_listen_says_why(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(FakeAssistant())
    monkeypatch.setenv("MICO_READS", "false")
    assert post(client).status_code == 501
    assert "MICO_READS turns it off" in error_of(post(client))["message"]
    monkeypatch.delenv("MICO_READS")
    monkeypatch.setattr(speech, "installed", lambda: False)
    assert "pip install 'mico-chat[reads]'" in error_of(post(client, sent.wav()))["message"]

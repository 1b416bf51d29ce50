"""/v1/realtime: OpenAI's own client, unmodified, against a running service.

Speech is made by the service's own voice; the listener is a stand-in, but for one test.
"""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as raw_connect

from mico_chat.errors import RequestError
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message
from mico_chat.reading.speech import Listener, Listening, folder
from mico_chat.speech import HibariVoice
from mico_chat.speech.events import Content, Item
from mico_chat.speech.hearing import Resampler
from mico_chat.speech.sound import RATES, to_raw
from mico_server.realtime.conversation import MOST_ITEMS, MOST_TEXT_BYTES, Conversation, Kept
from mico_server.settings import ServerSettings
from tests.server.conftest import Start
from tests.server.support.running import new_key, revoke_keys, running
from tests.server.support.scripted import (
    CALL,
    CITY,
    WEATHER,
    ScriptedModel,
    scripted_assistant,
)
from tests.server.support.server_process import ServerProcess
from tests.server.support.talking import ASKED, PICTURE, sound_of, speech, talking, texts_of
from tests.support.fakes import FakeAssistant, FakeDecoder, FakeListener
from tests.support.waiting import PATIENCE_S, until

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

# OpenAI's client connects as older websockets did.
pytestmark = pytest.mark.filterwarnings(
    "ignore:connect.. must be used as a context:DeprecationWarning"
)


@pytest.fixture
def assistant() -> FakeAssistant:
    return FakeAssistant(listener=FakeListener(ASKED))


def test_text_and_pictures(start: Start, assistant: FakeAssistant) -> None:
    with talking(start(assistant)) as talk:
        session = talk.update(output_modalities=["text"], instructions="Be brief.")
        assert (session.model, session.audio.input.turn_detection.type) == ("fake", "server_vad")
        talk.write({"type": "input_image", "image_url": PICTURE})
        events = talk.ask(ASKED)
        kinds = [event.type for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-6:] == [
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "conversation.item.done",
            "response.done",
        ]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        response = events[-1].response
        assert text == response.output[0].content[0].text
        assert text.startswith("[image item[0].content[0].image_url.url] ")
        assert (response.status, response.usage.output_tokens) == ("completed", 2)
        assert texts_of(assistant)[0] == ("system", "Be brief.")
        talk.ask("And now?")
        assert texts_of(assistant)[1:] == [
            ("user", f"\n{ASKED}"),
            ("assistant", text),
            ("user", "And now?"),
        ]
        assert len(assistant.asked[-1][1].media) == 1


def test_an_answer_is_spoken_and_truncated(start: Start, assistant: FakeAssistant) -> None:
    with talking(start(assistant)) as talk:
        events = talk.ask("Good morning. The train leaves at nine.")
        item = events[-1].response.output[0]
        said = item.content[0].transcript
        assert said == "[] Good morning. The train leaves at nine."
        kind = "response.output_audio_transcript.delta"
        assert "".join(e.delta for e in events if e.type == kind) == said
        seconds = len(sound_of(events)) / 24_000
        assert 2 < seconds < 6
        assert np.abs(sound_of(events)).max() > 0.05
        cut: Any = {"item_id": item.id, "content_index": 0}
        talk.connection.conversation.item.truncate(**cut, audio_end_ms=int(1000 * seconds) + 500)
        assert "ms of sound" in talk.error().message
        talk.connection.conversation.item.truncate(**cut, audio_end_ms=int(500 * seconds))
        talk.until("conversation.item.truncated")
        talk.connection.conversation.item.retrieve(item_id=item.id)
        heard = talk.until("conversation.item.retrieved")[-1].item.content[0].transcript
        assert heard.startswith("[] Good morning.")
        assert "nine" not in heard
        talk.ask("Go on.")
        assert texts_of(assistant)[1] == ("assistant", heard)


def test_code_that_is_not_spoken_takes_no_time() -> None:
    kept = Kept(Item(role="assistant", content=[Content(type="output_audio")]), Message.assistant())
    kept.said = [("One two. ", 1.0), ("```\nx\n```\n", 0.0), ("Three four.", 1.0)]
    kept.truncate(1500)
    assert kept.item.content[0].transcript == "One two. ```\nx\n```\nThree"
    kept.truncate(1000)
    assert kept.read.text == "One two. "


def test_push_to_talk(start: Start, assistant: FakeAssistant) -> None:
    with talking(start(assistant)) as talk:
        hearing = {"turn_detection": None, "transcription": {"language": "en"}}
        talk.update(output_modalities=["text"], audio={"input": hearing})
        talk.speak(speech())
        talk.connection.input_audio_buffer.commit()
        committed = talk.until("input_audio_buffer.committed")[-1]
        done = talk.until("conversation.item.input_audio_transcription.completed")[-1]
        assert (done.transcript, done.item_id) == (ASKED, committed.item_id)
        talk.connection.response.create()
        talk.until("response.done")
        assert texts_of(assistant) == [("user", ASKED)]
        listener: Any = assistant.encoder.reader.listener
        assert listener.asked == [Listening("en", quick=True)]
        talk.speak(speech())
        talk.connection.input_audio_buffer.clear()
        talk.until("input_audio_buffer.cleared")
        talk.connection.input_audio_buffer.commit()
        assert "0 ms of sound" in talk.error().message


@pytest.mark.parametrize("form", ["audio/pcm", "audio/pcmu", "audio/pcma"])
def test_turns_are_found(start: Start, assistant: FakeAssistant, form: Any) -> None:
    with talking(start(assistant)) as talk:
        both = {"format": {"type": form}}
        talk.update(audio={"input": {**both, "transcription": {}}, "output": both})
        for _ in range(2):
            talk.speak(speech(form=form))
            events = talk.until(
                "input_audio_buffer.speech_started",
                "input_audio_buffer.speech_stopped",
                "input_audio_buffer.committed",
                "conversation.item.input_audio_transcription.completed",
                "response.done",
            )
            by_kind = {event.type: event for event in events}
            started = by_kind["input_audio_buffer.speech_started"]
            stopped = by_kind["input_audio_buffer.speech_stopped"]
            assert started.item_id == stopped.item_id
            assert 1000 < stopped.audio_end_ms - started.audio_start_ms < 4000
            assert 1 < len(sound_of(events, form)) / RATES[form] < 6
    assert texts_of(assistant)[-1] == ("user", ASKED)


def test_speech_is_written_down_before_its_turn_ends(start: Start) -> None:
    """In each pause; of a turn that goes on it is written down again, whole."""
    listener = FakeListener(ASKED)
    with talking(start(FakeAssistant(listener=listener))) as talk:
        slow = {"type": "server_vad", "silence_duration_ms": 2000}
        talk.update(audio={"input": {"transcription": {}, "turn_detection": slow}})
        talk.speak(speech(quiet_s=0.6))
        until(lambda: len(listener.asked) == 1)
        talk.speak(speech(quiet_s=0.6))
        until(lambda: len(listener.asked) == 2)
        talk.speak(to_raw(np.zeros(24_000 * 2, np.float32), "audio/pcm"))
        events = [one.type for one in talk.until("response.done")]
        assert events.count("input_audio_buffer.speech_stopped") == 1
        assert events.count("conversation.item.input_audio_transcription.completed") == 1
        assert len(listener.asked) == 2
        # A turn that ends before a pause counts as one is heard as it ends.
        quick = {"type": "server_vad", "silence_duration_ms": 100}
        talk.update(audio={"input": {"turn_detection": quick}})
        talk.speak(speech("Hello."))
        talk.until("conversation.item.input_audio_transcription.completed", "response.done")
        assert len(listener.asked) == 3


def test_silence_is_no_turn(start: Start, assistant: FakeAssistant) -> None:
    with talking(start(assistant)) as talk:
        noise = np.random.default_rng(0).normal(0, 0.003, 24_000 * 20).astype(np.float32)
        talk.speak(to_raw(noise, "audio/pcm"))
        talk.update()  # nothing came before it
    assert assistant.asked == []


def test_speaking_interrupts(start: Start) -> None:
    halfway = threading.Event()
    assistant = FakeAssistant(halfway=halfway, listener=FakeListener("Stop."))
    with talking(start(assistant)) as talk:
        talk.write({"type": "input_text", "text": "Tell me a story."})
        talk.connection.response.create()
        talk.until("response.created")
        until(lambda: assistant.asked)
        talk.speak(speech("Please stop now."))
        response = talk.until("input_audio_buffer.speech_started", "response.done")[-1].response
        assert (response.status, response.status_details.reason) == ("cancelled", "turn_detected")
        until(assistant.cancelled.is_set)
        halfway.set()
        assert talk.until("response.done")[-1].response.status == "completed"
        assert texts_of(assistant)[-1][1].endswith("Stop.")


def test_a_client_cancels(start: Start) -> None:
    assistant = FakeAssistant(halfway=threading.Event())
    with talking(start(assistant)) as talk:
        talk.update(output_modalities=["text"])
        talk.write({"type": "input_text", "text": "Tell me a story."})
        talk.connection.response.create()
        talk.until("response.output_text.delta")
        talk.connection.response.create()
        assert "a response is under way" in talk.error().message
        talk.connection.response.cancel()
        response = talk.until("response.done")[-1].response
        assert response.status_details.reason == "client_cancelled"
        assert response.output[0].status == "incomplete"
        talk.connection.response.cancel()
        assert "no response is under way" in talk.error().message


def test_to_truncate_an_answer_under_way_ends_it(start: Start) -> None:
    """As OpenAI's agents interrupt; some of them cancel it, too."""
    assistant = FakeAssistant(allowed=lambda: 6)
    with talking(start(assistant)) as talk:
        talk.write({"type": "input_text", "text": "There was a king. He had a dog."})
        talk.connection.response.create()
        delta = talk.until("response.output_audio.delta")[-1]
        talk.connection.conversation.item.truncate(
            item_id=delta.item_id, content_index=0, audio_end_ms=300
        )
        events = talk.until("response.done", "conversation.item.truncated")
        response = next(one.response for one in events if one.type == "response.done")
        assert (response.status, response.status_details.reason) == (
            "cancelled",
            "client_cancelled",
        )
        talk.connection.conversation.item.retrieve(item_id=delta.item_id)
        heard = talk.until("conversation.item.retrieved")[-1].item.content[0].transcript
        assert "king".startswith(heard[len("[] There was a ") :])
        talk.connection.response.cancel()
        talk.update()  # no error came before it
        talk.connection.response.cancel()
        assert "no response is under way" in talk.error().message


def test_responses_out_of_band(start: Start, assistant: FakeAssistant) -> None:
    with talking(start(assistant)) as talk:
        talk.update(output_modalities=["text"])
        talk.ask("Remember this.")
        content = [{"type": "input_text", "text": "Apart."}]
        given: Any = {
            **{"conversation": "none", "metadata": {"for": "test"}, "instructions": "Shout."},
            "input": [{"type": "message", "role": "user", "content": content}],
        }
        talk.connection.response.create(response=given)
        done = talk.until("response.done")[-1].response
        assert done.metadata == {"for": "test"}
        assert texts_of(assistant) == [("system", "Shout."), ("user", "Apart.")]
        talk.ask("Again.")
        assert "Apart." not in str(texts_of(assistant))


def test_tools_are_called(start: Start) -> None:
    answers = {"one?": f"Let me see.\n{CALL}", "two?": f"{CALL}\n{CALL}", "WARM": "It is warm."}
    script = ScriptedModel(answers)
    http = start(scripted_assistant(FakeDecoder(), script))
    with talking(http, extra_query={"conversation": "new"}) as talk:
        id_ = talk.until("conversation.created")[-1].conversation.id
        weather = {"type": "function", **WEATHER}
        session = talk.update(output_modalities=["text"], tools=[weather])
        assert session.tools[0].name == "weather"
        events = talk.ask("one?")
        message, call = events[-1].response.output
        assert (message.content[0].text, message.status) == ("Let me see.", "completed")
        assert (call.type, call.name, call.arguments) == ("function_call", "weather", CITY)
        kinds = {event.type: event for event in events}
        told = kinds["response.function_call_arguments.done"]
        assert (told.call_id, told.name, told.arguments) == (call.call_id, "weather", CITY)
        assert (told.item_id, told.output_index) == (call.id, 1)
        deltas = [e for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(event.delta for event in deltas) == CITY
        (turn,) = http.get(f"/v1/conversations/{id_}").json()["turns"]
        assert (turn["message"], turn["finish_reason"]) == ("one?", "unanswered")
        talk.write({"type": "input_text", "text": "Quick!"})  # the result stands before it
        output: Any = {"type": "function_call_output", "call_id": "x", "output": "WARM"}
        talk.connection.conversation.item.create(item=output)
        assert "'x' is no call in this conversation" in talk.error().message
        output["call_id"] = call.call_id
        talk.connection.conversation.item.create(item=output)
        assert talk.until("conversation.item.done")[-1].item.output == "WARM"
        talk.connection.response.create(response={"tool_choice": "none"})
        (said,) = talk.until("response.done")[-1].response.output
        assert said.content[0].text == "It is warm."
        assert "WARM\n</tool_response><|im_end|>\n<|im_start|>user\nQuick!" in script.prompts[-1]

        calls = talk.ask("two?")[-1].response.output
        assert [one.type for one in calls] == ["function_call"] * 2
        for one in calls:
            output["call_id"] = one.call_id
            talk.connection.conversation.item.create(item=output)
        talk.connection.response.create()
        talk.until("response.done")
        assert script.prompts[-1].count("<tool_response>") == 3
        turns = http.get(f"/v1/conversations/{id_}").json()["turns"]
        assert [(one["message"], one["answer"], one["finish_reason"]) for one in turns[1:]] == [
            ("Quick!", "It is warm.", "stop"),
            ("two?", "It is warm.", "stop"),
        ]
        wrong: Any = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}
        talk.connection.conversation.item.create(item=wrong)
        assert "not JSON" in talk.error().message


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "dictionary"),
        ({"type": "response.explode"}, "response.explode"),
        ({"type": "response.cancel", "loud": True}, "loud: extra inputs are not permitted"),
        ({"type": "session.update", "session": {"audio": {"output": {"speed": 9}}}}, "1.5"),
        ({"type": "session.update", "session": {"tools": [{}]}}, "session.tools"),
        ({"type": "session.update", "session": {"audio": {"output": {"voice": "x"}}}}, "no voice"),
        ({"type": "input_audio_buffer.append", "audio": "?"}, "not valid base64"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "3 bytes; PCM"),
        ({"type": "conversation.item.delete", "item_id": "x"}, "no item 'x'"),
        ({"type": "conversation.item.create", "item": {"role": "user"}, "previous_item_id": "x"},
         "previous_item_id: there is no item"),
        ({"type": "conversation.item.create", "item": {"role": "user", "content": [
            {"type": "input_image", "image_url": "http://10.0.0.1/a.png"}]}}, "not fetch URLs"),
        ({"type": "conversation.item.create", "item": {"role": "user", "content": [
            {"type": "input_smell"}]}}, "input_smell"),
        ({"type": "conversation.item.create", "item": {"type": "function_call_output"}},
         "an item function_call_output needs the field call_id"),
        ({"type": "response.create"}, "the conversation is empty"),
        ({"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": -1}, "greater"),
    ],
)  # fmt: skip
def test_errors_are_events(start: Start, assistant: FakeAssistant, event: Any, said: str) -> None:
    with talking(start(assistant)) as talk:
        raw = event if isinstance(event, str) else json.dumps({"event_id": "mine", **event})
        talk.connection.send_raw(raw)
        error = talk.error()
        assert said in error.message
        assert error.type == "invalid_request_error"
        if isinstance(event, dict) and event["type"] != "response.create":
            assert error.event_id == "mine"
        if event == {"type": "response.create"}:
            assert talk.until("response.done")[-1].response.status == "failed"
        talk.connection.send_raw(b"\x00")
        assert "bytes came" in talk.error().message
        talk.update(output_modalities=["text"])
        assert talk.ask("Hello.")[-1].response.status == "completed"


def test_a_language_without_a_voice_is_answered_in_text(start: Start) -> None:
    with talking(start(FakeAssistant())) as talk:
        talk.write({"type": "input_text", "text": "Привет, мир"})
        talk.connection.response.create()
        assert "most of its letters are Cyrillic" in talk.error().message
        part = talk.until("response.done")[-1].response.output[0].content[0]
        assert part.transcript == "[] Привет, мир"


def test_keys_and_client_secrets(start: Start, assistant: FakeAssistant, tmp_path: Path) -> None:
    http = start(assistant)
    key = new_key(tmp_path / "data", "someone")
    url = f"ws{str(http.base_url)[4:]}/v1/realtime"
    with pytest.raises(InvalidStatus) as refused, raw_connect(url):
        pass
    assert refused.value.response.status_code == 401
    with OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0) as client:
        asked: Any = {"type": "realtime", "instructions": "Be brief."}
        made: Any = client.realtime.client_secrets.create(
            session=asked, expires_after={"anchor": "created_at", "seconds": 60}
        )
    assert made.session.instructions == "Be brief."
    with talking(http, made.value) as talk:
        assert talk.update(output_modalities=["text"]).instructions == "Be brief."
    offered: Any = ["realtime", f"openai-insecure-api-key.{made.value}"]
    with raw_connect(url, subprotocols=offered) as socket:
        assert (socket.subprotocol, json.loads(socket.recv(PATIENCE_S))["type"]) == (
            "realtime",
            "session.created",
        )
    http.headers["authorization"] = f"Bearer {made.value}"
    assert http.get("/v1/models").status_code == 401  # it opens sessions alone
    with talking(http, key) as talk:
        revoke_keys(tmp_path / "data")
        assert talk.error().code == "invalid_api_key"
        with pytest.raises(ConnectionClosed) as closed:
            talk.event()
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
            1008,
            "the key of this session was withdrawn",
        )


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"realtime_idle_s": 0.001}, "session_idle"),
        ({"realtime_session_s": 0.001}, "session_expired"),
    ],
)
def test_sessions_end(
    start: Start, assistant: FakeAssistant, settings: dict[str, Any], code: str
) -> None:
    with talking(start(assistant, **settings)) as talk:
        assert talk.error().code == code
        with pytest.raises(ConnectionClosed):
            talk.event()


def test_so_many_sessions_at_once(start: Start) -> None:
    assistant = FakeAssistant(halfway=threading.Event())
    http = start(assistant, max_realtime_sessions=1)
    url = f"ws{str(http.base_url)[4:]}/v1/realtime"
    with talking(http) as talk:
        with pytest.raises(InvalidStatus) as refused, raw_connect(url):
            pass
        assert refused.value.response.status_code == 429
        assert b"MICO_SERVER_MAX_REALTIME_SESSIONS" in refused.value.response.body
        talk.write({"type": "input_text", "text": "Tell me a story."})
        talk.connection.response.create()
        until(lambda: assistant.asked)
    until(assistant.cancelled.is_set)  # nothing runs on for who has left
    until(lambda: served(http))
    with raw_connect(url, max_size=None) as socket:
        socket.recv(PATIENCE_S)
        socket.send("x" * (17 << 20))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009  # too big
    until(lambda: served(http))


def test_answers_count_as_requests(start: Start, assistant: FakeAssistant, tmp_path: Path) -> None:
    http = start(assistant)
    key = new_key(tmp_path / "data", "someone", rate_limit="2/day")
    with talking(http, key) as talk:
        talk.update(output_modalities=["text"])
        created, updated, *_, done = talk.ask("Hello.")
        assert (created.type, updated.type) == ("response.created", "rate_limits.updated")
        (limit,) = updated.rate_limits
        assert (limit.name, limit.limit, limit.remaining) == ("requests", 2, 0)
        assert 0 < limit.reset_seconds <= 86_400
        assert done.response.status == "completed"
        talk.connection.response.create()
        assert "reached its limit" in talk.error().message
    with talking(http, new_key(tmp_path / "data", "other")) as talk:  # it has no limit
        talk.update(output_modalities=["text"])
        assert "rate_limits.updated" not in [event.type for event in talk.ask("Hello.")]


def served(http: httpx.Client) -> bool:
    try:
        with talking(http):
            return True
    except InvalidStatus:
        return False


def test_who_reads_nothing_is_left(start: Start, assistant: FakeAssistant) -> None:
    http = start(assistant, body_timeout_s=0.2, max_realtime_sessions=1)
    content = [{"type": "input_text", "text": "A long story is told here, and nobody hears. " * 60}]
    item = {"type": "message", "role": "user", "content": content}
    with raw_connect(f"ws{str(http.base_url)[4:]}/v1/realtime", max_queue=1) as socket:
        socket.recv(PATIENCE_S)
        socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        socket.send(json.dumps({"type": "response.create"}))
        until(lambda: assistant.asked)
        until(lambda: served(http))


def test_what_is_oldest_is_forgotten() -> None:
    conversation = Conversation(most_media=4)
    conversation.add(Kept(Item(id="s", role="system"), Message.system("Be brief.")))

    def look(*numbers: int) -> list[str]:
        pictures = [MediaFile("image", b"x", f"{number}.png") for number in numbers]
        item = Item(id=f"p{numbers[0]}", role="user")
        conversation.add(Kept(item, Message.user(*pictures, "Look.")))
        shown = asyncio.run(conversation.messages(""))[1]
        assert shown.text.count("Look.") == numbers[0] + 1
        return [one.name.removesuffix(".png") for one in shown.files]

    seen = [look(number) for number in range(7)]
    assert list(map("".join, seen)) == ["0", "01", "012", "0123", "34", "345", "3456"], "by halves"
    assert look(7, 8, 9) == ["7", "8", "9"], "those of the newest item stay"
    old = [
        conversation.add(Kept(Item(id=f"t{number}", role="user"), Message.user("x")))[1]
        for number in range(MOST_ITEMS)
    ]
    gone = ["p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"]
    gone += [f"t{number}" for number in range(MOST_ITEMS // 2 + 1 - len(gone))]
    assert [one for one in old if one] == [gone], "half of them at once"
    long = Message.user("x" * (MOST_TEXT_BYTES + 1))
    assert conversation.add(Kept(Item(id="long", role="user"), long))[1][-1] == "s", "even that"
    assert asyncio.run(conversation.messages("")) == [long]
    with pytest.raises(RequestError, match="there is an item 'long' already"):
        conversation.add(Kept(Item(id="long", role="user"), long))


def test_other_models_and_pages_are_refused(start: Start, assistant: FakeAssistant) -> None:
    http = start(assistant)
    url = f"ws{str(http.base_url)[4:]}"
    for path, headers, status in (
        ("/v1/realtime?model=gpt-9", {}, 404),
        ("/v1/realtime", {"origin": "https://evil.example"}, 403),
        ("/v1/realtime", {"host": "evil.example"}, 403),
        ("/v1/models", {}, 200),
    ):
        with (
            pytest.raises(InvalidStatus) as refused,
            raw_connect(url + path, additional_headers=headers),
        ):
            pass
        assert refused.value.response.status_code == status
    text = http.get("/metrics").text
    assert 'mico_requests_total{method="GET",route="/v1/realtime",status="404"} 1.0' in text


def test_a_service_that_ends_says_so(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path) as process:
        with raw_connect(f"ws{process.url[4:]}/v1/realtime") as socket:
            assert json.loads(socket.recv(PATIENCE_S))["type"] == "session.created"
            process.terminate()
            assert json.loads(socket.recv(PATIENCE_S))["error"]["code"] == "service_ending"
            with pytest.raises(ConnectionClosed) as closed:
                socket.recv(PATIENCE_S)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
        assert process.exit_code() == 0


def test_voices_go_with_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: weakref.WeakSet[HibariVoice] = weakref.WeakSet()

    class Counted(HibariVoice):
        def __init__(self, name: str, weights: Path) -> None:
            super().__init__(name, weights)
            loaded.add(self)

    monkeypatch.setattr("mico_chat.speech.HibariVoice", Counted)
    with running(FakeAssistant, ServerSettings(data_dir=tmp_path)) as http:
        asked = {"model": "tts-1", "voice": "alloy", "input": "Hello."}
        http.post("/v1/audio/speech", json=asked).raise_for_status()
        assert len(loaded) == 1
    gc.collect()
    assert not loaded


@pytest.mark.slow
def test_by_ear(start: Start) -> None:
    """A spoken question is written down by Whisper, and so is the spoken answer."""
    if not folder().is_dir():
        pytest.skip("the weights are not there: mico-chat setup")
    listener: Any = Listener()
    with MediaDecoder() as decoder:
        http = start(FakeAssistant(decoder=decoder, listener=listener))
        with talking(http) as talk:
            talk.update(audio={"input": {"transcription": {"language": "en"}}})
            talk.speak(speech("The train to Berlin leaves at nine."))
            events = talk.until("response.done")
            done = next(e for e in events if e.type.endswith("transcription.completed"))
            assert "train to Berlin leaves at" in done.transcript
            heard = listener.segments(
                Resampler(24_000, 16_000)(sound_of(events), last=True), Listening("en")
            )[0]
            assert "train to Berlin leaves at" in "".join(one.text for one in heard)

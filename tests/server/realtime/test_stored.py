"""/v1/realtime: the turns of a session stand in a stored chat, as those of /v1/chat."""

from __future__ import annotations

import base64
import gc
import json
import threading
from functools import partial
from pathlib import Path
from socket import SHUT_RDWR
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as raw_connect

from mico_chat.assistant import Assistant
from mico_server.dialects.chat import ChatTurn
from mico_server.realtime.answering import Answering
from mico_server.realtime.conversation import MOST_ITEMS
from mico_server.realtime.session import RealtimeSession
from tests.server.conftest import Start
from tests.server.support.echo import echoing_assistant
from tests.server.support.running import new_key, revoke_keys
from tests.server.support.server_process import ServerProcess
from tests.server.support.talking import ASKED, PICTURE, Talk, speech, talking, texts_of
from tests.support.fakes import FakeAssistant, FakeListener
from tests.support.waiting import PATIENCE_S, until

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

# OpenAI's client connects as older websockets did.
pytestmark = pytest.mark.filterwarnings(
    "ignore:connect.. must be used as a context:DeprecationWarning"
)

NEW: Any = {"conversation": "new"}


def chat_of(talk: Talk) -> str:
    return str(talk.until("conversation.created")[-1].conversation.id)


def stored(http: httpx.Client, id_: str) -> Any:
    found = http.get(f"/v1/conversations/{id_}")
    return found.json() if found.status_code == 200 else {"turns": []}


def spoken(talk: Talk) -> Any:
    """A sentence is said, and answered."""
    talk.update(audio={"input": {"turn_detection": None}})
    talk.speak(speech())
    talk.connection.input_audio_buffer.commit()
    talk.until("conversation.item.done")
    talk.connection.response.create()
    return talk.until("response.done")[-1].response


def test_spoken_turns_stand_in_a_chat(start: Start) -> None:
    assistant = FakeAssistant(listener=FakeListener(ASKED))
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        id_ = chat_of(talk)
        talk.write({"type": "input_image", "image_url": PICTURE})
        response = spoken(talk)
        said = response.output[0].content[0].transcript
        assert response.conversation_id == id_
        talk.connection.response.create(response={"conversation": "none"})
        talk.until("response.done")  # stands nowhere
        talk.ask("And now?")
    first, second = stored(http, id_)["turns"]
    assert (first["message"], first["answer"], first["finish_reason"]) == (ASKED, said, "stop")
    assert [(one["kind"], one["heard"]) for one in first["media"]] == [
        ("image", False),
        ("audio", True),
    ]
    assert [one["kind"] for one in first["reports"]] == ["image", "audio"]
    assert first["usage"]["completion_tokens"] == 2
    assert (second["message"], second["parent"], second["media"]) == ("And now?", 1, [])
    sound = http.get(f"/v1/media/{first['media'][1]['id']}/content").content
    assert sound.startswith(b"RIFF")
    (found,) = http.get("/v1/conversations", params={"query": "in this picture"}).json()["data"]
    assert (found["id"], found["title"]) == (id_, ASKED)

    assistant.reads = ("image",)  # this model can be shown no sounds
    more = {"message": "Once more?", "conversation_id": id_}
    assert http.post("/v1/chat", json=more).json()["turn"] == 3
    again = {"message": ASKED, "conversation_id": id_, "after": 0}
    media = {one["kind"]: f"media:{one['id']}" for one in first["media"]}
    assert http.post("/v1/chat", json={**again, **media}).json()["turn"] == 4
    told = stored(http, f"{id_}?turn=4")
    assert [(one["kind"], one["heard"]) for one in told["turns"][0]["media"]][1] == ("audio", True)
    imported = http.post("/v1/conversations", json=told).json()["id"]
    with talking(http, extra_query={"conversation": imported}) as talk:
        talk.update(output_modalities=["text"])
        talk.ask("What was it?")
    assert texts_of(assistant) == [
        ("user", ASKED),
        ("assistant", told["turns"][0]["answer"]),
        ("user", "What was it?"),
    ]
    assert len(stored(http, imported)["turns"]) == 2


def test_answers_are_cut_at_what_was_heard(start: Start) -> None:
    n_words = 5
    assistant = FakeAssistant(listener=FakeListener("Stop."), allowed=lambda: n_words)
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        id_ = chat_of(talk)
        talk.write({"type": "input_text", "text": "One two. Three four five. Six seven."})
        talk.connection.response.create()
        talk.until("response.output_audio.delta")
        until(lambda: stored(http, id_)["turns"][0]["answer"])  # so far
        talk.speak(speech("Please stop now."))
        cut = talk.until("input_audio_buffer.speech_started", "response.done")[-1].response
        item = cut.output[0]
        (turn,) = stored(http, id_)["turns"]
        assert (turn["answer"], turn["finish_reason"]) == ("[] One two.", "cancelled")
        talk.connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=1)
        talk.until("conversation.item.truncated")
        (turn, *_) = stored(http, id_)["turns"]
        assert turn["answer"] == ""
        n_words = 100
        talk.until("response.done")
        said = talk.ask("One. Two three four five.")[-1].response.output[0]
        assert stored(http, id_)["turns"][-1]["finish_reason"] == "stop"
        talk.connection.conversation.item.truncate(
            item_id=said.id, content_index=0, audio_end_ms=700
        )
        talk.until("conversation.item.truncated")
        talk.connection.conversation.item.retrieve(item_id=said.id)
        heard = talk.until("conversation.item.retrieved")[-1].item.content[0].transcript
        turns = stored(http, id_)["turns"]
        assert said.content[0].transcript.startswith(heard)
        assert "five" not in heard
        assert (turns[-1]["answer"], turns[-1]["finish_reason"]) == (heard, "cancelled")
        assert turns[1]["message"] == "Stop."
    assert not http.get("/v1/conversations", params={"query": "five"}).json()["data"][1:]


def test_who_leaves_finds_what_was_said(start: Start) -> None:
    halfway = threading.Event()
    assistant = FakeAssistant(halfway=halfway)
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        id_ = chat_of(talk)
        talk.update(output_modalities=["text"])
        talk.write({"type": "input_text", "text": "Tell me a story."})
        talk.connection.response.create()
        talk.until("response.output_text.delta")
    until(lambda: stored(http, id_)["turns"][0]["finish_reason"] == "cancelled")
    with talking(http, extra_query={"conversation": id_}) as talk:
        talk.write({"type": "input_text", "text": "Do it slowly."})
        talk.connection.response.create()
        until(lambda: len(stored(http, id_)["turns"]) == 2)
    busy = {"message": "Hello", "conversation_id": id_}
    halfway.set()
    until(lambda: http.post("/v1/chat", json=busy).status_code == 200)
    turns = stored(http, id_)["turns"]
    assert [turn["message"] for turn in turns] == ["Tell me a story.", "Do it slowly.", "Hello"]
    assert turns[0]["answer"].startswith("[]")
    assert (turns[1]["answer"], turns[1]["finish_reason"]) == ("", "unanswered")


def test_media_may_be_left_out(start: Start) -> None:
    http = start(FakeAssistant(listener=FakeListener(ASKED)))
    with talking(http, extra_query={**NEW, "store_media": "false"}) as talk:
        id_ = chat_of(talk)
        talk.write({"type": "input_image", "image_url": PICTURE})
        spoken(talk)
    (turn,) = stored(http, id_)["turns"]
    assert (turn["message"], turn["media"]) == (ASKED, [])
    assert turn["answer"].startswith("[image ")  # the model was shown it
    assert http.get("/v1/media").json()["data"] == []


def test_the_system_prompt_of_a_chat_is_kept(start: Start) -> None:
    assistant = FakeAssistant(listener=FakeListener(ASKED))
    http = start(assistant)
    begun = {"message": "Hello.", "system": "Rhyme."}
    id_ = http.post("/v1/chat", json=begun).json()["conversation_id"]
    with talking(http, extra_query={"conversation": id_}) as talk:
        talk.update(output_modalities=["text"])
        spoken(talk)
        assert texts_of(assistant) == [
            ("system", "Rhyme."),
            ("user", "Hello."),
            ("assistant", "[] Hello."),
            ("user", ASKED),
        ]
        talk.update(instructions="Be brief.")
        for _ in range(MOST_ITEMS):
            talk.write({"type": "input_text", "text": "x"})
        talk.ask("And now?")
        assert texts_of(assistant)[0] == ("system", "Be brief.\n\nRhyme.")
        assert "Hello." not in str(texts_of(assistant))
    assert stored(http, id_)["system"] == "Rhyme."


def test_chats_of_others_are_hidden(start: Start, tmp_path: Path) -> None:
    http = start(FakeAssistant())
    keys = [new_key(tmp_path / "data", name) for name in ("one", "other")]
    with talking(http, keys[0], extra_query=NEW) as talk:
        id_ = chat_of(talk)
        talk.update(output_modalities=["text"])
        talk.ask("Hello.")
    url = f"ws{str(http.base_url)[4:]}/v1/realtime"
    for query, key, status, said in (
        (f"conversation={id_}", keys[1], 404, b"no conversation"),
        ("conversation=conv-x", keys[0], 404, b"no conversation"),
        ("conversation=new&store_media=maybe", keys[0], 400, b"store_media"),
    ):
        headers = {"authorization": f"Bearer {key}"}
        with (
            pytest.raises(InvalidStatus) as refused,
            raw_connect(f"{url}?{query}", additional_headers=headers),
        ):
            pass
        assert refused.value.response.status_code == status
        assert said in refused.value.response.body
    with talking(http, keys[0], extra_query={"conversation": id_}) as talk:
        assert chat_of(talk) == id_


def test_what_was_said_outlives_the_process(tmp_path: Path) -> None:
    said = "Say q000001."
    with ServerProcess(data_dir=tmp_path, pause_s=0.3) as process:
        http = httpx.Client(base_url=process.url, timeout=PATIENCE_S)
        with http, talking(http, extra_query=NEW) as talk:
            id_ = chat_of(talk)
            talk.update(output_modalities=["text"])
            talk.write({"type": "input_text", "text": said})
            talk.connection.response.create()
            until(lambda: stored(http, id_)["turns"])
            until(lambda: stored(http, id_)["turns"][0]["answer"])
            process.kill()
    with (
        ServerProcess(data_dir=tmp_path) as process,
        httpx.Client(base_url=process.url, timeout=PATIENCE_S) as http,
    ):
        (turn,) = stored(http, id_)["turns"]
        assert (turn["message"], turn["finish_reason"]) == (said, "unanswered")
        assert "q000001 n1".startswith(turn["answer"][:10])
        with talking(http, extra_query={"conversation": id_}) as talk:
            talk.update(output_modalities=["text"])
            talk.ask("Say q000002.")
        assert len(stored(http, id_)["turns"]) == 2


def never_done(decoder: Any, *, pause_s: float) -> Assistant:
    """An assistant that listens to a recording for ever."""
    assistant = echoing_assistant(decoder, pause_s=pause_s)
    listener = SimpleNamespace(segments=lambda samples, how: threading.Event().wait())
    reader: Any = SimpleNamespace(listener=listener)
    assistant.encoder.reader = reader
    return assistant


def committed(talk: Talk) -> None:
    """A sentence was said, and is written down."""
    talk.update(audio={"input": {"turn_detection": None, "transcription": {}}})
    talk.speak(speech())
    talk.connection.input_audio_buffer.commit()
    talk.until("conversation.item.input_audio_transcription.completed")


def test_a_recording_outlives_the_process_before_it_is_written_down(tmp_path: Path) -> None:
    with ServerProcess(data_dir=tmp_path, make=never_done) as process:
        http = httpx.Client(base_url=process.url, timeout=PATIENCE_S)
        with http, talking(http, extra_query=NEW) as talk:
            id_ = chat_of(talk)
            talk.update(audio={"input": {"turn_detection": None}})
            talk.speak(speech())
            talk.connection.input_audio_buffer.commit()
            until(lambda: stored(http, id_)["turns"])
            process.kill()
    with (
        ServerProcess(data_dir=tmp_path) as process,
        httpx.Client(base_url=process.url, timeout=PATIENCE_S) as http,
    ):
        (turn,) = stored(http, id_)["turns"]
        assert (turn["message"], turn["finish_reason"]) == ("", "unanswered")
        (sound,) = turn["media"]
        assert sound["heard"]
        assert http.get(f"/v1/media/{sound['id']}/content").content.startswith(b"RIFF")
        with talking(http, extra_query={"conversation": id_}) as talk:
            talk.update(output_modalities=["text"])
            talk.ask("Say q000002.")
        assert len(stored(http, id_)["turns"]) == 2


def test_what_nobody_answered_keeps_its_words(start: Start) -> None:
    listener = FakeListener(ASKED)
    http = start(FakeAssistant(listener=listener))
    with talking(http, extra_query=NEW) as talk:
        id_ = chat_of(talk)
        for words in ("One.", "Two.", ""):
            listener.said = (words,)
            committed(talk)
        (turn,) = stored(http, id_)["turns"]
        assert ([one["heard"] for one in turn["media"]], turn["message"]) == ([True] * 3, "")
    until(lambda: stored(http, id_)["turns"][0]["message"])
    (turn,) = stored(http, id_)["turns"]
    assert (turn["turn"], turn["message"], turn["answer"]) == (1, "One.\nTwo.", "")
    assert [one["heard"] for one in turn["media"]] == [True, True, False]  # noise is shown
    with talking(http, extra_query=NEW) as talk:
        noise = chat_of(talk)
        committed(talk)
        assert len(stored(http, noise)["turns"]) == 1
    until(lambda: not stored(http, noise)["turns"])
    assert http.get(f"/v1/conversations/{noise}").status_code == 404


def test_a_recording_is_asked_again_where_its_turn_was_deleted(start: Start) -> None:
    http = start(FakeAssistant(listener=FakeListener(ASKED)))
    with talking(http, extra_query=NEW) as talk:
        id_ = chat_of(talk)
        talk.update(output_modalities=["text"])
        talk.ask("Hello.")
        committed(talk)
        assert http.delete(f"/v1/conversations/{id_}/turns/2").is_success
        talk.connection.response.create()
        assert talk.until("response.done")[-1].response.status == "completed"
        _, second = stored(http, id_)["turns"]
        assert (second["message"], second["parent"]) == (ASKED, 1)
        assert [one["heard"] for one in second["media"]] == [True]


def test_a_hundred_sessions_that_are_dropped_leave_nothing(start: Start, tmp_path: Path) -> None:
    assistant = FakeAssistant(halfway=threading.Event(), listener=FakeListener(ASKED))
    http = start(assistant, max_realtime_sessions=4)
    url = f"ws{str(http.base_url)[4:]}/v1/realtime?conversation=new"
    story = {"type": "input_text", "text": "Tell me a story."}
    picture = {"type": "input_image", "image_url": PICTURE}
    item = {"type": "message", "role": "user", "content": [story, picture]}
    sound = base64.b64encode(speech()).decode()
    said: list[list[dict[str, Any]]] = [
        [],
        [{"type": "input_audio_buffer.append", "audio": sound[:60_000]}],
        [{"type": "input_audio_buffer.append", "audio": sound}],
        [{"type": "conversation.item.create", "item": item}, {"type": "response.create"}],
    ]

    def opened() -> Any:
        try:
            return raw_connect(url, max_size=None)
        except InvalidStatus:  # those before have not ended yet
            return None

    def began(n: int) -> bool:
        return len(assistant.asked) > n

    for number in range(100):
        socket = until(opened)
        for event in said[number % 4]:
            socket.send(json.dumps(event))
        if number % 4 == 3:
            until(partial(began, number // 4))
        socket.socket.shutdown(SHUT_RDWR)  # without a word
    kinds = (RealtimeSession, Answering, ChatTurn)
    until(lambda: gc.collect() >= 0 and not any(type(one) in kinds for one in gc.get_objects()))
    assert list((tmp_path / "data").glob("**/work-*")) == []
    with talking(http) as talk:
        assert assistant.halfway is not None
        assistant.halfway.set()
        talk.update(output_modalities=["text"])
        assert talk.ask("Hello.")[-1].response.status == "completed"


def test_a_withdrawn_key_ends_an_answer(start: Start, tmp_path: Path) -> None:
    assistant = FakeAssistant(halfway=threading.Event())
    http = start(assistant)
    key = new_key(tmp_path / "data", "someone")
    with talking(http, key, extra_query=NEW) as talk:
        talk.update(output_modalities=["text"])
        talk.write({"type": "input_text", "text": "Tell me a story."})
        talk.connection.response.create()
        talk.until("response.output_text.delta")
        revoke_keys(tmp_path / "data")
        assert talk.error().code == "invalid_api_key"
    until(assistant.cancelled.is_set)

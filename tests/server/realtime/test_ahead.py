"""An answer is begun at the likely end of a turn, and dropped if the speaker goes on."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from mico_chat.messages import Message
from mico_chat.reading.speech import Listening
from mico_chat.speech.sound import to_raw
from mico_server.realtime.thinking import Thinking
from tests.server.conftest import Start
from tests.server.support.running import new_key
from tests.server.support.scripted import ScriptedModel, scripted_assistant
from tests.server.support.talking import ASKED, PICTURE, Talk, speech, talking, texts_of
from tests.support.fakes import FakeAssistant, FakeDecoder, FakeListener
from tests.support.waiting import PATIENCE_S, until

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

# OpenAI's client connects as older websockets did.
pytestmark = pytest.mark.filterwarnings(
    "ignore:connect.. must be used as a context:DeprecationWarning"
)

NEW: Any = {"conversation": "new"}
QUIET = to_raw(np.zeros(24_000 * 3, np.float32), "audio/pcm")


def pausing(talk: Talk, **detection: Any) -> None:
    """A sentence is said in a turn that ends after a long silence, which has not passed yet."""
    slow = {"type": "server_vad", "silence_duration_ms": 2000, **detection}
    hearing = {"transcription": {}, "turn_detection": slow}
    talk.update(output_modalities=["text"], audio={"input": hearing})
    talk.speak(speech(quiet_s=0.6))


def figure(http: httpx.Client, name: str) -> float:
    found = re.search(rf"^mico_{name}(?:_total)? (.+)$", http.get("/metrics").text, re.M)
    return 0.0 if found is None else float(found[1])


def turns_in(http: httpx.Client) -> list[Any]:
    chats = [one["id"] for one in http.get("/v1/conversations").json()["data"]]
    return [turn for id_ in chats for turn in http.get(f"/v1/conversations/{id_}").json()["turns"]]


def test_an_answer_begins_before_its_turn_has_ended(start: Start) -> None:
    assistant = FakeAssistant(listener=FakeListener(ASKED))
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        pausing(talk)
        until(lambda: figure(http, "time_to_first_token_seconds_count") == 1)
        assert (figure(http, "completion_tokens"), turns_in(http)) == (0, [])
        talk.speak(QUIET)
        events = talk.until("response.done")
        kinds = [event.type for event in events]
        assert kinds[: kinds.index("response.output_text.delta")] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            "conversation.item.input_audio_transcription.completed",
            "response.created",
            "response.output_item.added",
            "conversation.item.added",
            "response.content_part.added",
        ]
        listener: Any = assistant.encoder.reader.listener
        assert len(assistant.asked) == len(listener.asked) == 1
        said = events[-1].response
        assert (said.output[0].content[0].text, said.usage.output_tokens) == (f"[] {ASKED}", 2)
        assert figure(http, "completion_tokens") == 2
        (turn,) = turns_in(http)
        assert (turn["message"], turn["answer"]) == (ASKED, f"[] {ASKED}")


@pytest.mark.parametrize("whole", [False, True])
def test_an_answer_is_dropped_where_speech_goes_on(start: Start, whole: bool) -> None:
    halfway = threading.Event()
    assistant = FakeAssistant(halfway=halfway, listener=FakeListener(ASKED))
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        if whole:
            halfway.set()
        pausing(talk)
        until(lambda: figure(http, "time_to_first_token_seconds_count") == 1)
        talk.speak(speech(quiet_s=0.0)[: 2 * 24_000])  # a second of it, without its end
        if not whole:
            until(assistant.cancelled.is_set)
        assert len(assistant.asked) == 1
        talk.speak(QUIET[: 2 * 24_000 * 6 // 10])
        until(lambda: len(assistant.asked) == 2)  # at the next pause another one begins
        assert (figure(http, "completion_tokens"), turns_in(http)) == (0, [])
        halfway.set()
        talk.speak(QUIET)
        kinds = [event.type for event in talk.until("response.done")]
        assert kinds[:2] == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
        ]
        assert kinds.count("response.created") == 1
        assert len(assistant.asked) == 2
        assert figure(http, "completion_tokens") == 2
        assert len(turns_in(http)) == 1


def write(talk: Talk) -> None:
    talk.write({"type": "input_text", "text": "In one word."})


CHANGES: dict[str, Callable[[Talk], Any]] = {
    "session": lambda talk: talk.update(instructions="Be brief."),
    "conversation": write,
    "buffer": lambda talk: talk.connection.input_audio_buffer.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_answer_is_dropped_where_its_question_changes(start: Start, change: str) -> None:
    halfway = threading.Event()
    assistant = FakeAssistant(halfway=halfway, listener=FakeListener(ASKED))
    with talking(start(assistant)) as talk:
        pausing(talk)
        until(lambda: assistant.asked)
        CHANGES[change](talk)
        until(assistant.cancelled.is_set)
        halfway.set()
        talk.speak(QUIET)
        if change == "buffer":
            talk.ask(ASKED)
        else:
            talk.until("response.done")
        assert len(assistant.asked) == 2
        assert (("user", f"In one word.\n{ASKED}") in texts_of(assistant)) == (
            change == "conversation"
        )
        assert (("system", "Be brief.") in texts_of(assistant)) == (change == "session")


def test_an_answer_is_dropped_where_the_client_leaves(start: Start) -> None:
    assistant = FakeAssistant(halfway=threading.Event(), listener=FakeListener(ASKED))
    http = start(assistant)
    with talking(http, extra_query=NEW) as talk:
        pausing(talk)
        until(lambda: assistant.asked)
    until(assistant.cancelled.is_set)
    assert turns_in(http) == []


def test_no_answer_is_begun_that_the_key_will_not_get(start: Start, tmp_path: Path) -> None:
    assistant = FakeAssistant(listener=FakeListener(ASKED))
    http = start(assistant)
    key = new_key(tmp_path / "data", "someone", rate_limit="1/day")  # the session's own request
    with talking(http, key) as talk:
        pausing(talk)
        listener: Any = assistant.encoder.reader.listener
        until(lambda: listener.asked)
        talk.speak(QUIET)
        assert "reached its limit" in talk.error().message
        assert assistant.asked == []


def test_no_answer_is_begun_that_the_client_asks_for_itself(start: Start) -> None:
    assistant = FakeAssistant(listener=FakeListener(ASKED))
    with talking(start(assistant)) as talk:
        pausing(talk, create_response=False)
        listener: Any = assistant.encoder.reader.listener
        until(lambda: listener.asked)
        talk.speak(QUIET)
        talk.until("conversation.item.input_audio_transcription.completed")
        talk.update()
        assert assistant.asked == []


class HeldListener(FakeListener):
    """Hears nothing until it is ``let``."""

    def __init__(self, *said: str) -> None:
        super().__init__(*said)
        self.let = threading.Event()

    def segments(self, samples: Any, how: Listening) -> tuple[Iterator[Any], str]:
        found = super().segments(samples, how)
        assert self.let.wait(PATIENCE_S)
        return found


def test_what_is_being_written_down_stays_where_the_next_turn_begins(start: Start) -> None:
    """A turn ends in a pause of its speaker, who goes on before its words are known."""
    listener = HeldListener(ASKED)
    assistant = FakeAssistant(listener=listener)
    with talking(start(assistant)) as talk:
        pausing(talk, silence_duration_ms=300)
        until(lambda: listener.asked)
        talk.until("conversation.item.done")
        talk.speak(speech(quiet_s=0.0))
        talk.until("input_audio_buffer.speech_started")
        listener.let.set()
        talk.speak(QUIET)
        heard = "conversation.item.input_audio_transcription.completed"
        assert [talk.until(heard)[-1].transcript for _ in range(2)] == [ASKED, ASKED]
        assert talk.until("response.done")[-1].response.status == "completed"


def test_words_that_are_known_after_their_turn_are_thought_about_once(start: Start) -> None:
    listener = HeldListener(ASKED)
    assistant = FakeAssistant(listener=listener)
    with talking(start(assistant)) as talk:
        pausing(talk, silence_duration_ms=300)
        until(lambda: listener.asked)
        talk.until("conversation.item.done")
        assert assistant.asked == []
        listener.let.set()
        talk.until("response.done")
        assert texts_of(assistant) == [("user", ASKED)]
        assert len(assistant.asked) == len(listener.asked) == 1


@pytest.mark.parametrize("n_letters", [10, 600])
def test_nobody_waits_for_what_has_no_room(
    start: Start, monkeypatch: pytest.MonkeyPatch, n_letters: int
) -> None:
    """Of a talk beyond four pictures, or the model's context, old turns go while nobody speaks."""
    ready, get_ready = threading.Semaphore(0), Thinking.get_ready

    async def and_then(self: Thinking, next_: Sequence[Message]) -> None:
        await get_ready(self, next_)
        ready.release()

    monkeypatch.setattr(Thinking, "get_ready", and_then)
    assistant = scripted_assistant(FakeDecoder(), ScriptedModel({"": "I see."}))
    http = start(assistant, max_media=4)
    given, new = list[int](), list[int]()
    with talking(http) as talk:
        talk.update(output_modalities=["text"])
        for number in range(24):
            talk.write({"type": "input_image", "image_url": PICTURE})
            usage = talk.ask(f"{number}: {n_letters * 'x'}?")[-1].response.usage
            given.append(usage.input_tokens)
            new.append(usage.input_tokens - usage.input_token_details.cached_tokens)
            assert ready.acquire(timeout=PATIENCE_S)
        assert figure(http, "completion_tokens") == 24 * usage.output_tokens, "nothing else counts"
    assert given[-1] < 0.8 * 24 * (given[1] - given[0]), "something went"
    assert max(new[1:]) < 1.5 * new[0], "an answer computes its own question alone"

"""A session of /v1/realtime that OpenAI's own client leads, and what it says by a voice."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from openai import OpenAI
from openai.resources.realtime.realtime import RealtimeConnection
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from mico_chat.speech import Voices
from mico_chat.speech.hearing import Resampler
from mico_chat.speech.sound import RATES, from_raw, to_raw
from tests.server.support import sent
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S

ASKED = "What is in this picture?"
EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)
PICTURE = sent.data_uri("image/png", sent.png(sent.square()))


class Talk:
    """A session of the client; each event is what OpenAI says that it is."""

    def __init__(self, connection: RealtimeConnection) -> None:
        self.connection = connection
        self.until("session.created")

    def until(self, *kinds: str) -> list[Any]:
        """The events up to the last of ``kinds``, which come in this order."""
        found: list[Any] = []
        for kind in kinds:
            while True:
                event = self.event()
                found.append(event)
                if event.type == kind:
                    break
                assert event.type != "error", event
        return found

    def event(self) -> Any:
        """The next one, as the client reads it, but not for ever."""
        text = self.connection._connection.recv(PATIENCE_S)
        return EVENT.validate_python(json.loads(text))

    def error(self) -> Any:
        while (event := self.event()).type != "error":
            pass
        return event.error

    def update(self, **session: Any) -> Any:
        given: Any = {"type": "realtime", **session}
        self.connection.session.update(session=given)
        return self.until("session.updated")[-1].session

    def write(self, *parts: dict[str, Any]) -> None:
        item: Any = {"type": "message", "role": "user", "content": parts}
        self.connection.conversation.item.create(item=item)
        self.until("conversation.item.done")

    def ask(self, text: str) -> list[Any]:
        self.write({"type": "input_text", "text": text})
        self.connection.response.create()
        return self.until("response.done")

    def speak(self, raw: bytes) -> None:
        for at in range(0, len(raw), 9600):  # of uneven pieces in time
            piece = base64.b64encode(raw[at : at + 9600]).decode()
            self.connection.input_audio_buffer.append(audio=piece)


@contextmanager
def talking(http: httpx.Client, key: str = "none", **options: Any) -> Iterator[Talk]:
    with (
        OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0) as client,
        client.realtime.connect(model="gpt-realtime", max_retries=0, **options) as connection,
    ):
        yield Talk(connection)


def speech(text: str = ASKED, form: str = "audio/pcm", quiet_s: float = 1.0) -> bytes:
    """A sentence and the silence behind it."""
    voice = Voices().get()
    samples = np.concatenate([*voice.say(text), np.zeros(int(24_000 * quiet_s), np.float32)])
    return to_raw(Resampler(24_000, RATES[form])(samples, last=True), form)


def sound_of(events: list[Any], form: str = "audio/pcm") -> Any:
    kind = "response.output_audio.delta"
    return from_raw(b"".join(base64.b64decode(e.delta) for e in events if e.type == kind), form)


def texts_of(assistant: FakeAssistant) -> list[tuple[str, str]]:
    return [(one.role, one.text) for one in assistant.asked[-1]]

"""A response that is cut off between two events."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.messages import Message
from mico_chat.speech.events import Response, Session
from mico_server.realtime.answering import PIECE_BYTES, Answering
from mico_server.realtime.conversation import Kept
from mico_server.realtime.thinking import Thinking
from mico_server.settings import ServerSettings

TEXT = "One two three four five six seven eight."


class Voice:
    """Says each sentence in eight events of sound, half a second each."""

    name, sample_rate, language = "slow", 24_000, "en"

    def say(self, text: str, speed: float = 1.0) -> Iterator[NDArray[np.float32]]:
        yield np.zeros(8 * PIECE_BYTES // 2, np.float32)


class Host:
    assistant = SimpleNamespace(check_length=lambda ask: None)

    async def stream(self, ask: Any, wanted: asyncio.Event) -> AsyncIterator[Delta]:
        yield Delta(text=TEXT)


class Client:
    tenant = ""
    service = SimpleNamespace(settings=ServerSettings())

    async def use(self, stack: AsyncExitStack, name: str | None) -> Host:
        return Host()


@pytest.mark.parametrize(("events", "said"), [(1, "One"), (4, TEXT[:18]), (7, TEXT[:33])])
def test_of_a_sentence_that_is_cut_off_stays_what_was_sent(events: int, said: str) -> None:
    sent, items = 0, list[Kept]()
    answering: Any = None
    task: Any = None

    async def say(kind: str, **fields: Any) -> None:
        nonlocal sent
        if kind == "response.output_audio.delta":
            if sent == events:
                answering.reason = "turn_detected"
                task.cancel()
                await asyncio.Event().wait()
            sent += 1

    async def think() -> Thinking:
        return Thinking(Client(), Session(), [Message.user("Count.")])  # type: ignore[arg-type]

    async def begin(kept: Kept) -> None:
        items.append(kept)

    async def answer() -> None:
        nonlocal answering, task
        client: Any = Client()
        response = Response(output_modalities=["audio"])
        answering = Answering(client, Session(), response, Voice(), say)
        task = asyncio.create_task(answering.run(think, begin, lambda: "en"))
        await task

    asyncio.run(answer())
    (kept,) = items
    assert answering.response.status == "cancelled"
    assert kept.item.content[0].transcript == said
    kept.truncate(500 * events)  # the client has heard all that came
    assert kept.item.content[0].transcript == said
    with pytest.raises(RequestError, match=f"has {500 * events} ms of sound"):
        kept.truncate(500 * events + 100)

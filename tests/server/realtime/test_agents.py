"""/v1/realtime: the session of OpenAI's agents, unmodified, against a service in its own process.

The questions are spoken by a voice and written down by Whisper.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mico_chat.assistant import Assistant
from mico_chat.reading import MediaReader
from mico_chat.reading.speech import Listener, folder
from mico_chat.speech.sound import RATES
from tests.server.support.scripted import CALL, ScriptedModel, scripted_assistant
from tests.server.support.server_process import ServerProcess
from tests.server.support.talking import PICTURE, speech
from tests.support.waiting import PATIENCE_S

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

pytestmark = [
    pytest.mark.agents,
    pytest.mark.slow,
    pytest.mark.anyio,
    pytest.mark.skipif(
        importlib.util.find_spec("agents") is None,
        reason="openai-agents is not installed here; `make test-agents` has it",
    ),
    pytest.mark.skipif(
        not folder().is_dir(), reason="the weights of Whisper are not there: mico-chat setup"
    ),
]

SENTENCE = "The dog ran away. "
ANSWERS = {
    "Berlin": CALL,
    "WARM": "It is warm today.",
    "story": SENTENCE * 300,
    "Stop": "I am silent.",
    "picture": "I see.",
}


def hearing_assistant(decoder: Any, *, pause_s: float) -> Assistant:
    assistant = scripted_assistant(decoder, ScriptedModel(ANSWERS))
    assistant.encoder.reader = MediaReader(listener=Listener())
    return assistant


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    data_dir = tmp_path_factory.mktemp("agents")
    with ServerProcess(decodes=True, make=hearing_assistant, data_dir=data_dir) as one:
        yield one


class Led:
    """A session and its events; an error among them fails the test."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.history: list[Any] = []
        self._events = session.__aiter__()

    async def until(self, *kinds: str) -> list[Any]:
        """The events up to the last of ``kinds``, which come in this order.

        Those of the model have the names of the service's.
        """
        found: list[Any] = []
        async with asyncio.timeout(PATIENCE_S):
            for kind in kinds:
                while not found or kind not in (found[-1].type, _raw(found[-1]).get("type")):
                    found.append(await anext(self._events))
                    assert found[-1].type != "error", found[-1].error
                    if found[-1].type == "history_updated":
                        self.history = found[-1].history
        return found


@asynccontextmanager
async def run(service: ServerProcess, *tools: Any, **options: Any) -> AsyncIterator[Led]:
    from agents.realtime import RealtimeAgent, RealtimeRunner

    url = f"ws{service.url[4:]}/v1/realtime"
    agent: Any = RealtimeAgent(name="guide", instructions="Be brief.", tools=list(tools))
    config: Any = {"url": url, "api_key": "none", **options}
    async with await RealtimeRunner(agent).run(model_config=config) as session:
        yield Led(session)


def _raw(event: Any) -> dict[str, Any]:
    data = getattr(event, "data", None)
    return data.data if data is not None and data.type == "raw_server_event" else {}


def written(history: Any) -> list[str]:
    """What each item of a history says."""
    texts = [f"{one.name}: {one.output}" for one in history if one.type == "function_call"]
    messages = [one.content for one in history if one.type == "message"]
    return [getattr(part, "transcript", None) or part.text for (part,) in messages] + texts


async def test_a_tool_answers_a_spoken_question(service: ServerProcess) -> None:
    from agents import function_tool

    asked = []

    def weather(city: str) -> str:
        """Tells the weather."""
        asked.append(city)
        return "WARM"

    async with run(service, function_tool(weather)) as led:
        await led.session.send_audio(speech("How is the weather in Berlin?"))
        events = await led.until("tool_start", "tool_end", "audio", "audio_end", "agent_end")
        assert asked == ["Berlin"]
        sound = b"".join(one.audio.data for one in events if one.type == "audio")
        assert 1 < len(sound) / 2 / RATES["audio/pcm"] < 4
        assert written(led.history) == [
            "How is the weather in Berlin?",
            "It is warm today.",
            "weather: WARM",
        ]
        content = [{"type": "input_image", "image_url": PICTURE}]
        content.append({"type": "input_text", "text": "What is in this picture?"})
        await led.session.send_message({"type": "message", "role": "user", "content": content})
        await led.until("audio_end", "agent_end")
        assert led.history[-1].content[0].transcript == "I see."


@pytest.mark.parametrize("by", ["speech", "the application", "an application that finds turns"])
async def test_an_answer_is_interrupted(service: ServerProcess, by: str) -> None:
    from agents.realtime import RealtimePlaybackTracker

    tracker = RealtimePlaybackTracker()
    options: Any = {"playback_tracker": tracker}
    if by == "an application that finds turns":
        options["initial_model_settings"] = {"turn_detection": None}
    async with run(service, **options) as led:
        await led.session.send_message("Tell me a story.")
        audio = (await led.until("audio"))[-1]
        tracker.on_play_ms(audio.item_id, audio.content_index, 400)  # within the first sentence
        if by == "speech":
            await led.session.send_audio(speech("Stop it, please."))
        else:
            await led.session.interrupt()
        await led.until("audio_interrupted", "response.done", "conversation.item.truncated")
        await led.until("conversation.item.retrieved", "history_updated")
        (heard,) = [one for one in led.history if one.item_id == audio.item_id]
        assert heard.content[0].transcript in ("", "The", "The dog", "The dog ran")
        if by != "speech":
            await led.session.send_message("Stop it, please.")
        await led.until("audio_end", "agent_end")
        assert written(led.history)[-1] == "I am silent."

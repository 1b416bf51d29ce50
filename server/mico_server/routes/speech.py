"""POST /v1/audio/speech: a text read aloud, in the form of OpenAI's API, as it is made."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, closing
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import RequestError
from mico_chat.late import late
from mico_chat.speech import FASTEST, SLOWEST, Voice, Voices, check_language
from mico_server.host import ModelHost
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import FILE_SCHEMA, stream_response
from mico_server.service import EVENTS, Client, CurrentClient, EventStream, event
from mico_server.store.tables import check_text

with late():
    from mico_chat.speech import sound

router = APIRouter(route_class=JsonRoute)

T = TypeVar("T")

MODELS = ("hibari", "tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Names that a request may give instead of a served model's: clients of OpenAI send the others."""
VOICES = {"alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"}
VOICES |= {"sage", "shimmer", "verse"}
"""OpenAI's voices, which clients send: each is the service's own voice."""

MAX_CHARACTERS = 4096
KINDS = ("audio/mpeg", "audio/ogg", "audio/aac", "audio/flac", "audio/wav", "audio/pcm")


class VoiceId(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str


class SpeechRequest(BaseModel):
    """A text to be read aloud."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        description=f"the served model's name, or {', '.join(MODELS)}", examples=["hibari"]
    )
    input: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    voice: str | VoiceId = Field(
        "alloy", description="a voice of this machine; OpenAI's names are the service's own voice"
    )
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = Field(
        "mp3", description="pcm is 24,000 samples a second of 16 bits, without a header"
    )
    speed: float = Field(1.0, ge=SLOWEST, le=FASTEST)
    stream_format: Literal["audio", "sse"] = Field(
        "audio", description="sse: events with pieces of the file in base64"
    )
    language: str | None = Field(
        None, description="the text's language (ISO 639-1), refused where no voice speaks it"
    )


def voice_of(voices: Voices, name: str | None) -> Voice:
    """The voice that a client names; blocks while it is loaded."""
    return voices.get(None if name in VOICES else name)


@router.post(
    "/v1/audio/speech",
    response_class=Response,
    responses={
        200: {
            "description": "The sound file, sent while it is made; or events of it.",
            "content": {
                **{kind: {"schema": FILE_SCHEMA} for kind in KINDS},
                **stream_response("", "AudioEvent")["content"],
            },
        },
        **error_responses(400, 404, 413, 501, 504),
    },
)
async def speak(body: SpeechRequest, client: CurrentClient) -> Response:
    """Read a text aloud. Markdown, numbers and units are put into words; code is left out.

    The first sentence is sent while the second is made.
    """
    check_text(body.input, "input")
    client.service.models.check(client.tenant)
    async with AsyncExitStack() as stack:
        host = await client.use(stack, None if body.model in MODELS else body.model)
        name = body.voice if isinstance(body.voice, str) else body.voice.id
        voice = await asyncio.to_thread(voice_of, client.service.voices, name)
        check_language(voice, body.input, body.language)
        pieces = _pieces(body, voice, client, host, stack.pop_all())
        form = body.response_format
        return await EventStream.started(
            pieces,
            client.receive,
            send_timeout_s=client.service.settings.body_timeout_s,
            media_type=sound.TYPES[form] if body.stream_format == "audio" else EVENTS,
        )


async def _pieces(
    body: SpeechRequest, voice: Voice, client: Client, host: ModelHost, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """The pieces of the file, or its events. The first needs the first sentence alone."""
    seconds = 0.0

    def said() -> Iterator[NDArray[np.float32]]:
        nonlocal seconds
        for samples in voice.say(body.input, body.speed):
            seconds += len(samples) / voice.sample_rate
            yield samples

    async with stack:
        with closing(sound.encoded(said(), voice.sample_rate, body.response_format)) as file:
            while True:
                piece = await host.guarded(in_thread(file))
                if not seconds:
                    raise RequestError.at("input", "nothing in it can be read aloud")
                if piece is None:
                    break
                if body.stream_format == "audio":
                    yield piece
                else:
                    data = base64.b64encode(piece).decode()
                    yield event({"type": "speech.audio.delta", "audio": data})
        if body.stream_format == "sse":
            usage: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
            yield event({"type": "speech.audio.done", "usage": usage})


async def in_thread(pieces: Iterator[T]) -> T | None:
    """The next piece, made in a thread; None behind the last. A cancelled wait lets it end."""
    making = asyncio.ensure_future(asyncio.to_thread(next, pieces, None))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        await asyncio.wait((making,))  # a generator that runs cannot be closed
        raise

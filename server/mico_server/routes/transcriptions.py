"""POST /v1/audio/transcriptions: what is said in a recording, in the form of OpenAI's API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse

from mico_chat.errors import RequestError
from mico_chat.media import Audio, MediaFile, MediaLimits
from mico_chat.reading import why_not_listening
from mico_chat.reading.speech import NAME, Listener, Listening
from mico_server.errors import UnsupportedError
from mico_server.http.errors import error_responses
from mico_server.routes.bodies import (
    FILE_SCHEMA,
    check_known,
    open_form,
    request_body,
    saved,
    stream_response,
    validated,
)
from mico_server.service import CurrentClient, EventStream, event

router = APIRouter()

ALIASES = (NAME, "whisper-1")
"""Names that a request may give instead of the served model's: clients of OpenAI send the last."""

GRANULARITIES = "timestamp_granularities[]"


class TranscriptionFields(BaseModel):
    """The fields of a request beside its file."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(
        description=f"the served model's name, or {' or '.join(ALIASES)}", examples=["mini"]
    )
    language: str | None = Field(
        None, description="the language's code (ISO 639-1), such as en; found out by default"
    )
    prompt: str | None = Field(
        None, description="text before the recording: its style and the spelling of names"
    )
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: float = Field(0.0, ge=0, le=1, description="0 always gives the same text")
    timestamp_granularities: tuple[Literal["word", "segment"], ...] = Field(
        (), alias=GRANULARITIES, description="times of what; for verbose_json alone"
    )
    stream: bool = Field(
        False, description="events of the text so far; for response_format json and verbose_json"
    )


class Duration(BaseModel):
    """Seconds of sound that a request took."""

    type: Literal["duration"] = "duration"
    seconds: float


class Transcription(BaseModel):
    """What is said in a recording; the text is empty where nobody speaks."""

    text: str
    usage: Duration


class TranscribedSegment(BaseModel):
    """A stretch of speech. ``avg_logprob`` is the mean of its tokens' log-probabilities."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class TranscribedWord(BaseModel):
    """A word and the seconds in which it is said."""

    model_config = ConfigDict(from_attributes=True)

    word: str
    start: float
    end: float


class VerboseTranscription(Transcription):
    """What is said in a recording, with times. ``language`` is its English name."""

    task: Literal["transcribe"] = "transcribe"
    language: str
    duration: float
    segments: list[TranscribedSegment] | None = None
    words: list[TranscribedWord] | None = None


_FIELDS = TranscriptionFields.model_json_schema()
_BODY: dict[str, Any] = {
    "type": "object",
    "required": ["file", *_FIELDS["required"]],
    "properties": {"file": FILE_SCHEMA, **_FIELDS["properties"]},
    "additionalProperties": False,
}


@router.post(
    "/v1/audio/transcriptions",
    response_model=Transcription | VerboseTranscription,
    responses={
        200: {
            "description": "As JSON, or for `text`, `srt` and `vtt` as text; with `stream` events "
            "`transcript.text.delta`, then `transcript.text.done`.",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                **stream_response("", "AudioEvent")["content"],
            },
        },
        **error_responses(400, 404, 413, 422, 501, 504),
    },
    openapi_extra=request_body({"multipart/form-data": _BODY}),
)
async def transcribe(request: Request, client: CurrentClient) -> Transcription | Response:
    """Write down what is said in a sound file, or in a video's sound track."""
    client.service.models.check(client.tenant)
    async with open_form(request, client.service.settings) as form, AsyncExitStack() as stack:
        folder = await stack.enter_async_context(client.service.media.work_folder())
        file: MediaFile | None = None
        texts: dict[str, Any] = {}
        for name, value in form.multi_items():
            check_known(name, ("file", *_FIELDS["properties"]))
            if name == "file" and not isinstance(value, str) and file is None:
                file = await saved("audio", value, folder.file("recording"))
            elif name == "file" or not isinstance(value, str):
                raise RequestError.at(name, "expected one file" if name == "file" else "no file")
            elif name == GRANULARITIES:
                texts[name] = (*texts.get(name, ()), value)
            else:
                texts[name] = value
        if file is None:
            raise RequestError.at("file", "expected a recording, as a file of the form")
        fields = validated(TranscriptionFields, texts)
        if fields.stream and fields.response_format not in ("json", "verbose_json"):
            raise RequestError.at(
                "stream", "only response_format json and verbose_json have events"
            )
        if fields.timestamp_granularities and fields.response_format != "verbose_json":
            raise RequestError.at(GRANULARITIES, "only response_format verbose_json has times")
        wanted = None if fields.model in ALIASES else fields.model
        host = await client.use(stack, wanted)
        encoder = host.assistant.encoder
        listener = None if encoder.reader is None else encoder.reader.listener
        if listener is None:
            raise UnsupportedError(why_not_listening())
        said: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(text: str) -> None:
            loop.call_soon_threadsafe(said.put_nowait, text)

        written = partial(_written_down, fields, listener, tell)
        work = host.guarded(encoder.listened(file, written, tenant=client.tenant))
        if fields.stream:
            events = _events(fields, work, said, stack.pop_all())
            wait_s = client.service.settings.body_timeout_s
            return await EventStream.started(events, client.receive, send_timeout_s=wait_s)
        found = await client.connected(work)
    match fields.response_format:
        case "verbose_json":
            return found
        case "json":
            return Transcription(text=found.text, usage=found.usage)
        case "text":
            return PlainTextResponse(f"{found.text}\n")
    return PlainTextResponse("".join(_subtitles(found, vtt=fields.response_format == "vtt")))


async def _events(
    fields: TranscriptionFields,
    work: Awaitable[VerboseTranscription],
    said: asyncio.Queue[str | None],
    stack: AsyncExitStack,
) -> AsyncGenerator[bytes, None]:
    """An event for each piece of text as it is written down, then one for the whole."""
    async with stack:
        writing = asyncio.ensure_future(work)
        writing.add_done_callback(lambda _: said.put_nowait(None))
        try:
            while (text := await said.get()) is not None:
                yield event({"type": "transcript.text.delta", "delta": text})
            found = await writing
        finally:
            writing.cancel()
            await asyncio.wait((writing,))
        kept = None if fields.response_format == "verbose_json" else {"text", "usage"}
        whole = found.model_dump(include=kept)
        yield event({"type": "transcript.text.done", **whole})


def _written_down(
    fields: TranscriptionFields,
    listener: Listener,
    tell: Callable[[str], object],
    sound: Audio,
    stop: threading.Event,
) -> VerboseTranscription:
    limits = MediaLimits()
    if sound.seconds >= limits.max_seconds:
        raise limits.exceeded(sound.name, "max_seconds", f"{sound.seconds:.0f} s of sound or more")
    if fields.language is not None and fields.language not in listener.languages:
        known = ", ".join(sorted(listener.languages))
        raise RequestError.at("language", f"{fields.language!r} is none of {known}")
    by_word = "word" in fields.timestamp_granularities
    how = Listening(fields.language, fields.prompt, fields.temperature, words=by_word)
    segments, language = listener.segments(sound.samples, how)
    found: list[Any] = []
    for segment in segments:
        if stop.is_set():  # nobody waits any more
            break
        tell(segment.text if found else segment.text.lstrip())
        found.append(segment)
    words = [
        TranscribedWord(word=word.word.strip(), start=word.start, end=word.end)
        for segment in found
        for word in segment.words or ()
    ]
    by_segment = "segment" in fields.timestamp_granularities or not by_word
    return VerboseTranscription(
        text="".join(segment.text for segment in found).strip(),
        usage=Duration(seconds=round(sound.seconds, 2)),
        language=listener.in_words(language),
        duration=round(sound.seconds, 2),
        segments=[TranscribedSegment.model_validate(one) for one in found] if by_segment else None,
        words=words if by_word else None,
    )


def _subtitles(found: VerboseTranscription, *, vtt: bool) -> Iterator[str]:
    """The lines of SubRip or WebVTT."""
    if vtt:
        yield "WEBVTT\n\n"
    for number, one in enumerate(found.segments or (), 1):
        times = " --> ".join(
            _clock(seconds, "." if vtt else ",") for seconds in (one.start, one.end)
        )
        text = one.text.strip().replace("-->", "->")  # the arrow would be another line of times
        yield f"{'' if vtt else f'{number}' + chr(10)}{times}\n{text}\n\n"


def _clock(seconds: float, point: str) -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(whole, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{second:02}{point}{thousandths:03}"

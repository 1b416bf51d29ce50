"""Recordings of a session are written down."""

from __future__ import annotations

import io
import wave
from contextlib import AsyncExitStack
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mico_chat.assistant import Assistant
from mico_chat.errors import MicoError
from mico_chat.media import Audio, MediaFile
from mico_chat.reading import why_not_listening
from mico_chat.reading.speech import Listener, Listening
from mico_chat.speech.events import Session, Transcribing
from mico_chat.speech.hearing import RATE
from mico_chat.speech.sound import pcm16
from mico_server.errors import UnsupportedError
from mico_server.service import Client

Written: TypeAlias = tuple[str, str, bool] | MicoError


async def written(
    client: Client, session: Session, file: MediaFile, language: str | None
) -> Written:
    """A recording's text, its language, and whether the model takes sounds; or the error."""
    asked = session.audio.input.transcription or Transcribing()
    how = Listening(asked.language or language, asked.prompt, quick=True)
    try:
        async with AsyncExitStack() as stack:
            host = await client.use(stack, session.model)
            listener = listener_of(host.assistant)

            def write(audio: Audio, stop: object) -> tuple[str, str]:
                segments, found = listener.segments(audio.samples, how)
                return "".join(one.text for one in segments).strip(), found

            work = host.assistant.encoder.listened(file, write, tenant=client.tenant)
            return (*await host.guarded(work), "audio" in host.reads)
    except MicoError as error:
        return error


def listener_of(assistant: Assistant) -> Listener:
    """
    Raises:
        UnsupportedError: nobody can write sounds down.
    """
    reader = assistant.encoder.reader
    if reader is None or reader.listener is None:
        raise UnsupportedError(why_not_listening())
    return reader.listener


def recording(sound: NDArray[np.float32]) -> MediaFile:
    """Samples (n,) at 16,000 Hz as a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as into:
        into.setparams((1, 2, RATE, 0, "NONE", ""))
        into.writeframes(pcm16(sound))
    return MediaFile("audio", file.getvalue(), "speech.wav")

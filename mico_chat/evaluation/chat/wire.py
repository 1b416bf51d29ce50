"""Conversations as OpenAI-compatible endpoints take them, and how to say less to those that know
fewer kinds.

Stills go as ``image_url``, sounds that are WAV or MP3 as OpenAI's ``input_audio``; other sounds and
all else in the parts that vLLM and this project's server share: ``audio_url``, ``video_url``,
``depth_url``, ``normal_url``, each with a data URI.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image

from mico_chat.media import Audio, MediaDecoder, MediaFile, MediaLimits, Video
from mico_chat.media.file import mime_type
from mico_chat.messages import Message, Part, to_openai

AUDIO_FORMATS = {"audio/wav": "wav", "audio/mpeg": "mp3"}
"""What ``input_audio`` takes at OpenAI."""

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Sending:
    """How media are sent.

    ``video_as_frames``: so many frames of a video, spread over all of it, as stills in its place;
    None sends the file. ``audio_as_wav``: sounds that are neither WAV nor MP3 as WAV, 16 kHz mono.
    """

    video_as_frames: int | None = None
    audio_as_wav: bool = False

    def __str__(self) -> str:
        said = []
        if self.video_as_frames is not None:
            said.append(f"videos as {self.video_as_frames} stills without sound")
        if self.audio_as_wav:
            said.append("sounds as WAV")
        return ", ".join(said)


class Wire:
    """Turns conversations into requests' messages. A context manager: it may hold decoders."""

    def __init__(self, sending: Sending, workers: int = 1) -> None:
        self._sending = sending
        frames = sending.video_as_frames or 1
        limits = MediaLimits().model_copy(update={"max_frames": frames})
        self._decoder = MediaDecoder(limits, workers=workers)

    def messages(self, conversation: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages of a request, media as data URIs or base64.

        Raises:
            MediaError: a medium that is not there, or that cannot be decoded where it must be.
        """
        shown = [
            replace(message, content=tuple(p for part in message.content for p in self._fit(part)))
            for message in conversation
        ]
        found = to_openai(shown)
        for message in found:
            if isinstance(message["content"], list):
                message["content"] = [_with_input_audio(part) for part in message["content"]]
        return found

    def close(self) -> None:
        """End the decoders."""
        self._decoder.close()

    def _fit(self, part: Part) -> list[Part]:
        if not isinstance(part, MediaFile):
            return [part]
        if part.kind == "video" and self._sending.video_as_frames is not None:
            video = self._decoder.decode(part)
            assert isinstance(video, Video)
            return [MediaFile("image", _jpeg(frame), part.name) for frame in video.frames]
        if part.kind == "audio" and self._sending.audio_as_wav and not _is_input_audio(part):
            audio = self._decoder.decode(part)
            assert isinstance(audio, Audio)
            return [MediaFile("audio", _wav(audio), part.name)]
        return [part]


def _is_input_audio(file: MediaFile) -> bool:
    if file.path is not None and not file.path.is_file():
        return True  # whoever reads it says that it is missing
    return mime_type("audio", file.head) in AUDIO_FORMATS


def _with_input_audio(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "audio_url":
        return part
    header, _, data = part["audio_url"]["url"].partition(";base64,")
    audio_format = AUDIO_FORMATS.get(header.removeprefix("data:"))
    if audio_format is None:
        return part
    return {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}}


def _jpeg(pixels: Any) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def _wav(audio: Audio) -> bytes:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        samples = (audio.samples.clip(-1, 1) * 32767).round().astype("<i2")
        file.writeframes(samples.tobytes())
    return data.getvalue()

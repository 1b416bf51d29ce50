"""Conversations in the chat format of transformers and lmms-eval as ours.

A part is ``{"type": "text", "text": ..}``, or a medium: ``{"type": "image", "url": ..}``, where
``path``, ``base64`` or the type itself may stand for ``url``. The types are those of media, and
parts of the OpenAI format are allowed too. The value is a PIL picture, a path, a data URI, bytes
of a file, samples with their rate, or a dictionary of these. lmms-eval guesses the kind by the name
of the file: to it, an unknown ending is a video, and every WebM file a sound. So here the bytes
decide between clip and sound.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from mico_chat.errors import RequestError
from mico_chat.fields import check_object, string_at, type_of
from mico_chat.media.audio import opened
from mico_chat.media.file import MediaFile, MediaLimits, format_of
from mico_chat.media.kinds import IMAGES, KINDS, SOUNDS, TABLE, Kind
from mico_chat.messages import ROLES, Message, Part, Role, TextPart, openai_part

_STILLS = tuple(kind for kind in KINDS if TABLE[kind].layout == "still")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def conversation(messages: Sequence[Mapping[str, Any]], limits: MediaLimits) -> list[Message]:
    read = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        check_object(message, where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError.at(f"{where}.role", f"{role!r} is not one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            reason = f"expected a string or a list of parts, got {type_of(content)}"
            raise RequestError.at(f"{where}.content", reason)
        parts = [_part(f"{where}.content[{n}]", part, limits) for n, part in enumerate(content)]
        read.append(Message(cast(Role, role), tuple(parts)))
    return read


def _part(where: str, part: Mapping[str, Any], limits: MediaLimits) -> Part:
    check_object(part, where)
    kind = part.get("type")
    if kind == "text":
        return TextPart(string_at(part, "text", where))
    if kind not in KINDS:
        return openai_part(where, part, None)
    _check_whole(where, part)
    names = [name for name in (kind, "url", "path", "base64") if part.get(name) is not None]
    if len(names) > 1:
        raise RequestError.at(where, f"{' and '.join(names)}: give one of them")
    value = part[names[0]] if names else None
    if names == ["base64"]:
        value = f"data:;base64,{value}"
    return medium_of(where, cast(Kind, kind), value, limits)


def _check_whole(where: str, given: Mapping[str, Any]) -> None:
    for name in ("start_time", "end_time", "video_start", "video_end"):
        if given.get(name) is not None:
            raise RequestError.at(where, f"{name}: a clip is always used whole; cut the file first")


def medium_of(where: str, kind: Kind, value: Any, limits: MediaLimits) -> MediaFile:
    """The medium of a value in any of the forms that a task may give."""
    if isinstance(value, Image.Image):
        if kind not in _STILLS:
            raise RequestError.at(where, f"the value is a picture, but its kind is {kind}")
        return MediaFile(kind, png(value), where)
    if isinstance(value, Mapping):
        # From ``datasets``: samples and their rate, or the bytes, path or URL of a file.
        _check_whole(where, value)
        if "array" in value:
            if not isinstance(value.get("sampling_rate"), int):
                raise RequestError.at(where, "samples need their sampling_rate, a whole number")
            return MediaFile("audio", wav(value["array"], value["sampling_rate"]), where)
        for key in ("bytes", "url", "path"):
            if value.get(key) is not None:
                return medium_of(where, kind, value[key], limits)
        raise RequestError.at(where, f"the {kind} lacks bytes, url, path and array: give one")
    if isinstance(value, bytes):
        return _checked(MediaFile(kind, value, where), limits)
    if not isinstance(value, str | Path):
        found = type(value).__name__
        raise RequestError.at(where, f"the {kind} cannot be read from a value of type {found}")
    scheme = urlsplit(value).scheme if isinstance(value, str) and ":" in value[:16] else ""
    if scheme in ("data", "http", "https"):
        part = openai_part(where, {"type": f"{kind}_url", f"{kind}_url": value}, None)
        assert isinstance(part, MediaFile)
        return _checked(part, limits)
    path = unquote(urlsplit(str(value)).path) if scheme == "file" else value
    return _checked(MediaFile(kind, Path(path)), limits)


def _checked(part: MediaFile, limits: MediaLimits) -> MediaFile:
    """The part; the bytes correct its kind if lmms-eval guessed a clip or a sound by the name."""
    if part.kind in _STILLS:
        return part
    part.check(limits)
    found = format_of(part.head)
    kind = part.kind
    if found in SOUNDS:
        kind = "audio"
    elif found in IMAGES:
        kind = "image"
    elif found == "WebM" and kind == "audio":
        with opened(part, found) as container:
            kind = "video" if container.streams.video else "audio"
    return part if kind == part.kind else MediaFile(kind, part.source, part.name)


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file, without loss; in RGB if PNG cannot hold the picture's mode."""
    file = io.BytesIO()
    whole = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
    whole.save(file, "PNG", compress_level=1)
    return file.getvalue()


def wav(samples: Any, sample_rate: int) -> bytes:
    """Samples (n,), (channels, n) or (n, channels) in [-1, 1] as a WAV file of 32-bit floats."""
    from scipy.io import wavfile

    values = np.asarray(samples, dtype=np.float32)
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T  # in a WAV file, the channels are last
    file = io.BytesIO()
    wavfile.write(file, sample_rate, values)
    return file.getvalue()

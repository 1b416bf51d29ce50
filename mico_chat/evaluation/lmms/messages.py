"""What lmms-eval shows of a document as messages of ours.

A part of its chat format is ``{"type": "text", "text": ..}`` or ``{"type": "image", "url": ..}``
(``video``, ``audio``); ours may also be ``depth`` and ``normal``, or a part of the OpenAI format. A
``url`` is what the task has: a PIL picture, a path, a data URI, a file's bytes, samples with their
rate, or a dictionary of these. They reach the media layer as a file's bytes or as a path, so that
they are decoded as everything else is, and as on the way through a server.

lmms-eval guesses kinds by the file's name: what it knows no better is a video, and all WebM is
sound. So of a clip or a sound the bytes decide.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.audio import opened
from mico_chat.media.file import AUDIO_FORMATS, IMAGE_FORMATS, MediaLimits, format_of
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import ROLES, Message, Part, Role, TextPart, openai_part

_IMAGE_KINDS: tuple[Kind, ...] = ("image", "depth", "normal")
_CUTS = ("start_time", "end_time", "video_start", "video_end")


def conversation(messages: Sequence[Mapping[str, Any]], limits: MediaLimits) -> list[Message]:
    """Messages of lmms-eval's chat format.

    Raises:
        RequestError: naming the message and the part by index, and what is wrong.
        MediaError: for a clip or sound whose file is not there or cannot be opened.
    """
    read = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if message["role"] not in ROLES:
            raise RequestError.at(
                f"{where}.role", f"{message['role']!r} is not one of {', '.join(ROLES)}"
            )
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [_part(f"{where}.content[{n}]", part, limits) for n, part in enumerate(content)]
        read.append(Message(cast(Role, message["role"]), tuple(parts)))
    return read


def question(visuals: Sequence[Any], text: str, limits: MediaLimits) -> list[Message]:
    """A question of the simple interface: whatever ``doc_to_visual`` gives, then the text.

    Raises:
        RequestError, MediaError: as :func:`conversation`.
    """
    parts = [_medium(f"visual {n}", _guess(visual), visual, limits) for n, visual in
             enumerate(visuals)]  # fmt: skip
    return [Message.user(*parts, text)]


def _guess(visual: Any) -> Kind:
    """The kind of a visual that has no name of its own, as lmms-eval's chat format guesses it."""
    if isinstance(visual, Image.Image):
        return "image"
    if isinstance(visual, Mapping) and visual.get("type") in KINDS:
        return cast(Kind, visual["type"])
    return "video"


def _part(where: str, part: Mapping[str, Any], limits: MediaLimits) -> Part:
    kind = part.get("type")
    if kind == "text":
        return TextPart(str(part["text"]))
    if kind in KINDS:
        _check_whole(where, part)
        return _medium(where, cast(Kind, kind), part.get("url"), limits)
    return openai_part(where, part, None)


def _check_whole(where: str, given: Mapping[str, Any]) -> None:
    for name in _CUTS:
        if given.get(name) is not None:
            raise RequestError.at(
                where, f"{name}: a clip is always used whole; cut the file before"
            )


def _medium(where: str, kind: Kind, value: Any, limits: MediaLimits) -> MediaFile:
    """A medium of whatever a task has for it."""
    if isinstance(value, Image.Image):
        if kind not in _IMAGE_KINDS:
            raise RequestError.at(where, f"the value is a picture, but its kind is {kind}")
        return MediaFile(kind, png(value), where)
    if isinstance(value, Mapping):
        return _mapping(where, kind, value, limits)
    if isinstance(value, bytes):
        return _checked(MediaFile(kind, value, where), limits)
    if isinstance(value, Path):
        return _checked(MediaFile(kind, value), limits)
    if not isinstance(value, str):
        raise RequestError.at(
            where, f"the {kind} cannot be read from a value of type {type(value).__name__}"
        )
    scheme = urlsplit(value).scheme if ":" in value[:16] else ""
    if scheme == "file":
        return _checked(MediaFile(kind, Path(unquote(urlsplit(value).path))), limits)
    if scheme in ("data", "http", "https"):
        part = openai_part(where, {"type": f"{kind}_url", f"{kind}_url": value}, None)
        assert isinstance(part, MediaFile)
        return _checked(part, limits)
    return _checked(MediaFile(kind, Path(value)), limits)


def _mapping(where: str, kind: Kind, value: Mapping[str, Any], limits: MediaLimits) -> MediaFile:
    """``datasets``' dictionaries: samples and their rate, or a file's bytes, path or URL."""
    _check_whole(where, value)
    if "array" in value:
        return MediaFile("audio", wav(value["array"], int(value["sampling_rate"])), where)
    for key in ("bytes", "url", "path"):
        if value.get(key) is not None:
            return _medium(where, kind, value[key], limits)
    raise RequestError.at(where, f"the {kind} lacks bytes, url, path and array; give one of them")


def _checked(part: MediaFile, limits: MediaLimits) -> MediaFile:
    """The part, of the kind that its bytes are where its name told a clip from a sound."""
    if part.kind in _IMAGE_KINDS:
        return part
    part.check(limits)
    found = format_of(part.head)
    kind: Kind = part.kind
    if found in AUDIO_FORMATS:
        kind = "audio"
    elif found in IMAGE_FORMATS:
        kind = "image"
    elif found == "WebM" and kind == "audio":
        with opened(part, found) as container:
            kind = "video" if container.streams.video else "audio"
    return part if kind == part.kind else MediaFile(kind, part.source, part.name)


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file, which loses nothing; of what PNG cannot hold, its RGB."""
    file = io.BytesIO()
    whole = picture if picture.mode in _PNG_MODES else picture.convert("RGB")
    whole.save(file, "PNG", compress_level=1)
    return file.getvalue()


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def wav(samples: Any, sample_rate: int) -> bytes:
    """Samples (n,), (channels, n) or (n, channels) in [-1, 1] as a WAV file of 32-bit floats."""
    from scipy.io import wavfile

    values = np.asarray(samples, dtype=np.float32)
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T  # a file has the channels last
    file = io.BytesIO()
    wavfile.write(file, sample_rate, values)
    return file.getvalue()

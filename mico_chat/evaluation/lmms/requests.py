"""lmms-eval's requests as ours: the messages of a document, and the options of a task.

A part of its chat format is ``{"type": "text", "text": ..}`` or ``{"type": "image", "url": ..}``
(``video``, ``audio``). Here, ``depth``, ``normal`` and parts of the OpenAI format are allowed too.
The ``url`` is a PIL picture, a path, a data URI, the bytes of a file, samples with their rate, or a
dictionary of these. lmms-eval guesses the kind by the name of the file: to it, an unknown ending is
a video, and every WebM file a sound. So here the bytes decide between clip and sound.
"""

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.audio import opened
from mico_chat.media.file import MediaLimits, format_of
from mico_chat.media.kinds import IMAGES, KINDS, SOUNDS, TABLE, Kind
from mico_chat.messages import ROLES, Message, Part, Role, TextPart, openai_part

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""The limit for a task without a limit, as in lmms-eval's clients of served models."""

_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_SAMPLING = ("top_p", "top_k", "min_p", "seed")
_ANSWERS = ("num_beams", "num_return_sequences", "n", "best_of")
_KNOWN = {"max_new_tokens", "until", "temperature", "do_sample", *_ALWAYS, *_SAMPLING, *_ANSWERS}
_warned: set[str] = set()

_STILLS = tuple(kind for kind in KINDS if TABLE[kind].layout == "still")
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def conversation(messages: Sequence[Mapping[str, Any]], limits: MediaLimits) -> list[Message]:
    read = []
    for number, message in enumerate(messages):
        where, role, content = f"messages[{number}]", message["role"], message["content"]
        if role not in ROLES:
            raise RequestError.at(f"{where}.role", f"{role!r} is not one of {', '.join(ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [_part(f"{where}.content[{n}]", part, limits) for n, part in enumerate(content)]
        read.append(Message(cast(Role, role), tuple(parts)))
    return read


def question(visuals: Sequence[Any], text: str, limits: MediaLimits) -> list[Message]:
    """A question of the simple interface: the media from ``doc_to_visual``, then the text."""
    parts = []
    for number, visual in enumerate(visuals):
        # As in lmms-eval's chat format, a visual that names no kind is a clip.
        kind: Kind = "image" if isinstance(visual, Image.Image) else "video"
        if isinstance(visual, Mapping) and visual.get("type") in KINDS:
            kind = visual["type"]
        parts.append(_medium(f"visual {number}", kind, visual, limits))
    return [Message.user(*parts, text)]


def _part(where: str, part: Mapping[str, Any], limits: MediaLimits) -> Part:
    kind = part.get("type")
    if kind == "text":
        return TextPart(str(part["text"]))
    if kind in KINDS:
        _check_whole(where, part)
        return _medium(where, cast(Kind, kind), part.get("url"), limits)
    return openai_part(where, part, None)


def _check_whole(where: str, given: Mapping[str, Any]) -> None:
    for name in ("start_time", "end_time", "video_start", "video_end"):
        if given.get(name) is not None:
            raise RequestError.at(where, f"{name}: a clip is always used whole; cut the file first")


def _medium(where: str, kind: Kind, value: Any, limits: MediaLimits) -> MediaFile:
    """The medium of a value in any of the forms that a task may give."""
    if isinstance(value, Image.Image):
        if kind not in _STILLS:
            raise RequestError.at(where, f"the value is a picture, but its kind is {kind}")
        return MediaFile(kind, png(value), where)
    if isinstance(value, Mapping):
        # From ``datasets``: samples and their rate, or the bytes, path or URL of a file.
        _check_whole(where, value)
        if "array" in value:
            return MediaFile("audio", wav(value["array"], int(value["sampling_rate"])), where)
        for key in ("bytes", "url", "path"):
            if value.get(key) is not None:
                return _medium(where, kind, value[key], limits)
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


def options_of(given: Mapping[str, Any]) -> GenerationOptions:
    """The ``generation_kwargs`` of a task as options of our engines.

    As in transformers, an answer is greedy if ``do_sample`` is false, at any temperature. A key
    that our engines do not know, such as LLaVA's ``image_aspect_ratio``, is logged once.
    """
    for name in _ANSWERS:
        if given.get(name) not in (None, 1):
            why = "but a request gets one answer, without beam search; set it to 1"
            raise RequestError.at(name, f"got {given[name]!r}, {why}")
    sampled, temperature = given.get("do_sample"), given.get("temperature")
    if temperature is None or sampled is False:
        temperature = 1.0 if sampled else 0.0
    until = given.get("until") or ()
    values = {
        "max_tokens": given.get("max_new_tokens") or MAX_NEW_TOKENS,
        "temperature": temperature,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    for name in (*_ALWAYS, *(_SAMPLING if float(temperature) > 0 else ())):
        if given.get(name) is not None:
            values[name] = given[name]
    for name in sorted(frozenset(given) - _KNOWN - _warned):
        logger.warning("the generation option %r is ignored: no engine supports it", name)
        _warned.add(name)
    return GenerationOptions.of(values)

"""Messages and their typed parts, and the two wire formats they come in.

* OpenAI: ``content`` parts ``text``, ``image_url``, ``input_audio`` and ``file`` as OpenAI defines
  them, and ``audio_url``, ``video_url``, ``depth_url``, ``normal_url`` and ``document_url`` in the
  same form. Data URIs are read here; other URLs go to the caller's resolver, and are refused
  without one. Calls of tools and their results are turns of the conversation.
* LLaVA: ``conversations`` of ``human`` and ``gpt`` turns, with ``<image>``, ``<audio>``,
  ``<video>``, ``<depth>`` or ``<normal>`` in place of a medium.
"""

from __future__ import annotations

import base64
import io
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import hexdigits
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np

from mico_chat.errors import RequestError
from mico_chat.fields import check_object, check_one_of, object_at, string_at, type_of
from mico_chat.media.file import MediaFile, mime_type
from mico_chat.media.kinds import KINDS, MODALITIES, Kind
from mico_chat.media.medium import Medium
from mico_chat.media.view import DETAILS, Detail, View, frames_at
from mico_chat.tools import Tool, ToolCall, name_at, read_calls

Speaker = Literal["system", "user", "assistant"]
Role = Speaker | Literal["tool"]
ROLES: tuple[Speaker, ...] = get_args(Speaker)


@dataclass(frozen=True)
class TextPart:
    text: str


Part: TypeAlias = TextPart | MediaFile | Medium


@dataclass(frozen=True)
class Message:
    """What one of them says. The assistant may call tools; a message of the role "tool" has the
    result of the call ``tool_call_id``, and the ``name`` of the tool. ``tools`` are those that the
    assistant may call; any message of a conversation can have them. ``reasoning_content`` is what
    the assistant thought before it.
    """

    role: Role
    content: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    tools: tuple[Tool, ...] = ()
    reasoning_content: str = ""

    @classmethod
    def system(cls, text: str) -> Message:
        return cls("system", (TextPart(text),))

    @classmethod
    def user(cls, *parts: str | Part) -> Message:
        return cls("user", _parts(parts))

    @classmethod
    def assistant(cls, *parts: str | Part) -> Message:
        return cls("assistant", _parts(parts))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def n_bytes(self) -> int:
        """Bytes of all text that a model reads, tools and their calls too."""
        tools = [json.dumps(tool.declaration) for tool in self.tools]
        calls = [call.name + call.arguments for call in self.tool_calls]
        texts = (self.text, self.reasoning_content, *tools, *calls)
        return sum(len(text.encode()) for text in texts)

    @property
    def media(self) -> tuple[MediaFile | Medium, ...]:
        return tuple(part for part in self.content if not isinstance(part, TextPart))

    @property
    def files(self) -> tuple[MediaFile, ...]:
        return tuple(part for part in self.content if isinstance(part, MediaFile))

    def with_files(self, change: Callable[[MediaFile], Part]) -> Message:
        """The message with each file replaced by ``change(file)``."""
        parts = (change(part) if isinstance(part, MediaFile) else part for part in self.content)
        return replace(self, content=tuple(parts))


def _parts(parts: Sequence[str | Part]) -> tuple[Part, ...]:
    return tuple(TextPart(part) if isinstance(part, str) else part for part in parts)


def with_system(messages: Sequence[Message], prompt: str | None) -> Sequence[Message]:
    """The messages behind a model's own system prompt, unless they have a system message."""
    if prompt is None or any(message.role == "system" for message in messages):
        return messages
    return [Message.system(prompt), *messages]


def without_depth(media: Sequence[MediaFile | Medium]) -> list[int]:
    """The places of the pictures among a message's media, if it has no depth map of its own.

    Nobody knows which of several pictures a depth map belongs to: beside one, none lacks it.
    """
    if any(medium.kind == "depth" for medium in media):
        return []
    return [place for place, medium in enumerate(media) if medium.kind == "image"]


def with_depth_scale(messages: Sequence[Message], depth_scale: float) -> list[Message]:
    return [m.with_files(lambda file: replace(file, depth_scale=depth_scale)) for m in messages]


# --- OpenAI ---------------------------------------------------------------------------------------

Resolver: TypeAlias = Callable[[Kind, str], MediaFile]
"""Reads the medium at a URL other than a data URI, or raises a MicoError."""

_URL_PARTS: dict[str, Kind] = {f"{kind}_url": kind for kind in KINDS}
_STORED = "media:"  # stands before the id of a medium of a service
_AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac")


def from_openai(
    messages: Sequence[Mapping[str, Any]],
    *,
    resolve: Resolver | None = None,
    name: str = "messages",
) -> list[Message]:
    """Messages of the OpenAI chat format. A message's ``name`` has no effect.

    Raises:
        RequestError: naming the field at fault, such as ``messages[0].content[1]``; ``name`` is
            the field of the messages.
    """
    if not _items(messages):
        raise RequestError.at(name, "expected a list with at least one message")
    read: list[Message] = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        read.append(_openai_message(f"{name}[{index}]", message, resolve, names))
        names |= {call.id: call.name for call in read[-1].tool_calls}
    return read


def urls_of(messages: Any) -> list[tuple[Kind, str]]:
    """The URLs that :func:`from_openai` would give to its resolver, without repetitions."""
    contents = [m.get("content") for m in _items(messages) if isinstance(m, Mapping)]
    found: dict[tuple[Kind, str], None] = {}
    for part in (part for content in contents for part in _items(content)):
        if isinstance(part, Mapping) and isinstance(kind := part.get("type"), str):
            value = part.get(kind)
            url = value.get("url") if isinstance(value, Mapping) else value
            if kind in _URL_PARTS and isinstance(url, str) and not is_data_uri(url):
                found[_URL_PARTS[kind], url] = None
            if kind == "file" and isinstance(value, Mapping) and value.get("file_id") is not None:
                found["document", f"{_STORED}{value['file_id']}"] = None
    return list(found)


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _openai_message(
    where: str, message: Mapping[str, Any], resolve: Resolver | None, called: Mapping[str, str]
) -> Message:
    """A message; ``called`` has the ids and names of the calls before it."""
    check_object(message, where)
    role = _openai_role(where, message)
    calls: tuple[ToolCall, ...] = ()
    if message.get("tool_calls") not in (None, []):
        if role != "assistant":
            reason = f"only the assistant calls tools, not the role {role!r}"
            raise RequestError.at(f"{where}.tool_calls", reason)
        calls = read_calls(message["tool_calls"], f"{where}.tool_calls")
    thought = role == "assistant" and message.get("reasoning_content") is not None
    thoughts = string_at(message, "reasoning_content", where) if thought else ""
    content = message.get("content")
    if (calls or thought) and not content:
        return Message(role, (), calls, reasoning_content=thoughts)
    parts = _openai_content(where, content, resolve)
    if role != "user" and any(isinstance(part, MediaFile) for part in parts):
        reason = f"only the user's messages carry media, not {role}'s"
        if role == "tool":
            reason = "a tool's result is text; show its media in a message of the user behind it"
        raise RequestError.at(f"{where}.content", reason)
    if role != "tool":
        return Message(role, parts, calls, reasoning_content=thoughts)
    id_ = string_at(message, "tool_call_id", where)
    if id_ not in called:
        reason = f"{id_[:80]!r} is the id of no tool call in the messages before it"
        raise RequestError.at(f"{where}.tool_call_id", reason)
    if message.get("name") is not None:
        name_at(message, where)
    return Message(role, parts, tool_call_id=id_, name=called[id_])


def _openai_content(where: str, content: Any, resolve: Resolver | None) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(string_at({"content": content}, "content", where)),)
    if not isinstance(content, Sequence) or not content:
        got = "an empty list" if content == [] else type_of(content)
        reason = f"expected a string or a list of parts, got {got}"
        raise RequestError.at(f"{where}.content", reason)
    return tuple(
        openai_part(f"{where}.content[{number}]", part, resolve)
        for number, part in enumerate(content)
    )


def _openai_role(where: str, message: Mapping[str, Any]) -> Role:
    role = message.get("role")
    if role == "developer":  # OpenAI's newer name for the system role
        role = "system"
    if role == "function":
        reason = "'function' is OpenAI's old form: send the role 'tool' with a tool_call_id"
        raise RequestError.at(f"{where}.role", reason)
    check_one_of(role, (*ROLES, "tool"), f"{where}.role")
    if message.get("function_call") is not None:
        reason = "OpenAI's old form: send tool_calls"
        raise RequestError.at(f"{where}.function_call", reason)
    if message.get("audio") is not None:
        raise RequestError.at(f"{where}.audio", "this model does not speak its answers")
    for key in ("name", "refusal"):
        if message.get(key) is not None:
            string_at(message, key, where)
    return cast(Role, role)


def openai_part(where: str, part: Any, resolve: Resolver | None) -> TextPart | MediaFile:
    """One content part. Errors name ``where``, its place in the request."""
    check_object(part, where)
    kind = part.get("type")
    if kind == "text":
        return TextPart(string_at(part, "text", where))
    if kind == "input_audio":
        audio = object_at(part, "input_audio", where)
        inner = f"{where}.input_audio"
        hint = "; send other formats as audio_url"
        check_one_of(string_at(audio, "format", inner), _AUDIO_FORMATS, f"{inner}.format", hint)
        data = base64_data(string_at(audio, "data", inner), f"{inner}.data")
        return MediaFile("audio", data, name=inner)
    if kind == "file":
        return _file(part, where, resolve)
    check_one_of(kind, ("text", "input_audio", "file", *_URL_PARTS), f"{where}.type")
    inner = f"{where}.{kind}"
    url = isinstance(part.get(kind), str)
    value = {"url": string_at(part, kind, where)} if url else object_at(part, kind, where)
    view = _view(_URL_PARTS[kind], {**part, **value}, inner)
    at = inner if url else f"{inner}.url"
    file = _load_url(_URL_PARTS[kind], string_at(value, "url", inner), at, resolve)
    pinned = {**part, **value}.get("pinned") or False
    if not isinstance(pinned, bool):
        raise RequestError.at(f"{inner}.pinned", f"expected true or false, got {type_of(pinned)}")
    return replace(file, view=view, pinned=pinned)


def _file(part: Mapping[str, Any], where: str, resolve: Resolver | None) -> MediaFile:
    """OpenAI's part of a document: its data, or the id of an uploaded medium."""
    given, inner = object_at(part, "file", where), f"{where}.file"
    if given.get("file_id") is None:
        url, at = string_at(given, "file_data", inner), f"{inner}.file_data"
        if not is_data_uri(url):
            raise RequestError.at(at, "expected a data URI (data:application/pdf;base64,...)")
    else:
        url, at = f"{_STORED}{string_at(given, 'file_id', inner)}", f"{inner}.file_id"
    file = _load_url("document", url, at, resolve)
    if given.get("filename") is None:
        return file
    name = "".join(filter(str.isprintable, Path(string_at(given, "filename", inner)).name))[:100]
    return replace(file, name=name or file.name)


def _view(kind: Kind, given: Mapping[str, Any], where: str) -> View:
    """How a part of a message wants its medium to be shown."""
    detail, frames = given.get("detail") or "auto", frames_at(given, where)
    check_one_of(detail, DETAILS if kind != "audio" else DETAILS[:1], f"{where}.detail")
    if frames and kind != "video":
        raise RequestError.at(f"{where}.{next(iter(frames))}", "only a clip has frames")
    return View(cast(Detail, detail), **frames)


def is_data_uri(url: str) -> bool:
    return url[:5].lower() == "data:"


def data_of(uri: str, where: str) -> bytes:
    comma = uri.find(",")
    if comma < 0:
        raise RequestError.at(where, "a data URI without a comma before its data")
    if uri[max(5, comma - 7) : comma].lower() == ";base64":
        return base64_data(uri, where, comma + 1)
    found, at = io.BytesIO(), comma + 1
    while at < len(uri):
        end = at + _PIECE
        cut = uri.rfind("%", end - 2, end) if end < len(uri) else -1  # its digits may be behind
        end = cut if cut > at else end
        found.write(_unquoted(uri[at:end].encode()))
        at = end
    return found.getvalue()


_PIECE = 1 << 20
"""Characters that are decoded at a time: urllib makes an object of each escape, 80 bytes of 3."""

_HEX = np.array([int(chr(n), 16) if chr(n) in hexdigits else 16 for n in range(256)], np.uint8)
"""What each hexadecimal digit stands for; 16 for any other byte."""

_WHITE = b" \t\n\r\v\f"


def _unquoted(text: bytes) -> bytes:
    """The text without percent-encoding. As in urllib, a ``%`` without two digits stays."""
    data = np.frombuffer(text, np.uint8).copy()
    at = np.flatnonzero(data[:-2] == ord("%"))
    high, low = _HEX[data[at + 1]], _HEX[data[at + 2]]
    good = (high < 16) & (low < 16)
    at = at[good]
    data[at] = (high << 4 | low)[good]
    keep = np.ones(len(data), bool)
    keep[at + 1] = keep[at + 2] = False
    return data[keep].tobytes()


def _load_url(kind: Kind, url: str, where: str, resolve: Resolver | None) -> MediaFile:
    if not is_data_uri(url):
        if resolve is None:
            scheme = url.split(":", 1)[0][:16] if ":" in url else ""
            what = f"a {scheme!r} URL" if scheme else "no URL"
            reason = f"{what}; send the medium as a data URI (data:...;base64,)"
            raise RequestError.at(where, reason)
        found = resolve(kind, url)
        if found.kind != kind:
            reason = f"expected a medium of kind {kind}, but {found.name} is of kind {found.kind}"
            raise RequestError.at(where, reason)
        return found
    return MediaFile(kind, data_of(url, where), where)


def base64_data(text: str, where: str, start: int = 0) -> bytes:
    """The data of a text in base64 from ``start`` on; white space does not count."""
    found, rest = io.BytesIO(), b""
    try:
        for at in range(start, len(text), _PIECE):
            piece = rest + text[at : at + _PIECE].encode("ascii").translate(None, _WHITE)
            whole = len(piece) - len(piece) % 4
            rest = piece[whole:]
            if whole and found.tell() % 3:
                raise ValueError("data behind the padding")
            found.write(base64.b64decode(piece[:whole], validate=True))
        if rest.strip(b"="):  # needless padding does no harm
            raise ValueError("the last group is not complete")
    except ValueError as error:
        raise RequestError.at(where, "not valid base64") from error
    if not found.tell():
        raise RequestError.at(where, "no data")
    return found.getvalue()


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The same messages in the OpenAI chat format, media as data URIs."""
    found: list[dict[str, Any]] = []
    for message in messages:
        parts = [_to_openai_part(part) for part in message.content]
        content = message.text if not message.media and len(parts) == 1 else parts
        one: dict[str, Any] = {"role": message.role, "content": content or None}
        if message.reasoning_content:
            one["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            one["tool_calls"] = [call.to_openai() for call in message.tool_calls]
        if message.tool_call_id is not None:
            one["tool_call_id"] = message.tool_call_id
        found.append(one)
    return found


def _to_openai_part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if not isinstance(part, MediaFile):
        raise RequestError(f"{part.name}: a decoded {part.kind} has no file to send")
    data = part.read()
    uri = f"data:{mime_type(part.kind, data)};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": uri}}


# --- LLaVA ----------------------------------------------------------------------------------------

_LLAVA_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}
_LLAVA_ROLES |= {role: role for role in ROLES}
# In LLaVA's data the line break between a marker and the question is part of the marker.
_MARKER = re.compile(rf"\n?<({'|'.join(MODALITIES)})>\n?")


def from_llava(record: Mapping[str, Any], *, root: str | Path = "") -> list[Message]:
    """The conversation of one record of a LLaVA-style JSON file.

    For each kind of medium, ``record`` has a path or a list of paths, in the order of the markers.
    Relative paths start at ``root``.

    Raises:
        RequestError: naming the turn at fault, or both counts if markers and media differ.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RequestError.at("conversations", "expected a list with at least one turn")
    media = {kind: _llava_paths(record, kind, Path(root)) for kind in MODALITIES}
    found = dict.fromkeys(MODALITIES, 0)
    messages = []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        check_object(turn, where)
        speaker = turn.get("from")
        check_one_of(speaker, tuple(_LLAVA_ROLES), f"{where}.from")
        value = string_at(turn, "value", where)
        parts: list[Part] = []
        # re.split with one group gives text, kind, text, kind, ..., text.
        for number, piece in enumerate(_MARKER.split(value)):
            if number % 2 == 0:
                parts += [TextPart(piece)] if piece else []
                continue
            kind = cast(Kind, piece)
            found[kind] += 1
            if found[kind] <= len(media[kind]):
                parts.append(MediaFile(kind, media[kind][found[kind] - 1]))
        messages.append(Message(_LLAVA_ROLES[speaker], tuple(parts)))
    for kind in MODALITIES:
        if found[kind] != len(media[kind]):
            reason = f"{found[kind]} <{kind}> markers but {len(media[kind])} in {kind!r}"
            raise RequestError.at("conversations", reason)
    return messages


def _llava_paths(record: Mapping[str, Any], kind: Kind, root: Path) -> list[Path]:
    value = record.get(kind)
    paths = [] if value is None else value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise RequestError.at(kind, f"expected a path or a list of paths, got {type_of(path)}")
    return [root / path for path in paths]


def media_of(messages: Sequence[Message]) -> list[MediaFile | Medium]:
    last = messages[-1] if messages else None
    if last is None or last.role not in ("user", "tool") or not last.content:
        raise RequestError(
            "the last message must be the user's or a tool's result, and not be empty", "messages"
        )
    return [medium for message in messages for medium in message.media]


# --- a long conversation, shortened ---

LEAST_ANSWER = 16
"""An answer's room shrinks to as many tokens before a question is refused."""


@dataclass(frozen=True, eq=False)
class Shortened:
    """A conversation without ``turns`` of its turns, and without ``media`` of the other turns'
    media; ``kept`` are the numbers, among all media, of those that are still shown, and ``pinned``
    of those among them that are pinned in earlier turns."""

    messages: Sequence[Message]
    turns: int
    media: int
    kept: Sequence[int]
    pinned: Sequence[int]


@dataclass(frozen=True)
class Conversation:
    """Messages, to be shortened step by step.

    First media of earlier turns are named and no longer shown, the oldest first, then the oldest
    turns are left out. The system message and the last turn stay. A turn begins with a user's
    message. Pinned media stay: those of a turn that is left out stand before the next question.
    """

    start: Sequence[Message]
    earlier: Sequence[Sequence[Message]]
    last: Sequence[Message]

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        begins = [at for at, message in enumerate(messages) if message.role == "user"]
        if not begins:
            return cls((), (), messages)
        ends = [*begins[1:], len(messages)]
        turns = [messages[a:b] for a, b in zip(begins, ends, strict=True)]
        return cls(messages[: begins[0]], turns[:-1], turns[-1])

    @property
    def media(self) -> int:
        """How many media of earlier turns may go."""
        all_ = (part for turn in self.earlier for message in turn for part in message.media)
        return sum(not _pinned(part) for part in all_)

    @property
    def unpinned(self) -> Conversation:
        """The conversation with no medium pinned."""
        all_ = [*self.start, *(message for turn in self.earlier for message in turn), *self.last]
        return Conversation.of([m.with_files(lambda f: replace(f, pinned=False)) for m in all_])

    @property
    def steps(self) -> int:
        return self.media + len(self.earlier)

    def shortened(self, steps: int) -> Shortened:
        """The conversation after so many steps."""
        unshown = min(steps, self.media)
        gone = steps - unshown
        at = sum(len(message.media) for message in self.start)
        left, media, rest, moved = unshown, 0, list[Message](), list[Part]()
        kept, pinned = list(range(at)), list[int]()
        for number, turn in enumerate(self.earlier):
            for message in turn:
                parts = list(message.content)
                for place, part in enumerate(parts):
                    if isinstance(part, TextPart):
                        continue
                    if _pinned(part):
                        pinned.append(at)
                        moved += [part] if number < gone else []
                    if left and not _pinned(part):
                        parts[place] = named(part)
                        left, media = left - 1, media + (number >= gone)
                    else:
                        kept.append(at)
                    at += 1
                if number >= gone:
                    rest.append(replace(message, content=tuple(parts)))
        rest += self.last
        if moved:
            rest[0] = replace(rest[0], content=(*moved, *rest[0].content))
        kept += range(at, at + sum(len(message.media) for message in self.last))
        return Shortened([*self.start, *rest], gone, media, kept, pinned)

    def fitted(self, fits: Callable[[Shortened], bool]) -> Shortened:
        """The conversation after few steps with which it fits, or after all of them.

        Of the media, or of the turns, that could stay at most a quarter goes too: with the fewest
        steps each answer of a growing conversation would begin otherwise than the one before, and
        nothing that is computed of the one could be used for the next.
        """
        if fits(whole := self.shortened(0)) or not self.steps:
            return whole
        least = bisect_left(range(self.steps), True, lo=1, key=lambda n: fits(self.shortened(n)))
        begin, end = (0, self.media) if least <= self.media else (self.media, self.steps)
        quarter = (end - least) // 4
        at_once = 1 << quarter.bit_length() - 1 if quarter else 1
        return self.shortened(begin - (begin - least) // at_once * at_once)


def named(medium: MediaFile | Medium) -> TextPart:
    """What stands in the place of a medium that is not shown."""
    return TextPart(f"[{medium.kind} {medium.name}]\n")


def _pinned(part: Part) -> bool:
    return isinstance(part, MediaFile) and part.pinned

"""The server's routes as values: what to send, and how to read the response.

A :class:`Call` is sent by a client with or without an event loop, so each route is written once.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from mico_chat import wire
from mico_chat.media.kinds import Kind

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A medium to send: a file, or the bytes of one. Messages call the medium ``name``."""

    kind: Kind
    source: Path | bytes
    name: str = ""

    @property
    def shown_name(self) -> str:
        name = self.name or (self.source.name if isinstance(self.source, Path) else "")
        return _text(name) or self.kind


@dataclass(frozen=True)
class MediumId:
    """A stored medium, and the ``pages`` of it to look at; none: all that are used."""

    kind: Kind
    id: str
    pages: tuple[int, ...] = ()


Field: TypeAlias = tuple[str, str | Upload]


@dataclass(frozen=True)
class Question:
    """A message of /v1/chat with its media, in order. Without an id a conversation begins.

    With ``create`` a conversation of that id begins if there is none: ``conv-`` and 24 random
    hexadecimal digits. The message follows the turn ``after`` (0: none; None: the last one).
    ``beside`` is the turn whose question the model answers, too.
    ``options`` are generation options by name; the server replaces None.
    ``depth_scale`` is in metres for one unit of a 16-bit depth map.
    """

    message: str
    media: Sequence[Upload | MediumId] = ()
    conversation_id: str | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    depth_scale: float | str | None = None
    create: bool = False
    after: int | None = None
    model: str | None = None
    beside: int | None = None

    def form(self) -> list[Field]:
        fields: list[Field] = [("message", _text(self.message))]
        for medium in self.media:
            value = medium if isinstance(medium, Upload) else f"media:{medium.id}"
            fields.append((medium.kind, value))
        names = ("conversation_id", "model", "system", "depth_scale", "after", "beside")
        more = {name: getattr(self, name) for name in names} | {"create": self.create or None}
        for name, value in {**more, **self.options}.items():
            # Several values of one name are several fields: the stop texts.
            values = value if isinstance(value, list | tuple) else [value]
            fields += [(name, _text(value)) for value in values if value is not None]
        return fields


def _text(value: Any) -> str:
    """A value as it is sent; half a surrogate pair, which is no text, becomes a question mark."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request; ``read`` makes its result of the response."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    form: Sequence[Field] = ()

    def arguments(self, stack: ExitStack) -> dict[str, Any]:
        """Arguments of httpx's ``build_request``; files stay open until ``stack`` closes."""
        params = {name: value for name, value in self.params.items() if value is not None}
        given = {"method": self.method, "url": self.path, "params": params, "json": self.body}
        if self.form:
            # Texts go as files without a name: httpx would send all texts before all files.
            given["files"] = [
                (name, (value.shown_name, _opened(value.source, stack)))
                if isinstance(value, Upload)
                else (name, (None, value))
                for name, value in self.form
            ]
        return given


def _opened(source: Path | bytes, stack: ExitStack) -> IO[bytes] | bytes:
    return source if isinstance(source, bytes) else stack.enter_context(source.open("rb"))


def read_as(model: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: model.model_validate_json(response.content)


def chat(question: Question) -> Call[None]:
    """/v1/chat, answered with events: for :meth:`Client.stream`."""
    form = [*question.form(), ("stream", "true")]
    return Call("POST", "/v1/chat", lambda response: None, {"progress": "true"}, form=form)


def estimate(question: Question) -> Call[wire.Estimate]:
    return Call("POST", "/v1/estimate", read_as(wire.Estimate), form=question.form())


def conversations(
    *,
    limit: int = 20,
    before: str | None = None,
    query: str | None = None,
    pinned: bool | None = None,
    archived: bool | None = None,
) -> Call[wire.ConversationList]:
    """Stored conversations: pinned ones first, and among both the last one answered first.

    ``before`` is the last id of a page. ``pinned`` and ``archived``: only these, or only others.
    """
    params = {"limit": limit, "before": before, "query": query}
    params |= {"pinned": pinned, "archived": archived}
    return Call("GET", "/v1/conversations", read_as(wire.ConversationList), params)


def conversation(
    id_: str, turn: int | None = None, *, all_versions: bool = False
) -> Call[wire.ConversationObject]:
    """A conversation along the path to its head, or along the newest one through ``turn``."""
    params = {"turn": turn, "all_versions": all_versions or None}
    path = f"/v1/conversations/{_quoted(id_)}"
    return Call("GET", path, read_as(wire.ConversationObject), params)


def import_conversation(exported: Mapping[str, Any]) -> Call[wire.ConversationSummary]:
    """Store a conversation that was exported; its media must be there already."""
    read = read_as(wire.ConversationSummary)
    return Call("POST", "/v1/conversations", read, body=dict(exported))


def conversations_state(known: str) -> Call[str]:
    """A text that changes with any conversation; the answer waits while it is ``known``."""
    path, params = "/v1/conversations/state", {"known": known}
    return Call("GET", path, lambda response: str(response.json()["state"]), params)


def change_conversation(id_: str, **changes: Any) -> Call[wire.ConversationSummary]:
    """Change the ``title``, ``pinned``, ``archived``, the ``system`` prompt (None: the model's
    own), ``pinned_media`` by their ids, or read the conversation along the path through ``turn``.
    """
    path = f"/v1/conversations/{_quoted(id_)}"
    return Call("PATCH", path, read_as(wire.ConversationSummary), body=changes)


def prefer(id_: str, turn: int, over: int) -> Call[wire.ConversationSummary]:
    """Keep that a turn has a better answer than the one that stood beside it."""
    path = f"/v1/conversations/{_quoted(id_)}/turns/{turn}/preference"
    return Call("PUT", path, read_as(wire.ConversationSummary), body={"over": over})


def preferences(*, images: bool = False) -> Call[str]:
    """All preferences, as JSON Lines; with ``images`` the pictures too."""
    params = {"images": images or None}
    return Call("GET", "/v1/preferences", lambda response: response.text, params)


def delete_conversation(id_: str) -> Call[wire.Deleted]:
    return Call("DELETE", f"/v1/conversations/{_quoted(id_)}", read_as(wire.Deleted))


def delete_turns(id_: str, first: int, turns: int | None = None) -> Call[wire.Deleted]:
    """Delete turn ``first`` and all that follow it, if these are ``turns`` together."""
    path = f"/v1/conversations/{_quoted(id_)}/turns/{first}"
    return Call("DELETE", path, read_as(wire.Deleted), {"turns": turns})


def explanation(id_: str, turn: int) -> Call[None]:
    """Which media the answer of a turn rests on, as events: for :meth:`Client.stream`."""
    path = f"/v1/conversations/{_quoted(id_)}/turns/{turn}/explanation"
    return Call("POST", path, lambda response: None, {"progress": "true"})


def upload(
    medium: Upload,
    depth_scale: float | str | None = None,
    *,
    model: str | None = None,
    read: bool = True,
) -> Call[wire.MediaObject]:
    """Store a medium, so that a question can name its id. The server decodes and reports on it;
    without ``read``, it recognises text and speech when they are first needed."""
    fields: list[Field] = [(medium.kind, medium)]
    fields += [] if depth_scale is None else [("depth_scale", str(depth_scale))]
    fields += [] if model is None else [("model", model)]
    fields += [] if read else [("read", "false")]
    return Call("POST", "/v1/media", read_as(wire.MediaObject), form=fields)


def estimate_depth(id_: str, *, model: str | None = None) -> Call[wire.MediaObject]:
    """Store a depth map of a stored picture, which a model estimates."""
    path = f"/v1/media/{_quoted(id_)}/depth"
    return Call("POST", path, read_as(wire.MediaObject), {"model": model})


def medium(id_: str) -> Call[wire.MediaObject]:
    return Call("GET", f"/v1/media/{_quoted(id_)}", read_as(wire.MediaObject))


def medium_content(id_: str) -> Call[bytes]:
    return Call("GET", f"/v1/media/{_quoted(id_)}/content", lambda response: response.content)


def delete_medium(id_: str) -> Call[wire.Deleted]:
    return Call("DELETE", f"/v1/media/{_quoted(id_)}", read_as(wire.Deleted))


def speech(text: str) -> Call[bytes]:
    """A text read aloud, as MP3."""
    body = {"model": "hibari", "input": text}
    return Call("POST", "/v1/audio/speech", lambda response: response.content, body=body)


def client_secret(session: Mapping[str, Any]) -> Call[str]:
    """A secret that opens sessions of /v1/realtime for a while, with these settings."""
    path, body = "/v1/realtime/client_secrets", {"session": dict(session)}
    return Call("POST", path, lambda response: str(response.json()["value"]), body=body)


def teach(
    name: str,
    examples: Sequence[Upload | MediumId],
    *,
    model: str | None = None,
    conversation_id: str | None = None,
    turn: int | None = None,
) -> Call[wire.TaughtObject]:
    """Teach a name; ``conversation_id`` and ``turn`` are those of an answer that it corrects."""
    fields = {"name": name, "model": model, "conversation_id": conversation_id, "turn": turn}
    form: list[Field] = [(field, _text(one)) for field, one in fields.items() if one is not None]
    form += [(e.kind, e if isinstance(e, Upload) else f"media:{e.id}") for e in examples]
    return Call("POST", "/v1/teach", read_as(wire.TaughtObject), form=form)


def taught(*, features: bool = False) -> Call[wire.TaughtList]:
    params = {"features": features or None}
    return Call("GET", "/v1/teach", read_as(wire.TaughtList), params)


def import_taught(names: wire.TaughtList) -> Call[wire.TaughtList]:
    body = names.model_dump(mode="json")
    return Call("PUT", "/v1/teach", read_as(wire.TaughtList), body=body)


def rename_taught(id_: str, name: str) -> Call[wire.TaughtObject]:
    path = f"/v1/teach/{_quoted(id_)}"
    return Call("PATCH", path, read_as(wire.TaughtObject), body={"name": name})


def forget_taught(id_: str) -> Call[wire.Deleted]:
    return Call("DELETE", f"/v1/teach/{_quoted(id_)}", read_as(wire.Deleted))


def transcription(recording: Upload) -> Call[str]:
    """What is said in a recording."""
    form: list[Field] = [("file", recording), ("model", "whisper-1")]
    path = "/v1/audio/transcriptions"
    return Call("POST", path, lambda response: str(response.json()["text"]), form=form)


def models() -> Call[list[wire.ModelInfo]]:
    read = read_as(wire.ModelList)
    return Call("GET", "/v1/models", lambda response: read(response).data)


def ready() -> Call[wire.Ready]:
    """Whether the service answers; until then the answer is an error of status 503."""
    return Call("GET", "/health/ready", read_as(wire.Ready))


def _quoted(id_: str) -> str:
    return quote(id_, safe="")

"""The server's routes as values: what to send, and how to read what comes back.

A :class:`Call` is sent by a client with or without an event loop, so each route is written once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from mico_chat.media.kinds import Kind
from mico_ui.answers import (
    Conversation,
    ConversationPage,
    ConversationSummary,
    Deleted,
    Estimate,
    MediaPage,
    Model,
    ModelList,
    Ready,
    StoredMedium,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A medium to be sent: a file, or the bytes of one. ``name`` is what messages call it."""

    kind: Kind
    source: Path | bytes
    name: str = ""

    @property
    def shown_name(self) -> str:
        """A name that is never empty and can be sent."""
        name = self.name or (self.source.name if isinstance(self.source, Path) else "")
        return _text(name) or self.kind


@dataclass(frozen=True)
class MediumId:
    """A medium that the server has already, by its id."""

    kind: Kind
    id: str


Attachment: TypeAlias = Upload | MediumId

Field: TypeAlias = tuple[str, str | Upload]


@dataclass(frozen=True)
class Question:
    """A message of /v1/chat with its media, in order.

    Without ``conversation_id`` a conversation begins; with ``create`` one of that id does, if there
    is none: ``conv-`` and 24 random hexadecimal digits. ``options`` are the server's generation
    options by name (``max_tokens``, ``temperature``, ``stop``, ``json_schema``, ...); what is left
    out or None has the server's default. ``depth_scale`` is metres for one unit of a 16-bit depth
    map.
    """

    message: str
    media: Sequence[Attachment] = ()
    conversation_id: str | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    store: bool = True
    depth_scale: float | str | None = None
    create: bool = False

    def form(self) -> list[Field]:
        """The fields of the form, in order."""
        fields: list[Field] = [("message", _text(self.message))]
        for medium in self.media:
            value = medium if isinstance(medium, Upload) else f"media:{medium.id}"
            fields.append((medium.kind, value))
        more = {
            "conversation_id": self.conversation_id,
            "create": True if self.create else None,
            "system": self.system,
            "store": None if self.store else False,
            "depth_scale": self.depth_scale,
            **self.options,
        }
        for name, value in more.items():
            # Several values of one name are several fields: the stop texts.
            values = value if isinstance(value, list | tuple) else [value]
            fields += [(name, _text(value)) for value in values if value is not None]
        return fields


def _text(value: Any) -> str:
    """What is sent of a value; halves of surrogate pairs, which are no text, as question marks."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and ``read``, which makes its result of the response."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    form: Sequence[Field] = ()

    def arguments(self, stack: ExitStack) -> dict[str, Any]:
        """Of httpx's ``build_request``; files stay open until ``stack`` closes.

        Raises:
            OSError: for a file that cannot be opened.
        """
        params = {name: value for name, value in self.params.items() if value is not None}
        asked: dict[str, Any] = {"method": self.method, "url": self.path, "params": params}
        if self.body is not None:
            asked["json"] = self.body
        if self.form:
            # Texts go as files without a name: httpx would send all texts before all files.
            asked["files"] = [
                (name, (value.shown_name, _open(value, stack)))
                if isinstance(value, Upload)
                else (name, (None, value))
                for name, value in self.form
            ]
        return asked


def _open(upload: Upload, stack: ExitStack) -> Any:
    if isinstance(upload.source, bytes):
        return upload.source
    return stack.enter_context(upload.source.open("rb"))


def _as(model: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: model.model_validate_json(response.content)


def chat(question: Question) -> Call[None]:
    """Of /v1/chat, answered with events: for :meth:`Client.stream`."""
    form = [*question.form(), ("stream", "true")]
    return Call("POST", "/v1/chat", lambda response: None, form=form)


def estimate(question: Question) -> Call[Estimate]:
    """What a question would cost; its media are decoded, nothing is answered."""
    return Call("POST", "/v1/estimate", _as(Estimate), form=question.form())


def conversations(
    *, limit: int = 20, before: str | None = None, query: str | None = None
) -> Call[ConversationPage]:
    """Kept conversations, the last one answered first; ``before`` is the last id of a page."""
    params = {"limit": limit, "before": before, "query": query}
    return Call("GET", "/v1/conversations", _as(ConversationPage), params)


def conversation(id_: str) -> Call[Conversation]:
    """A kept conversation with its turns."""
    return Call("GET", f"/v1/conversations/{_quoted(id_)}", _as(Conversation))


def rename_conversation(id_: str, title: str) -> Call[ConversationSummary]:
    """Give a conversation another title."""
    path = f"/v1/conversations/{_quoted(id_)}"
    return Call("PATCH", path, _as(ConversationSummary), body={"title": title})


def delete_conversation(id_: str) -> Call[Deleted]:
    """Forget a conversation and what came with it."""
    return Call("DELETE", f"/v1/conversations/{_quoted(id_)}", _as(Deleted))


def delete_turns(id_: str, first: int) -> Call[Deleted]:
    """Take the turns from ``first`` (from 1) on back."""
    return Call("DELETE", f"/v1/conversations/{_quoted(id_)}/turns/{first}", _as(Deleted))


def upload(
    medium: Upload, *, ttl_s: int | None = None, depth_scale: float | str | None = None
) -> Call[StoredMedium]:
    """Store a medium, to be shown by its id; it is decoded, so its report is known."""
    fields: list[Field] = [(medium.kind, medium)]
    more = {"ttl_s": ttl_s, "depth_scale": depth_scale}
    fields += [(name, str(value)) for name, value in more.items() if value is not None]
    return Call("POST", "/v1/media", _as(StoredMedium), form=fields)


def media(
    *, limit: int = 20, after: str | None = None, kind: Kind | None = None
) -> Call[MediaPage]:
    """Uploaded media, the newest first; ``after`` is the last id of a page."""
    params = {"limit": limit, "after": after, "kind": kind}
    return Call("GET", "/v1/media", _as(MediaPage), params)


def medium(id_: str) -> Call[StoredMedium]:
    """What is known of a stored medium."""
    return Call("GET", f"/v1/media/{_quoted(id_)}", _as(StoredMedium))


def medium_content(id_: str) -> Call[bytes]:
    """The file of a stored medium."""
    return Call("GET", f"/v1/media/{_quoted(id_)}/content", lambda response: response.content)


def delete_medium(id_: str) -> Call[Deleted]:
    """Forget a medium that no conversation shows."""
    return Call("DELETE", f"/v1/media/{_quoted(id_)}", _as(Deleted))


def models() -> Call[list[Model]]:
    """The served models."""
    read = _as(ModelList)
    return Call("GET", "/v1/models", lambda response: read(response).data)


def ready() -> Call[Ready]:
    """Whether the model is loaded: an error of status 503 while it is not."""
    return Call("GET", "/health/ready", _as(Ready))


def _quoted(id_: str) -> str:
    return quote(id_, safe="")

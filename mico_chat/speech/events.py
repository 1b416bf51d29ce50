"""The events of OpenAI's Realtime API as it is generally available, of clients and servers.

Fields that have no effect here (``tracing``, ``noise_reduction``) are taken: clients send them.
"""

from __future__ import annotations

import json
import uuid
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]
Most = Annotated[int, Field(ge=1)] | Literal["inf"]


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- How a session hears, thinks and speaks ---


class Sound(_Strict):
    """PCM of 16 bits at 24,000 Hz, little-endian, or G.711 (mu-law, A-law) at 8,000 Hz."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: Literal[24000, 8000] | None = None


class Transcribing(_Strict):
    model: str | None = None
    language: str | None = None
    prompt: str | None = None


class TurnDetection(_Strict):
    """When a turn ends. ``semantic_vad`` is a longer or shorter silence, by its eagerness."""

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    threshold: float = Field(0.5, ge=0, le=1)
    prefix_padding_ms: int = Field(300, ge=0, le=5000)
    silence_duration_ms: int = Field(500, ge=100, le=10_000)
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"
    create_response: bool = True
    interrupt_response: bool = True

    @property
    def silence_ms(self) -> int:
        if self.type == "server_vad":
            return self.silence_duration_ms
        return {"low": 1200, "high": 400}.get(self.eagerness, 700)


class Hearing(_Strict):
    format: Sound = Sound()
    transcription: Transcribing | None = None
    turn_detection: TurnDetection | None = TurnDetection()
    noise_reduction: Any = None


class Speaking(_Strict):
    format: Sound = Sound()
    voice: str = "alloy"
    speed: float = Field(1.0, ge=0.25, le=1.5)


class AudioConfig(_Strict):
    input: Hearing = Hearing()
    output: Speaking = Speaking()


class Session(_Strict):
    type: Literal["realtime"] = "realtime"
    object: Literal["realtime.session"] = "realtime.session"
    id: str = ""
    model: str | None = None
    output_modalities: Modalities = ["audio"]
    instructions: str = ""
    audio: AudioConfig = AudioConfig()
    tools: list[Any] = []
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: Most = "inf"
    expires_at: int | None = None
    tracing: Any = None
    truncation: Any = "auto"
    include: Any = None

    def updated(self, given: dict[str, Any]) -> Session:
        """The session with the fields that are ``given``; others stay, inside of fields, too."""
        kept = {name: getattr(self, name) for name in ("id", "model", "expires_at")}
        return Session.model_validate({**_merged(self.model_dump(), given), **kept})


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = {**old, **new}
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict) and name != "turn_detection":
            merged[name] = _merged(old[name], new[name])
    return merged


# --- The conversation ---


class Content(BaseModel):
    """A part of an item. Its media are ``input_image`` and those of chat completions."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    transcript: str | None = None
    audio: str | None = None


_NEEDED = {
    "message": ("role",),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class Item(_Strict):
    """A message, a call of a tool (``arguments`` is JSON), or its ``output``. Sounds and pictures
    are left out where it is sent to the client."""

    id: Annotated[str, Field(max_length=64)] = Field(default_factory=lambda: new_id("item"))
    object: Literal["realtime.item"] = "realtime.item"
    type: Literal["message", "function_call", "function_call_output"] = "message"
    status: Status = "completed"
    role: Literal["system", "user", "assistant"] | None = None
    content: Annotated[list[Content], Field(max_length=64)] = []
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in _NEEDED[self.type]:
            if getattr(self, name) is None:
                raise ValueError(f"an item {self.type} needs the field {name}")
        return self


class ResponseOptions(_Strict):
    """What one response does otherwise than its session."""

    conversation: Literal["auto", "none"] = "auto"
    output_modalities: Modalities | None = None
    instructions: str | None = None
    audio: dict[str, Any] | None = None
    max_output_tokens: Most | None = None
    input: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    metadata: dict[str, str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class Response(_Strict):
    id: str = Field(default_factory=lambda: new_id("resp"))
    object: Literal["realtime.response"] = "realtime.response"
    status: Status = "in_progress"
    status_details: dict[str, Any] | None = None
    output: list[Item] = []
    conversation_id: str | None = None
    output_modalities: Modalities
    metadata: dict[str, str] | None = None
    usage: dict[str, Any] | None = None


# --- What a client says ---


class _Said(_Strict):
    event_id: Annotated[str, Field(max_length=512)] | None = None


class SessionUpdate(_Said):
    type: Literal["session.update"]
    session: dict[str, Any]


class AudioAppend(_Said):
    type: Literal["input_audio_buffer.append"]
    audio: str


class AudioEnd(_Said):
    type: Literal["input_audio_buffer.commit", "input_audio_buffer.clear"]


class ItemCreate(_Said):
    type: Literal["conversation.item.create"]
    previous_item_id: str | None = None
    item: Item


class ItemNamed(_Said):
    type: Literal["conversation.item.delete", "conversation.item.retrieve"]
    item_id: str


class ItemTruncate(_Said):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: Literal[0] = 0
    audio_end_ms: int = Field(ge=0)


class ResponseCreate(_Said):
    type: Literal["response.create"]
    response: ResponseOptions = ResponseOptions()


class ResponseCancel(_Said):
    type: Literal["response.cancel"]
    response_id: str | None = None


_Buffer: TypeAlias = AudioAppend | AudioEnd
_Items: TypeAlias = ItemCreate | ItemNamed | ItemTruncate
ClientEvent: TypeAlias = SessionUpdate | _Buffer | _Items | ResponseCreate | ResponseCancel
CLIENT_EVENT: TypeAdapter[ClientEvent] = TypeAdapter(
    Annotated[ClientEvent, Field(discriminator="type")]
)


# --- What a server says ---


class ServerEvent(_Strict):
    """An event of a server, with the fields that its type has."""

    type: str
    event_id: str = Field(default_factory=lambda: new_id("event"))
    session: Session | None = None
    item: Item | None = None
    item_id: str | None = None
    previous_item_id: str | None = None
    conversation: dict[str, str] | None = None
    response: Response | None = None
    response_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    part: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    delta: str | None = None
    text: str | None = None
    transcript: str | None = None
    audio_start_ms: int | None = None
    audio_end_ms: int | None = None
    usage: dict[str, Any] | None = None
    rate_limits: list[dict[str, Any]] | None = None
    error: dict[str, Any] | None = None

    def json_text(self) -> str:
        """As it is sent: a field that it has not is left out, but not those of a session."""
        data = self.model_dump(mode="json", exclude_none=True)
        if self.session is not None:
            data["session"] = self.session.model_dump(mode="json")
        return json.dumps(data)

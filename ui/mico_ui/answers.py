"""What the server answers, as far as a user interface needs it.

But for the report of a medium, the models are this package's own: an interface may be older or
newer than the server it talks to, so fields it does not know are passed over. Times are seconds
since 1970.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict

from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MediaReport


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Usage(_Answer):
    """Tokens of a request; ``prompt_tokens`` includes ``media_tokens`` and ``cached_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int = 0
    cached_tokens: int = 0


class TopLogprob(_Answer):
    """A token that could have stood there, and its log-probability."""

    token: str
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones at its place."""

    top: list[TopLogprob] = []


class Choice(_Answer):
    """One of several answers to one question."""

    text: str
    finish_reason: str


class ChatAnswer(_Answer):
    """A whole answer. ``conversation_id`` and ``turn`` (from 1) are None if it is not stored."""

    answer: str
    finish_reason: str
    model: str
    conversation_id: str | None
    turn: int | None
    usage: Usage
    media: list[MediaReport] = []
    choices: list[Choice] = []
    logprobs: list[TokenLogprob] = []


class Reports(_Answer):
    """The stream's first event: the media of the conversation, in the order they were shown.

    ``conversation_id`` and ``turn`` are what the answer will be kept as; None if it is not stored.
    """

    media: list[MediaReport]
    conversation_id: str | None = None
    turn: int | None = None


class Delta(_Answer):
    """The next piece of an answer, of the ``index``-th of ``n``."""

    index: int = 0
    text: str
    logprobs: list[TokenLogprob] = []


ChatEvent: TypeAlias = Reports | Delta | ChatAnswer
"""A stream is :class:`Reports`, then any number of :class:`Delta`, then :class:`ChatAnswer`."""


class ShownMedium(_Answer):
    """A medium of a kept message."""

    kind: Kind
    id: str
    name: str


class Turn(_Answer):
    """A kept message and its answer.

    ``finish_reason`` may be ``cancelled``, and ``unanswered``: the message is being answered now,
    or the server ended before it was.
    """

    turn: int
    message: str
    media: list[ShownMedium]
    answer: str
    finish_reason: str
    usage: Usage | None
    reports: list[MediaReport]
    created_at: int


class ConversationSummary(_Answer):
    """A kept conversation without its turns."""

    id: str
    title: str
    system: str | None
    model: str
    created_at: int
    updated_at: int


class Conversation(ConversationSummary):
    """A whole kept conversation."""

    turns: list[Turn]


class ConversationPage(_Answer):
    """Conversations, the last one answered first; ``has_more`` behind the last of them."""

    data: list[ConversationSummary]
    has_more: bool


class StoredMedium(_Answer):
    """An uploaded medium; None as ``expires_at``: it is kept."""

    id: str
    kind: Kind
    name: str
    bytes: int
    created_at: int
    expires_at: int | None
    report: MediaReport | None


class MediaPage(_Answer):
    """Uploaded media, the newest first; ``has_more`` behind the last of them."""

    data: list[StoredMedium]
    has_more: bool


class Estimate(_Answer):
    """What a request would take: it ``fits`` if prompt and ``max_tokens`` are in the context."""

    prompt_tokens: int
    media_tokens: int
    max_tokens: int
    context_length: int
    fits: bool
    media: list[MediaReport] = []


class Model(_Answer):
    """The served model; ``context_length`` in tokens.

    ``defaults`` and ``system_prompt`` are its own, where a request has none.
    """

    id: str
    context_length: int
    embeddings: bool = False
    modalities: list[Kind] = list(KINDS)
    defaults: dict[str, Any] = {}
    system_prompt: str | None = None


class ModelList(_Answer):
    """The served models: one."""

    data: list[Model]


class Ready(_Answer):
    """The model answers."""

    model: str


class Deleted(_Answer):
    """It is no longer there."""

    id: str

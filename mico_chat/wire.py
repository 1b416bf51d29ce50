"""The JSON answers of the server, as both the server and its user interfaces know them.

A page may be older than its server, so a reader ignores fields that it does not know. A field that
is added here later needs a default: a page may be newer than its server, too. Times are whole
seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MediaReport
from mico_chat.options import with_options

FinishReason = Literal["stop", "length"]
"""``stop``: the model or a stop text ended the answer; ``length``: ``max_tokens`` did."""

TurnEnd = Literal["stop", "length", "cancelled", "unanswered"]
"""How a stored turn ended; see :class:`TurnObject`."""


def _whole_seconds(time: Any) -> Any:
    return int(time.timestamp()) if isinstance(time, datetime) else time


Seconds = Annotated[int, BeforeValidator(_whole_seconds)]
"""It is a time in whole seconds since 1970."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)


# --- Answers of the model ---


class Usage(_Answer):
    """Tokens of a request.

    ``prompt_tokens`` includes ``media_tokens``, the context tokens, and ``cached_tokens``, those
    that an earlier request had left computed. ``completion_tokens`` counts all ``n`` answers,
    ``reasoning_tokens`` those of them with which the model thinks before it answers. With
    ``truncation`` ``turns_left_out`` counts the earlier turns that did not fit, ``media_left_out``
    the media of other earlier turns that were named and not shown. ``pages_sent`` has a sentence
    for each document, of any turn, of which only some pages were shown.
    """

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    turns_left_out: int = 0
    media_left_out: int = 0
    pages_sent: tuple[str, ...] = ()


class TokenLogprob(_Answer):
    """A token's text and log-probability, and the likeliest tokens at its place."""

    token: str
    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class ExplainedPart(_Answer):
    """A part of a medium: a "tile" of a still or map, a "frame", the "order" of the frames or the
    "sound track" of a video, a "stretch" of a sound, "page 1" of a medium that is made of pages, or
    the "words" that were read or heard in it.

    ``effect`` is how much the answer's log-probability falls without it, in nats; ``box`` are the
    left, top, right and bottom edge as parts of the width and height, ``time`` the first and last
    second.
    """

    what: str
    effect: float
    box: tuple[float, float, float, float] | None = None
    time: tuple[float, float] | None = None


class ExplainedMedium(_Answer):
    """``effect`` as of a part, of a video that of the order of its frames if it is larger;
    ``share``, 0 to 1, of the effects of all media that have one."""

    effect: float
    share: float
    parts: tuple[ExplainedPart, ...] = ()


class ExplainedWord(_Answer):
    """A word of the answer, with the space before it: its log-probability, and the effect of each
    medium on it. ``medium`` is the number, from 0, of the one with the largest; null if none has
    any."""

    text: str
    logprob: float
    effects: tuple[float, ...]
    medium: int | None


class Explanation(_Answer):
    """What an answer rests on: each medium, and each part, was left out in turn, and the answer's
    own tokens scored again.

    ``logprob`` is the answer's log-probability, ``without_media`` that with all media left out.
    ``same_without_media``: each token is the likeliest then, too.
    """

    words: tuple[ExplainedWord, ...]
    media: tuple[ExplainedMedium, ...]
    logprob: float
    without_media: float
    same_without_media: bool


class Choice(_Answer):
    """One of the ``n`` answers to a question.

    An answer about media has a ``confidence`` from 0 to 1: the geometric mean of the probabilities
    that the model gave to its tokens, without temperature and penalties; the first of several
    tokens, which decides how the answer begins, does not count. It is ``unsure`` if the
    confidence is below the mark that the model's folder sets for its kind of answer. Both are null
    for a conversation without media, and ``unsure`` is null for a model without a mark.
    ``reasoning_content`` is what the model thought before it answered; null if it did not think.
    """

    text: str
    reasoning_content: str | None = None
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    confidence: float | None = None
    unsure: bool | None = None


class ChatResponse(_Answer):
    """An answer, its cost, and a report of each medium of the conversation.

    ``choices`` has all ``n`` answers if more than one was requested, the first one too.
    ``logprobs`` has those of the first answer's tokens if they were requested. ``confidence`` and
    ``unsure`` and ``reasoning_content`` are those of the first answer, as in ``Choice``; thoughts
    are not stored. ``explanation`` is there if it was asked for. ``conversation_id`` continues the
    conversation, and ``turn`` (from 1) is the number of this message in it. Both are null if the
    answer is not stored.
    """

    answer: str
    reasoning_content: str | None = None
    finish_reason: FinishReason
    model: str
    conversation_id: str | None
    turn: int | None
    usage: Usage
    media: tuple[MediaReport, ...]
    choices: tuple[Choice, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    confidence: float | None = None
    unsure: bool | None = None
    explanation: Explanation | None = None


class MediaEvent(_Answer):
    """The first event of a stream, ``media``: the media of the conversation, in their order.

    The answer will be stored as ``turn`` of ``conversation_id``; both are null if it is not stored.
    """

    conversation_id: str | None
    turn: int | None
    media: tuple[MediaReport, ...]


class DeltaEvent(_Answer):
    """An event ``delta`` of a stream: the next piece of the answer number ``index`` of ``n``, or of
    what the model thinks before it: ``reasoning_content``."""

    index: int = Field(ge=0)
    text: str
    reasoning_content: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class Progress(_Answer):
    """An event ``progress``: how much is done of what an answer waits for.

    It is tokens of the "prompt", parts of the "media", steps to "explain" an answer, or bytes of a
    "model" that is loaded, whose ``total`` may be 0: unknown.
    """

    what: Literal["model", "media", "prompt", "explain"]
    done: int
    total: int


ChatEvent: TypeAlias = Progress | MediaEvent | DeltaEvent | ChatResponse | Explanation
"""A stream is a ``media`` event, any number of ``delta`` events, then ``done``: a
:class:`ChatResponse`. An event ``error`` with an :class:`ErrorBody` ends it early. ``progress``
comes before any of them, where it was asked for. That of an explanation is ``done`` with it."""


class Estimate(_Answer):
    """The cost of a request in tokens; nothing was encoded to find it.

    ``prompt_tokens`` includes ``media_tokens``, the context tokens. The request ``fits`` when
    prompt and ``max_tokens`` are within ``context_length``. ``media`` has one report for each
    medium, in the order of the request. For a request with ``explain``, ``explain_prompts`` counts
    the prompts after which the answer is scored again, each about as long as the question's. What
    is left out is as in :class:`Usage`.
    """

    prompt_tokens: int
    media_tokens: int
    turns_left_out: int = 0
    media_left_out: int = 0
    max_tokens: int
    context_length: int
    fits: bool
    media: tuple[MediaReport, ...] = ()
    explain_prompts: int | None = None


# --- Stored media and conversations ---


class MediaObject(_Answer):
    """A stored medium; one whose ``expires_at`` is null is kept until it is deleted."""

    id: str
    object: Literal["media"] = "media"
    kind: Kind
    name: str
    bytes: int
    sha256: str
    created_at: Seconds
    expires_at: Seconds | None
    report: MediaReport | None


class MediaList(_Answer):
    """Stored media, the newest first. ``after`` with the id of the last one gives the next page."""

    object: Literal["list"] = "list"
    data: list[MediaObject]
    has_more: bool


class ShownMedium(_Answer):
    """A medium of a message; its file is at /v1/media/{id}/content. A pinned one stays where
    ``truncation`` leaves its turn out. The words of a ``heard`` sound are in the message, which the
    model reads in its place."""

    kind: Kind
    id: str
    name: str
    pinned: bool = False
    heard: bool = False


class TurnObject(_Answer):
    """A message and its answer.

    ``turn`` is its number in the conversation, and ``parent`` that of the turn before it, 0 at the
    beginning. ``versions`` are the numbers of all turns with this parent, and ``later`` counts the
    turns that follow this one on any path. ``finish_reason`` is ``cancelled`` if the client left
    before the end of the answer. It is ``unanswered`` while the message is being answered, and if
    the server ended before it was answered; ``answer`` is then what was streamed up to about a
    second before. The next question includes an unanswered message; deleting the turn removes it.
    ``reports`` has one report for each of ``media``, and is empty for an unanswered message.
    ``confidence`` and ``unsure`` are as in ``Choice``, and null if the answer was cancelled.
    ``model`` answered. ``rival`` is the version with which it was answered side by side, and
    ``preferred`` the better one of both; null: there is none.
    """

    turn: int
    parent: int = 0
    versions: tuple[int, ...] = ()
    later: int = 0
    message: str
    media: list[ShownMedium]
    answer: str
    finish_reason: TurnEnd
    usage: Usage | None
    reports: tuple[MediaReport, ...]
    confidence: float | None = None
    unsure: bool | None = None
    model: str = ""
    rival: int | None = None
    preferred: int | None = None
    created_at: Seconds


class ConversationSummary(_Answer):
    """A conversation without its turns. ``pinned`` ones stand first in lists."""

    id: str
    object: Literal["conversation"] = "conversation"
    title: str
    system: str | None
    model: str
    pinned: bool = False
    archived: bool = False
    created_at: Seconds
    updated_at: Seconds


class ConversationObject(ConversationSummary):
    """A whole conversation; ``head`` is the last turn of the path that was chosen."""

    head: int | None = None
    turns: list[TurnObject]


class ConversationList(_Answer):
    """Conversations: pinned ones first, and among both the last one answered first. ``before`` with
    the id of the last one gives the next page."""

    object: Literal["list"] = "list"
    data: list[ConversationSummary]
    has_more: bool


class TaughtObject(_Answer):
    """A taught name: ``examples`` is the number of its pictures or sounds (``kind``).

    It belongs to the ``model`` and all others of the same ``space``. ``corrections`` are the turns
    whose answers it corrects. An exported name has the ``features`` of its examples in base64.
    """

    id: str = ""
    object: Literal["taught"] = "taught"
    name: str
    kind: Kind
    examples: int
    model: str
    space: str
    corrections: tuple[dict[str, Any], ...] = ()
    features: str | None = None
    created_at: Seconds | None = None


class TaughtList(_Answer):
    """Taught names, the oldest first; also what is exported and imported."""

    object: Literal["list"] = "list"
    data: tuple[TaughtObject, ...]


class Deleted(_Answer):
    """The thing of this id, or a part of it, has been deleted."""

    id: str
    deleted: Literal[True] = True


# --- The service ---


@with_options("defaults", required=True)
class AnswerDefaults(_Answer):
    """The options of an answer that hold where the request does not set them."""


class Architecture(_Answer):
    """What a model reads and writes, in the shape that OpenRouter and llama-server use."""

    input_modalities: tuple[str, ...]
    output_modalities: tuple[str, ...] = ("text",)

    @classmethod
    def reading(cls, kinds: Sequence[Kind]) -> Architecture:
        return cls(input_modalities=("text", *kinds))


LoadState = Literal["loaded", "loading", "unloaded", "failed"]


class ModelStatus(_Answer):
    """Whether a model is loaded; ``reason`` says why loading it failed.

    An unloaded model is loaded when a request names it, and a failed one is tried again then.
    ``bytes`` is the memory that a loaded model counts with, ``requests`` how many use it or wait
    for it.
    """

    value: LoadState = "loaded"
    reason: str | None = None
    bytes: int = 0
    requests: int = 0
    last_used: Seconds | None = None


class ModelInfo(_Answer):
    """A served model in OpenAI's shape, and what it takes.

    An adapter's ``parent`` is the model that it is made for, and its ``root`` is its folder.
    ``modalities`` are the kinds of media that it reads, at most ``max_media`` in a request.
    ``context_length`` is in tokens.
    ``system_prompt`` is the model's own; a request's own system message replaces it.
    ``depth_model`` estimates depth maps of pictures; null if the server estimates none. These
    three, ``embeddings`` and ``defaults`` are null until the model has been loaded for the first
    time, and ``notes`` are empty: sentences that say which media the model cannot be shown here,
    and whether its requests run alone, each with the reason.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "mico-chat"
    root: str | None = None
    parent: str | None = None
    modalities: tuple[Kind, ...] = KINDS
    architecture: Architecture = Architecture.reading(KINDS)
    status: ModelStatus = ModelStatus()
    max_media: int = 32
    context_length: int | None = None
    embeddings: bool | None = None
    system_prompt: str | None = None
    defaults: AnswerDefaults | None = None
    depth_model: str | None = None
    notes: tuple[str, ...] = ()


class ModelList(_Answer):
    """The served models; the first one answers requests that name none."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Live(_Answer):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(_Answer):
    """The service answers; ``model`` is its first one."""

    status: Literal["ready"] = "ready"
    model: str


class ErrorDetail(_Answer):
    """An error: ``type`` says who is at fault, ``code`` what happened, ``param`` in which field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Answer):
    """The body of every answer that is an error."""

    error: ErrorDetail

"""A turn of a conversation as the page shows it, and what went wrong in words."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mico_ui.answers import Conversation, Turn, Usage
from mico_ui.browser.markup import html_of
from mico_ui.browser.media import Card, MediaDesk
from mico_ui.browser.profile import Profile
from mico_ui.client import ApiError

State = Literal["waiting", "answering", "done", "stopped", "error", "unanswered", "gone"]
"""``unanswered``: the server has kept the question and no answer; ``gone``: nothing is known."""

ENDED: tuple[State, ...] = ("done", "stopped", "error", "gone")
"""The states after which no other comes."""

FAILED = ApiError("a defect of this page; its log has the details", status=500)
"""What is told of an error that nobody foresaw; the reason goes to the log alone."""


class Problem(BaseModel):
    """An error: the server's own reason, and what the user can do.

    ``away``: the server cannot be reached, so that asking again later may help. ``setting``: the
    name of the setting that mends it.
    """

    model_config = ConfigDict(frozen=True)

    message: str
    advice: str
    away: bool = False
    setting: str | None = None


class TurnView(BaseModel):
    """A question and its answer. ``turn`` counts from 1, and is None where nothing was kept.

    ``version`` counts the views of an answer that grows. ``media`` has the question's cards;
    ``media_total`` counts those of the whole conversation.
    ``tokens_per_second`` is that of the answer behind its first word, if it was watched.
    """

    model_config = ConfigDict(frozen=True)

    ask: str = ""
    version: int = 0
    state: State
    conversation_id: str | None = None
    turn: int | None = None
    message: str = ""
    media: tuple[Card, ...] = ()
    media_total: int | None = None
    answer: str = ""
    html: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    tokens_per_second: float | None = None
    problem: Problem | None = None


class ConversationView(BaseModel):
    """A whole conversation."""

    model_config = ConfigDict(frozen=True)

    id: str
    title: str
    system: str | None
    turns: tuple[TurnView, ...]


_STATES: dict[str, State] = {"cancelled": "stopped", "unanswered": "unanswered"}


def view_of(desk: MediaDesk, profile: Profile, turn: Turn, conversation_id: str) -> TurnView:
    """A kept turn."""
    return TurnView(
        state=_STATES.get(turn.finish_reason, "done"),
        conversation_id=conversation_id,
        turn=turn.turn,
        message=turn.message,
        media=tuple(desk.cards(profile, turn.media, turn.reports)),
        answer=turn.answer,
        html=html_of(turn.answer),
        finish_reason=turn.finish_reason,
        usage=turn.usage,
    )


def views_of(desk: MediaDesk, profile: Profile, conversation: Conversation) -> ConversationView:
    """A kept conversation."""
    return ConversationView(
        id=conversation.id,
        title=conversation.title,
        system=conversation.system,
        turns=tuple(view_of(desk, profile, turn, conversation.id) for turn in conversation.turns),
    )


def with_answering(conversation: ConversationView, view: TurnView) -> ConversationView:
    """A kept conversation with a turn of it that is under way, as far as that has grown."""
    turns = conversation.turns
    last = turns[-1] if turns else None
    if last is None or last.state != "unanswered" or last.message != view.message:
        return conversation.model_copy(update={"turns": (*turns, view)})
    asked = {"turn": last.turn, "media": view.media or last.media}
    return conversation.model_copy(update={"turns": (*turns[:-1], view.model_copy(update=asked))})


def problem_of(error: ApiError) -> Problem:
    """What to tell the user."""
    if error.code in _KEY_FAULTS:
        message, advice = _KEY_FAULTS[error.code]
        return Problem(message=message or str(error), advice=advice, setting="key")
    return Problem(
        message=str(error), advice=_advice(error), away=error.status is None or error.status == 503
    )


_KEY_FAULTS = {
    "missing_api_key": ("This server asks for a key.", "Whoever runs the server can make one."),
    "invalid_api_key": (
        "The key in Settings is not valid here.",
        "Whoever runs the server can make another.",
    ),
    "insufficient_scope": (None, "Enter another key."),
}
"""By the code of a server's error: the message, None for the server's own, and advice."""


def _advice(error: ApiError) -> str:
    if error.code == "context_length_exceeded":
        return "Start a new chat, remove media, or lower the longest answer in Settings."
    match error.status:
        case None:
            return "Nothing is lost: ask again when the server is back."
        case 401 | 403:
            return "Enter a valid API key in Settings."
        case 404 | 410:
            return "It was deleted, or it has expired. Add the file again, or start a new chat."
        case 409:
            return "Wait until the other answer has ended. Then ask again."
        case 415:  # of this page's own: its message says what to do
            return ""
        case 413 | 422 | 400:
            return "Correct this. Then try again."
        case 429:
            seconds = error.retry_after_s
            return f"Ask again in {seconds:g} s." if seconds else "Ask again in a moment."
        case 501:
            return "Use a model that can do it, such as the mini."
        case 503:
            return "The model is still loading, or the service is busy. Ask again in a moment."
        case _:
            return "Ask again. If this comes back, the reason is in the server's log."

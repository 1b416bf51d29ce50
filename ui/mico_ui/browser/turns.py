"""A turn of a conversation as the page shows it, and what went wrong in words."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from mico_ui.answers import Conversation, Turn, Usage
from mico_ui.browser.markup import html_of
from mico_ui.browser.media import Card, MediaDesk
from mico_ui.browser.profile import Profile
from mico_ui.client import ApiError

State = Literal["waiting", "answering", "done", "stopped", "error"]


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

    ``media`` has the question's cards; ``media_total`` counts those of the whole conversation.
    """

    model_config = ConfigDict(frozen=True)

    ask: str = ""
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
    problem: Problem | None = None


class ConversationView(BaseModel):
    """A whole conversation."""

    model_config = ConfigDict(frozen=True)

    id: str
    title: str
    system: str | None
    turns: tuple[TurnView, ...]


def view_of(desk: MediaDesk, profile: Profile, turn: Turn, conversation_id: str) -> TurnView:
    """A kept turn."""
    return TurnView(
        state="stopped" if turn.finish_reason == "cancelled" else "done",
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
        return "Start a new chat, take media away, or ask for a shorter answer in Settings."
    match error.status:
        case None:
            return "Nothing is lost: ask again when the server is back."
        case 401 | 403:
            return "Enter a valid API key in Settings."
        case 404 | 410:
            return (
                "It may have been deleted, or expired: attach the file again or start a new chat."
            )
        case 409:
            return "Wait until the other answer has ended, then ask again."
        case 415:  # of this page's own: its message says what to do
            return ""
        case 413 | 422 | 400:
            return "Change what the message names, then ask again."
        case 429:
            seconds = error.retry_after_s
            return f"Ask again in {seconds:g} s." if seconds else "Ask again in a moment."
        case 501:
            return "Another model may have it, such as the mini."
        case 503:
            return "The model is still loading, or the service is busy: ask again in a moment."
        case _:
            return "Ask again; if it stays, its operator finds the reason in the server's log."

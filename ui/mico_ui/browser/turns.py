"""A turn of a conversation as the page shows it, its Markdown as HTML, and errors in words."""

from __future__ import annotations

from functools import cache, lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import yaml
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from mico_chat.wire import ConversationObject, TurnObject, Usage
from mico_ui.browser.cards import Card, MediaDesk
from mico_ui.browser.visitor import Frozen, Visitor
from mico_ui.client import ApiError

State = Literal["waiting", "answering", "done", "stopped", "error", "unanswered", "gone"]
"""``unanswered``: the server has the question and no answer; ``gone``: nothing is known of it."""

ENDED: tuple[State, ...] = ("done", "stopped", "error", "gone")  # no other state comes later

# The error that a visitor sees where nobody foresaw one; the log alone has the reason.
_FAILED = ApiError("a defect of this page; its log has the details", status=500)


@cache
def _parser() -> MarkdownIt:
    # HTML in an answer is shown as text, and nothing in it loads a picture from anywhere.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _coloured})
    return parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])


@lru_cache(maxsize=64)
def _coloured(code: str, language: str, attributes: str) -> str:
    """Code as HTML with Pygments' short class names behind ``hl-``.

    For an unknown language the result is empty, and the parser escapes the code as it is.
    """
    if not language or len(code) > 20_000:  # an answer is drawn anew while it grows
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="hl-")))


def html_of(text: str) -> str:
    return str(_parser().render(text))


class Problem(Frozen):
    """An error: the server's own reason, and advice for the user.

    ``away``: the server cannot be reached, so that asking again later may help. Changing the
    setting named ``setting`` solves the problem.
    """

    message: str
    advice: str
    away: bool = False
    setting: str | None = None


class TurnView(Frozen):
    """A question and its answer. ``turn`` counts from 1, and is None where nothing was stored.

    ``version`` counts the views of an answer that grows. ``media`` has the question's cards;
    ``media_total`` counts the media of the whole conversation. ``tokens_per_second`` is known if
    this page's process has seen the answer grow.
    """

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


class ConversationView(Frozen):
    id: str
    title: str
    system: str | None
    turns: tuple[TurnView, ...]


_STATES: dict[str, State] = {"cancelled": "stopped", "unanswered": "unanswered"}


def view_of(desk: MediaDesk, visitor: Visitor, turn: TurnObject, conversation_id: str) -> TurnView:
    return TurnView(
        state=_STATES.get(turn.finish_reason, "done"),
        conversation_id=conversation_id,
        media=desk.cards(visitor, turn.media, turn.reports),
        html=html_of(turn.answer),
        **turn.model_dump(include={"turn", "message", "answer", "finish_reason", "usage"}),
    )


def views_of(
    desk: MediaDesk, visitor: Visitor, conversation: ConversationObject
) -> ConversationView:
    return ConversationView(
        turns=tuple(view_of(desk, visitor, turn, conversation.id) for turn in conversation.turns),
        **conversation.model_dump(include={"id", "title", "system"}),
    )


def with_answering(conversation: ConversationView, view: TurnView) -> ConversationView:
    """A stored conversation with the turn that is being answered, as far as the answer is."""
    turns = conversation.turns
    last = turns[-1] if turns else None
    if last is None or last.state != "unanswered" or last.message != view.message:
        return conversation.model_copy(update={"turns": (*turns, view)})
    asked = {"turn": last.turn, "media": view.media or last.media}
    return conversation.model_copy(update={"turns": (*turns[:-1], view.model_copy(update=asked))})


@cache
def words() -> dict[str, Any]:
    """The texts of ``words.yaml``."""
    text = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def problem_of(error: ApiError = _FAILED) -> Problem:
    advice = words()["advice"].get(error.status or "unreachable", words()["advice"]["other"])
    if error.status == HTTPStatus.TOO_MANY_REQUESTS and error.retry_after_s:
        advice = f"Ask again in {error.retry_after_s:g} s."
    away = error.status in (None, HTTPStatus.SERVICE_UNAVAILABLE)
    found = {"message": str(error), "advice": advice, "away": away}
    return Problem(**{**found, **words()["faults"].get(error.code, {})})

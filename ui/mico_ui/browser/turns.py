"""Turns of a conversation as the page shows them, and the answers that grow in them.

An answer grows until it ends, fails or is stopped. It belongs to this process and not to the
browser's connection: a page that is loaded anew follows it again by its name, and an answer whose
page is closed still comes to its end.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import cache, lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import yaml
from markdown_it import MarkdownIt
from pydantic import Field
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from mico_chat import wire
from mico_chat.wire import ChatResponse, ConversationObject, DeltaEvent, TurnObject, Usage
from mico_ui import describe, routes
from mico_ui.browser.cards import Card, MediaDesk
from mico_ui.browser.visitor import Frozen, Visitor
from mico_ui.client import STORED_S, ApiError, AsyncClient
from mico_ui.routes import MediumId, Question

logger = logging.getLogger(__name__)

# The settings of a visitor that are options of an answer, too.
OPTIONS = {"temperature", "max_tokens", "top_p", "repetition_penalty", "seed"}

PATIENCE_S = 20.0  # a page that follows an answer gets the same view again after this time
ENDED_S = 60.0  # the last view of an answer stays for this time


State = Literal["waiting", "answering", "done", "stopped", "error", "unanswered", "gone"]
"""``unanswered``: the server has the question and no answer; ``gone``: nothing is known of it."""

ENDED: tuple[State, ...] = ("done", "stopped", "error", "gone")  # no other state comes later

# The error that a visitor sees where nobody foresaw one; the log alone has the reason.
_FAILED = ApiError("a defect of this page; its log has the details", status=500)


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


# HTML in an answer is shown as text, and nothing in it loads a picture from anywhere.
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _coloured})
    .enable(["table", "strikethrough"])
    .disable(["image", "html_block", "html_inline"])
)


def html_of(text: str) -> str:
    return str(_MARKDOWN.render(text))


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

    ``version`` counts the views of an answer that grows, ``progress`` says what it waits for.
    ``media`` has the question's cards; ``media_total`` counts the media of the whole conversation.
    ``thoughts`` and ``tokens_per_second`` are known if this process has seen the answer grow.
    """

    ask: str = ""
    version: int = 0
    state: State
    conversation_id: str | None = None
    turn: int | None = None
    message: str = ""
    progress: str = ""
    media: tuple[Card, ...] = ()
    media_total: int | None = None
    answer: str = ""
    thoughts: str = ""
    html: str = ""
    finish_reason: str = ""
    unsure: bool | None = None
    usage: Usage | None = None
    tokens_per_second: float | None = None
    problem: Problem | None = None


class ConversationView(Frozen):
    id: str
    title: str
    system: str | None
    model: str = ""
    turns: tuple[TurnView, ...]


_STATES: dict[str, State] = {"cancelled": "stopped", "unanswered": "unanswered"}


def view_of(desk: MediaDesk, visitor: Visitor, turn: TurnObject, conversation_id: str) -> TurnView:
    return TurnView(
        state=_STATES.get(turn.finish_reason, "done"),
        conversation_id=conversation_id,
        media=desk.cards(visitor, turn.media, turn.reports),
        html=html_of(turn.answer),
        **turn.model_dump(
            include={"turn", "message", "answer", "finish_reason", "unsure", "usage"}
        ),
    )


def views_of(
    desk: MediaDesk, visitor: Visitor, conversation: ConversationObject
) -> ConversationView:
    return ConversationView(
        turns=tuple(view_of(desk, visitor, turn, conversation.id) for turn in conversation.turns),
        **conversation.model_dump(include={"id", "title", "system", "model"}),
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


class PageQuestion(Frozen):
    """A question as the page sends it; ``ask`` is the page's name for the question.

    With ``create`` the conversation is new, and the page has made its id. ``replaces`` is the first
    turn to delete. ``again`` is an earlier message that the server may have stored unanswered.
    ``prefix`` is the beginning of an answer that the model continues.
    """

    ask: str = Field(max_length=64)
    message: str = ""
    media: tuple[MediumId, ...] = ()
    conversation_id: str | None = None
    create: bool = False
    replaces: int | None = None
    again: str | None = None
    prefix: str = ""

    def for_server(self, visitor: Visitor) -> Question:
        return Question(
            self.message,
            self.media,
            model=visitor.model or None,
            conversation_id=self.conversation_id,
            create=self.create,
            system=visitor.system or None,
            options={**visitor.model_dump(include=OPTIONS), "prefix": self.prefix or None},
        )


@dataclass
class _Answer:
    """An answer and its latest view. A stop cancels ``growing``; ``task`` waits for its end."""

    question: PageQuestion
    view: TurnView
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    growing: asyncio.Task[None] | None = None
    task: asyncio.Task[None] | None = None

    def show(self, **changes: Any) -> None:
        version = self.view.version + 1
        self.view = self.view.model_copy(update={**changes, "version": version})
        self.changed.set()
        self.changed = asyncio.Event()

    async def after(self, version: int) -> TurnView:
        """The first view later than ``version``, or the latest one after PATIENCE_S."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.view.version <= version and self.view.state not in ENDED:
                    await self.changed.wait()
        except TimeoutError:
            pass  # networks may cut a connection that is silent for long
        return self.with_html()

    def with_html(self) -> TurnView:
        return self.view.model_copy(update={"html": html_of(self.view.answer)})


@dataclass(frozen=True)
class Answers:
    """Asks questions; a page follows and stops the answers of its owner by their name."""

    desk: MediaDesk
    _answers: dict[tuple[tuple[str, str], str], _Answer] = field(default_factory=dict)

    async def ask(self, visitor: Visitor, asked: PageQuestion) -> None:
        key = visitor.owner, asked.ask
        if key in self._answers:
            return
        known = asked.model_dump(include={"ask", "conversation_id", "message"})
        view = TurnView(state="waiting", **known)
        answer = self._answers[key] = _Answer(asked, view)
        loop = asyncio.get_running_loop()
        answer.growing = loop.create_task(self._grow(visitor, answer))
        answer.task = loop.create_task(self._follow_to_end(visitor, answer, answer.growing))
        # The last view stays for a while, so that a page that follows the answer gets it.
        answer.task.add_done_callback(
            lambda _: loop.call_later(ENDED_S, self._answers.pop, key, None)
        )

    async def follow(self, visitor: Visitor, ask: str, version: int) -> TurnView:
        """The turn once it has grown beyond ``version``; errors are part of it.

        The state is ``gone`` for an answer that ended a while ago or was never asked for here.
        """
        answer = self._answers.get((visitor.owner, ask))
        return TurnView(ask=ask, state="gone") if answer is None else await answer.after(version)

    async def stop(self, visitor: Visitor, ask: str) -> None:
        answer = self._answers.get((visitor.owner, ask))
        if answer is not None and answer.growing is not None:
            answer.growing.cancel()

    def answering(self, visitor: Visitor, conversation_id: str) -> TurnView | None:
        for (owner, _), answer in self._answers.items():
            here = owner == visitor.owner and answer.question.conversation_id == conversation_id
            if here and answer.view.state not in ENDED:
                return answer.with_html()
        return None

    async def _follow_to_end(
        self, visitor: Visitor, answer: _Answer, growing: asyncio.Task[None]
    ) -> None:
        try:
            await asyncio.wait({growing})
            if growing.cancelled():
                await self._show_stopped(visitor, answer)
            elif error := growing.exception():
                raise error
        except ApiError as error:
            answer.show(state="error", problem=problem_of(error))
        except Exception:
            logger.exception("a question failed")
            answer.show(state="error", problem=problem_of())

    async def _grow(self, visitor: Visitor, answer: _Answer) -> None:
        question, text, thoughts, began = answer.question, "", "", time.monotonic()
        async with visitor.client(self.desk.api) as client:
            await _make_room(client, question)
            async with client.stream(question.for_server(visitor)) as events:
                async for event in events:
                    if isinstance(event, wire.Progress):
                        answer.show(progress=describe.progress(event))
                        continue
                    assert not isinstance(event, wire.Explanation)
                    if isinstance(event, DeltaEvent):
                        began = began if text else time.monotonic()
                        text += event.text
                        thoughts += event.reasoning_content
                        answer.show(state="answering", answer=text, thoughts=thoughts)
                        continue
                    # The last reports are those of the question's own media.
                    own = event.media[len(event.media) - len(question.media) :]
                    cards = tuple(
                        self.desk.kept(visitor, shown.id, report)
                        for shown, report in zip(question.media, own, strict=False)
                    )
                    changes = {"media": cards, "media_total": len(event.media)}
                    changes |= event.model_dump(include={"conversation_id", "turn"})
                    if isinstance(event, ChatResponse):
                        seconds, rest = time.monotonic() - began, event.usage.completion_tokens
                        speed = (rest - 1) / seconds if rest > 1 and seconds > 0 else None
                        changes |= {"state": "done", "tokens_per_second": speed}
                        changes |= {"answer": event.answer, "usage": event.usage}
                        changes |= {"finish_reason": event.finish_reason, "unsure": event.unsure}
                    answer.show(**changes)

    async def _show_stopped(self, visitor: Visitor, answer: _Answer) -> None:
        """Show the stopped turn as the server stored it.

        The server stores no turn whose answer lacks a first word: only the page keeps its question.
        """
        view = answer.view
        deadline = time.monotonic() + STORED_S
        while view.conversation_id and time.monotonic() < deadline:
            try:
                call = routes.conversation(view.conversation_id)
                found = await visitor.send(self.desk.api, call)
            except ApiError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                break  # the conversation had no other turn
            last = found.turns[-1] if found.turns else None
            if last is None or (view.turn or last.turn) != last.turn:
                break
            unanswered = last.finish_reason == "unanswered"
            if view.turn is None and not (unanswered and last.message == view.message):
                break  # the stop came before the number of the turn
            if not unanswered:
                stored = view_of(self.desk, visitor, last, found.id)
                answer.show(**dict(stored.model_copy(update={"ask": view.ask})))
                return
            await asyncio.sleep(0.1)  # the server still stores the turn, or deletes it
        answer.show(state="stopped", finish_reason="cancelled", turn=None)


async def _make_room(client: AsyncClient, question: PageQuestion) -> None:
    """Delete the turns in whose place a question is asked."""
    if question.conversation_id is None:
        return
    first = question.replaces
    try:
        if first is None and question.again is not None:
            # The server may have stored the question, but ended before it sent the turn's number.
            turns = (await client.send(routes.conversation(question.conversation_id))).turns
            last = turns[-1] if turns else None
            if last and last.finish_reason == "unanswered" and last.message == question.again:
                first = last.turn
        if first is not None:
            await client.send(routes.delete_turns(question.conversation_id, first))
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:  # then there is room already
            raise

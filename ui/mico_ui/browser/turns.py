"""Turns of a conversation as the page shows them, and the answers that grow in them.

An answer grows until it ends, fails or is stopped. It belongs to this process and not to the
browser's connection: a page that is loaded anew follows it again by its name, and an answer whose
page is closed still comes to its end.
"""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from mico_chat import wire
from mico_chat.wire import ChatResponse, ConversationObject, DeltaEvent, TurnObject, Usage
from mico_ui import describe, routes
from mico_ui.browser.cards import Card, MediaDesk
from mico_ui.browser.markup import html_of
from mico_ui.browser.visitor import Frozen, Visitor
from mico_ui.client import STORED_S, ApiError
from mico_ui.routes import MediumId, Question

logger = logging.getLogger(__name__)

# The settings of a visitor that are options of an answer, too.
OPTIONS = {"temperature", "max_tokens", "top_p", "repetition_penalty", "seed"}

AGAIN_TEMPERATURE = 0.7  # of an answer that is asked for again, where the setting is 0

PATIENCE_S = 20.0  # a page that follows an answer gets the same view again after this time
ENDED_S = 60.0  # the last view of an answer stays for this time


State = Literal["waiting", "answering", "done", "stopped", "error", "unanswered", "gone"]
"""``unanswered``: the server has the question and no answer; ``gone``: nothing is known of it."""

ENDED: tuple[State, ...] = ("done", "stopped", "error", "gone")  # no other state comes later

# The error that a visitor sees where nobody foresaw one; the log alone has the reason.
_FAILED = ApiError("a defect of this page; its log has the details", status=500)


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
    """A question and its answer. ``turn`` is its number, and None where nothing was stored.

    ``parent``, ``versions`` and ``later`` are as in :class:`TurnObject`. ``sampled`` is the
    temperature of an answer that was asked for again. ``version`` counts the views of an answer
    that grows, ``progress`` says what it waits for. ``media`` has the question's cards;
    ``media_total`` counts the media of the whole conversation. ``thoughts`` and
    ``tokens_per_second`` are known if this process has seen the answer grow. ``rival`` and
    ``preferred`` are as in :class:`TurnObject`; ``other`` is the rival while neither is preferred.
    """

    ask: str = ""
    version: int = 0
    state: State
    conversation_id: str | None = None
    turn: int | None = None
    parent: int = 0
    versions: tuple[int, ...] = ()
    later: int = 0
    sampled: float | None = None
    message: str = ""
    progress: str = ""
    media: tuple[Card, ...] = ()
    media_total: int | None = None
    answer: str = ""
    thoughts: str = ""
    html: str = ""
    finish_reason: str = ""
    unsure: bool | None = None
    model: str = ""
    rival: int | None = None
    preferred: int | None = None
    other: "TurnView | None" = None
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
            include={
                *("turn", "parent", "versions", "later", "message"),
                *("answer", "finish_reason", "unsure", "usage", "model", "rival", "preferred"),
            }
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
    """A stored path of a conversation, and the turn that is being answered if it belongs there."""
    turns = conversation.turns
    last = turns[-1] if turns else None
    if last is None or last.state != "unanswered" or last.message != view.message:
        here = view.parent == (0 if last is None else last.turn)
        added = (*turns, view) if here else turns
        return conversation.model_copy(update={"turns": added})
    asked = last.model_dump(include={"turn", "parent", "versions", "later", "model", "rival"})
    asked |= {"media": view.media or last.media, "other": last.other}
    return conversation.model_copy(update={"turns": (*turns[:-1], view.model_copy(update=asked))})


@cache
def words() -> dict[str, Any]:
    """The texts of ``words.yaml``."""
    text = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def problem_of(error: ApiError = _FAILED, visitor: Visitor | None = None) -> Problem:
    code = error.code
    if code == "invalid_api_key" and visitor is not None and not visitor.key:
        code = "missing_api_key"  # the page's own secret was refused: the visitor gave no key
    advice = words()["advice"].get(error.status or "unreachable", words()["advice"]["other"])
    if error.status == HTTPStatus.TOO_MANY_REQUESTS and error.retry_after_s:
        advice = f"Ask again in {error.retry_after_s:g} s."
    away = error.status in (None, HTTPStatus.SERVICE_UNAVAILABLE)
    found = {"message": str(error), "advice": advice, "away": away}
    return Problem(**{**found, **words()["faults"].get(code, {})})


class PageQuestion(Frozen):
    """A question as the page sends it; ``ask`` is the page's name for the question.

    With ``create`` the conversation is new, and the page has made its id. A new one begins with
    ``system``, or else with the visitor's setting. It follows the turn
    ``after``, 0 at the beginning. ``prefix`` is the beginning of an answer that the model
    continues. ``again`` asks for another answer than the one that exists: it is drawn at random.
    ``model`` answers instead of the visitor's, ``beside`` the question of that name.
    """

    ask: str = Field(max_length=64)
    message: str = ""
    media: tuple[MediumId, ...] = ()
    conversation_id: str | None = None
    create: bool = False
    system: str | None = Field(None, max_length=20_000)
    after: int | None = None
    again: bool = False
    prefix: str = ""
    model: str = Field("", max_length=512)
    beside: str = Field("", max_length=64)

    def for_server(self, visitor: Visitor, beside: int | None = None) -> Question:
        options = visitor.model_dump(include=OPTIONS) | {"truncation": "auto"}
        if self.again:
            options |= {"temperature": options["temperature"] or AGAIN_TEMPERATURE}
            options |= {"seed": secrets.randbelow(2**31)}
        begins = self.create or self.conversation_id is None
        system = visitor.system if self.system is None else self.system
        return Question(
            self.message,
            self.media,
            model=self.model or visitor.model or None,
            conversation_id=self.conversation_id,
            create=self.create and beside is None,
            after=self.after if beside is None else None,
            beside=beside,
            system=(system or None) if begins and beside is None else None,
            options={**options, "prefix": self.prefix or None},
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
        model = asked.model or visitor.model
        view = TurnView(state="waiting", parent=asked.after or 0, model=model, **known)
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

    def answering(
        self, visitor: Visitor, conversation_id: str, turn: int | None = None
    ) -> TurnView | None:
        """The answer in a conversation that still grows; with ``turn`` that of this turn."""
        for (owner, _), answer in self._answers.items():
            here = owner == visitor.owner and answer.question.conversation_id == conversation_id
            here = here and turn in (None, answer.view.turn)
            if here and answer.view.state not in ENDED:
                return answer.with_html()
        return None

    async def _turn_beside(self, visitor: Visitor, ask: str) -> int | None:
        """The number of a turn, once it has one; None if it ended without."""
        other = self._answers.get((visitor.owner, ask))
        while other is not None and other.view.turn is None and other.view.state not in ENDED:
            await other.changed.wait()
        return None if other is None else other.view.turn

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
            answer.show(state="error", problem=problem_of(error, visitor))
        except Exception:
            logger.exception("a question failed")
            answer.show(state="error", problem=problem_of())

    async def _grow(self, visitor: Visitor, answer: _Answer) -> None:
        question, text, thoughts, began = answer.question, "", "", time.monotonic()
        beside = await self._turn_beside(visitor, question.beside) if question.beside else None
        async with visitor.client(self.desk.api) as client:
            asked = question.for_server(visitor, beside)
            sampled = asked.options["temperature"] if question.again else None
            async with client.stream(asked) as events:
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
                    cards = self.desk.own_cards(visitor, question.media, event.media)
                    changes = {"media": cards, "sampled": sampled, "media_total": len(event.media)}
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
        beside = bool(answer.question.beside) and view.turn is None  # the other one has a number
        while view.conversation_id and not beside and time.monotonic() < deadline:
            try:
                call = routes.conversation(view.conversation_id, view.turn)
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

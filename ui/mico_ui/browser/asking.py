"""One question to the server: the answer as it grows, until it ends, fails or is stopped.

An answer belongs to this process and not to the browser's connection: a page that is loaded anew
follows it again by its name, and one that is closed lets it end by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict, Field

from mico_chat.media.medium import MediaReport
from mico_ui import calls
from mico_ui.answers import ChatAnswer, ChatEvent, Delta, Reports
from mico_ui.browser.markup import html_of
from mico_ui.browser.media import MediaDesk, Shown
from mico_ui.browser.profile import Profile
from mico_ui.browser.turns import ENDED, FAILED, TurnView, problem_of, view_of
from mico_ui.calls import Question
from mico_ui.client import ApiError, AsyncClient

logger = logging.getLogger(__name__)

PATIENCE_S = 20.0
"""Seconds after which whoever follows an answer hears that nothing is new."""

ENDED_S = 60.0
"""Seconds for which the last view of an answer stays."""

KEPT_S = 5.0
"""Seconds in which the server is expected to have kept what was said until a stop.

And in which it is expected to take another question in that conversation."""


class Asked(BaseModel):
    """A question as the page sends it.

    ``ask`` is the page's own name for it. ``create``: the conversation is a new one, of the page's
    own id. ``replaces`` is the turn of the conversation that is asked again, which goes with all
    after it. ``again`` is the message as it was asked before, where the page does not know whether
    the server has kept it. ``prefix`` is an answer that goes on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    ask: str = Field(max_length=64)
    message: str = ""
    media: tuple[Shown, ...] = ()
    conversation_id: str | None = None
    create: bool = False
    replaces: int | None = None
    again: str | None = None
    prefix: str = ""

    def question(self, profile: Profile) -> Question:
        """As the client takes it."""
        return Question(
            self.message,
            [shown.attachment for shown in self.media],
            conversation_id=self.conversation_id,
            create=self.create,
            system=profile.system or None,
            options={**profile.options, "prefix": self.prefix or None},
        )


@dataclass
class _UnderWay:
    """An answer that is under way, or has just ended: its latest view."""

    asked: Asked
    view: TurnView
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None  # the loop itself holds tasks weakly

    def show(self, view: TurnView) -> None:
        """Give all that follow it the next view."""
        self.view = view.model_copy(update={"version": self.view.version + 1})
        self.changed.set()
        self.changed = asyncio.Event()

    async def after(self, version: int) -> TurnView:
        """The latest view, once there is a later one than this, or as it is after a while."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self.view.version <= version and self.view.state not in ENDED:
                    await self.changed.wait()
        except TimeoutError:
            pass  # a connection that says nothing for long may be cut on its way
        return self.shown()

    def shown(self) -> TurnView:
        """The latest view, with its answer as HTML."""
        if self.view.state != "answering":
            return self.view
        return self.view.model_copy(update={"html": html_of(self.view.answer)})


@dataclass(frozen=True)
class Asking:
    """Asks questions; those under way can be followed and stopped by user and name."""

    api: str
    desk: MediaDesk
    _under_way: dict[tuple[str, str], _UnderWay] = field(default_factory=dict)

    def ask(self, profile: Profile, asked: Asked) -> None:
        """Begin to ask, unless this name is asked already."""
        key = profile.user, asked.ask
        if key in self._under_way:
            return
        view = TurnView(
            ask=asked.ask,
            state="waiting",
            conversation_id=asked.conversation_id,
            message=asked.message,
        )
        one = self._under_way[key] = _UnderWay(asked, view)
        loop = asyncio.get_running_loop()
        one.task = loop.create_task(self._run(profile, one))
        # Whoever follows it hears of its end.
        one.task.add_done_callback(
            lambda _: loop.call_later(ENDED_S, self._under_way.pop, key, None)
        )

    async def follow(self, profile: Profile, ask: str, version: int) -> TurnView:
        """The turn once it has grown beyond a version; errors are part of it.

        Whoever does not follow any more does not stop the answer. ``gone`` is the state of one
        that has ended a while ago, or was never asked here.
        """
        one = self._under_way.get((profile.user, ask))
        if one is None:
            return TurnView(ask=ask, state="gone")
        return await one.after(version)

    def stop(self, profile: Profile, ask: str) -> None:
        """End an answer of this user's; nothing happens if it has ended."""
        if (one := self._under_way.get((profile.user, ask))) is not None:
            one.stop.set()

    def answering(self, profile: Profile, conversation_id: str) -> TurnView | None:
        """The turn of a conversation of this user's that is under way."""
        for (user, _), one in self._under_way.items():
            here = user == profile.user and one.asked.conversation_id == conversation_id
            if here and one.view.state not in ENDED:
                return one.shown()
        return None

    async def _run(self, profile: Profile, one: _UnderWay) -> None:
        """Ask, and show the answer to its end."""
        asked = one.asked
        try:
            async with profile.client(self.api) as client:
                await _make_room(client, asked)
                grow = self._grow(client, profile, asked, one.view, one.stop)
                async with aclosing(grow) as views:
                    async for view in views:
                        one.show(view)
                if one.view.state not in ENDED:
                    one.show(await self._stopped(client, profile, asked, one.view))
        except ApiError as error:
            failed = {"state": "error", "problem": problem_of(error)}
            one.show(one.view.model_copy(update=failed))
        except Exception:
            logger.exception("a question failed")
            failed = {"state": "error", "problem": problem_of(FAILED)}
            one.show(one.view.model_copy(update=failed))

    async def _grow(
        self,
        client: AsyncClient,
        profile: Profile,
        asked: Asked,
        view: TurnView,
        stop: asyncio.Event,
    ) -> AsyncGenerator[TurnView, None]:
        text, began = "", time.monotonic()
        try:
            events = _events(client, asked.question(profile))
            async with aclosing(_until(events, stop)) as heard:
                async for event in heard:
                    match event:
                        case Reports():
                            view = self._with_media(profile, asked, view, event.media)
                            place = {"conversation_id": event.conversation_id, "turn": event.turn}
                            view = view.model_copy(update=place)
                            yield view
                        case Delta():
                            began = began if text else time.monotonic()
                            text += event.text
                            view = view.model_copy(update={"state": "answering", "answer": text})
                            yield view
                        case ChatAnswer():
                            view = self._with_media(profile, asked, view, event.media)
                            yield _ended(view, event, time.monotonic() - began)
                            return
        except ApiError as error:
            # Where the server has said so, it has kept the question.
            shown = {"state": "error", "problem": problem_of(error), "html": html_of(text)}
            yield view.model_copy(update=shown)
            return
        yield view.model_copy(update={"html": html_of(text)})

    def _with_media(
        self, profile: Profile, asked: Asked, view: TurnView, reports: list[MediaReport]
    ) -> TurnView:
        """With the reports of this question's media, which are the last ones."""
        own = reports[len(reports) - len(asked.media) :]
        cards = tuple(
            self.desk.kept(profile, shown.id, report)
            for shown, report in zip(asked.media, own, strict=False)
        )
        return view.model_copy(update={"media": cards, "media_total": len(reports)})

    async def _stopped(
        self, client: AsyncClient, profile: Profile, asked: Asked, view: TurnView
    ) -> TurnView:
        """The turn as the server kept it, once it has.

        It keeps none if nothing had been said: the question is only on the page.
        """
        deadline = time.monotonic() + KEPT_S
        while view.conversation_id and time.monotonic() < deadline:
            try:
                found = await client.send(calls.conversation(view.conversation_id))
            except ApiError as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                break  # one that would have begun with it
            last = found.turns[-1] if found.turns else None
            if last and last.finish_reason != "unanswered" and last.turn == view.turn:
                kept = view_of(self.desk, profile, last, found.id)
                return kept.model_copy(update={"ask": asked.ask})
            if last is None or last.finish_reason != "unanswered":
                break
            await asyncio.sleep(0.1)  # the server still puts it away, or takes it back
        stopped = {"state": "stopped", "finish_reason": "cancelled", "turn": None}
        return view.model_copy(update=stopped)


async def _make_room(client: AsyncClient, asked: Asked) -> None:
    """Take the turns back in whose place a question is asked."""
    if asked.conversation_id is None:
        return
    first = asked.replaces
    try:
        if first is None and asked.again is not None:
            # The server may have kept it, and have ended before it said so.
            turns = (await client.send(calls.conversation(asked.conversation_id))).turns
            last = turns[-1] if turns else None
            if last and last.finish_reason == "unanswered" and last.message == asked.again:
                first = last.turn
        if first is not None:
            await client.send(calls.delete_turns(asked.conversation_id, first))
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:  # there is room already
            raise


def _ended(view: TurnView, answer: ChatAnswer, seconds: float) -> TurnView:
    """The whole turn; its answer took ``seconds`` from the first word on."""
    rest = answer.usage.completion_tokens - 1
    return view.model_copy(
        update={
            "state": "done",
            "conversation_id": answer.conversation_id,
            "turn": answer.turn,
            "answer": answer.answer,
            "html": html_of(answer.answer),
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            "tokens_per_second": rest / seconds if rest > 0 and seconds > 0 else None,
        }
    )


async def _events(client: AsyncClient, question: Question) -> AsyncGenerator[ChatEvent, None]:
    until = time.monotonic() + KEPT_S
    while True:
        try:
            async with client.stream(question) as events:
                async for event in events:
                    yield event
            return
        except ApiError as error:
            # The server still puts away an answer that was stopped.
            if error.status != HTTPStatus.CONFLICT or time.monotonic() > until:
                raise
        await asyncio.sleep(0.1)


async def _until(
    events: AsyncGenerator[ChatEvent, None], stop: asyncio.Event
) -> AsyncGenerator[ChatEvent, None]:
    """Events until ``stop`` is set, at which the one that is waited for is given up."""
    stopped = asyncio.create_task(stop.wait())
    try:
        async with aclosing(events):
            while True:
                step = asyncio.ensure_future(anext(events))
                try:
                    await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not step.done():
                        step.cancel()
                        await asyncio.gather(step, return_exceptions=True)
                if step.cancelled():
                    return
                try:
                    event = step.result()
                except StopAsyncIteration:
                    return
                yield event
    finally:
        stopped.cancel()

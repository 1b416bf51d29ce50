"""One question to the server: the answer as it grows, until it ends, fails or is stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from mico_chat.media.medium import MediaReport
from mico_ui import calls
from mico_ui.answers import ChatAnswer, ChatEvent, Delta, Reports
from mico_ui.browser.markup import html_of
from mico_ui.browser.media import MediaDesk, Shown
from mico_ui.browser.profile import Profile
from mico_ui.browser.turns import TurnView, problem_of, view_of
from mico_ui.calls import Question
from mico_ui.client import ApiError, AsyncClient

UPDATE_S = 0.04
"""Seconds between two updates of the page while an answer grows."""

KEPT_S = 5.0
"""Seconds in which the server is expected to have kept what was said until a stop."""


class Asked(BaseModel):
    """A question as the page sends it.

    ``ask`` is the page's own name for it. ``replaces`` is the turn of the conversation that is
    asked again, which goes with all after it. ``prefix`` is an answer that goes on.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    ask: str = Field(max_length=64)
    message: str = ""
    media: tuple[Shown, ...] = ()
    conversation_id: str | None = None
    replaces: int | None = None
    prefix: str = ""

    def question(self, profile: Profile) -> Question:
        """As the client takes it."""
        return Question(
            self.message,
            [shown.attachment for shown in self.media],
            conversation_id=self.conversation_id,
            system=profile.system or None,
            options={**profile.options, "prefix": self.prefix or None},
        )


@dataclass(frozen=True)
class Asking:
    """Asks questions; those under way can be stopped by user and name."""

    api: str
    desk: MediaDesk
    _stops: dict[tuple[str, str], asyncio.Event] = field(default_factory=dict)

    def stop(self, profile: Profile, ask: str) -> None:
        """End an answer of this user's; nothing happens if it has ended."""
        if (event := self._stops.get((profile.user, ask))) is not None:
            event.set()

    async def ask(self, profile: Profile, asked: Asked) -> AsyncGenerator[TurnView, None]:
        """The turn again and again as it grows; errors are part of it."""
        stop = asyncio.Event()
        self._stops[profile.user, asked.ask] = stop
        view = TurnView(ask=asked.ask, state="waiting", conversation_id=asked.conversation_id)
        try:
            async with profile.client(self.api) as client:
                if asked.replaces is not None and asked.conversation_id is not None:
                    await client.send(calls.delete_turns(asked.conversation_id, asked.replaces))
                yield view
                async with aclosing(self._grow(client, profile, asked, view, stop)) as views:
                    async for view in views:
                        yield view
                if view.state not in ("done", "error"):  # stopped
                    yield await self._stopped(client, profile, asked, view)
        except ApiError as error:
            yield view.model_copy(update={"state": "error", "problem": problem_of(error)})
        finally:
            del self._stops[profile.user, asked.ask]

    async def _grow(
        self,
        client: AsyncClient,
        profile: Profile,
        asked: Asked,
        view: TurnView,
        stop: asyncio.Event,
    ) -> AsyncGenerator[TurnView, None]:
        text, last, began = "", 0.0, time.monotonic()
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
                            if time.monotonic() - last >= UPDATE_S:
                                last = time.monotonic()
                                yield view.model_copy(update={"html": html_of(text)})
                        case ChatAnswer():
                            view = self._with_media(profile, asked, view, event.media)
                            yield _ended(view, event, time.monotonic() - began)
                            return
        except ApiError as error:
            shown = {"state": "error", "problem": problem_of(error), "html": html_of(text)}
            yield _not_kept(view, asked).model_copy(update=shown)
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
        """The turn as the server kept it, once it has; without one if nothing had been said."""
        deadline = time.monotonic() + KEPT_S
        while view.answer and view.conversation_id and time.monotonic() < deadline:
            try:
                found = await client.send(calls.conversation(view.conversation_id))
            except ApiError as error:
                if error.status != 404:  # a new one is there when its first turn is kept
                    raise
            else:
                if found.turns and found.turns[-1].turn == view.turn:
                    kept = view_of(self.desk, profile, found.turns[-1], found.id)
                    return kept.model_copy(update={"ask": asked.ask})
            await asyncio.sleep(0.1)
        stopped = {"state": "stopped", "finish_reason": "cancelled"}
        return _not_kept(view, asked).model_copy(update=stopped)


def _not_kept(view: TurnView, asked: Asked) -> TurnView:
    """A turn that is only on the page, in the conversation that it was asked in."""
    return view.model_copy(update={"turn": None, "conversation_id": asked.conversation_id})


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
    async with client.stream(question) as events:
        async for event in events:
            yield event


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

"""One conversation with the server: what is attached, asked, set and kept. It prints nothing."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from mico_ui import calls
from mico_ui.answers import ChatAnswer, ChatEvent, Conversation, Delta, Estimate, StoredMedium
from mico_ui.calls import MediumId, Question, Upload
from mico_ui.client import ApiError, Client
from mico_ui.terminal.settings import applied, setting

_PATIENCE_S = 3.0
"""Seconds given to a server to put away an answer that was stopped."""


@dataclass
class _Asked:
    """A question without a whole answer: refused, failed or stopped, ``said`` after some words.

    ``known`` are the conversations there were before one that began a conversation of its own.
    ``settled``: the server has had the time to put away what was said.
    """

    text: str
    media: list[StoredMedium]
    known: set[str]
    said: bool = False
    settled: bool = False


class Talk:
    """A conversation. Media that are attached belong to the next question.

    ``id`` is the server's, None before the first answer.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.id: str | None = None
        self.system: str | None = None
        self.settings: dict[str, Any] = {}
        self.attached: list[StoredMedium] = []
        self._n_turns = 0
        self._asked: _Asked | None = None

    def set(self, name: str, text: str) -> None:
        """Set an option; an empty text takes it back to the server's default.

        Raises:
            ApiError: if there is none of this name, or the server does not take this value.
        """
        settings = {key: value for key, value in self.settings.items() if key != name}
        value = setting(name, text)
        if text:
            settings[name] = value
            self.client.send(calls.estimate(applied(settings, Question("?"))))  # is it taken?
        self.settings = settings

    def attach(self, medium: Upload) -> StoredMedium:
        """Send a medium to the server, for the next question.

        Raises:
            ApiError: if it cannot be read or decoded.
        """
        scale = self.settings.get("depth_scale")
        stored = self.client.send(calls.upload(medium, depth_scale=scale))
        self.attached.append(stored)
        return stored

    def detach(self, number: int | None = None) -> list[StoredMedium]:
        """Take the ``number``-th attached medium (from 1) back, or all of them.

        Raises:
            ApiError: if there is none of this number.
        """
        n = len(self.attached)
        if number is not None and not 1 <= number <= n:
            raise ApiError(f"no medium {number}; {n} attached")
        chosen = self.attached[:] if number is None else [self.attached[number - 1]]
        self.attached = [m for m in self.attached if m not in chosen]
        for medium in chosen:
            # One that a conversation shows stays; the server forgets the others in time anyway.
            with suppress(ApiError):
                self.client.send(calls.delete_medium(medium.id))
        return chosen

    def ask(self, text: str) -> Generator[ChatEvent, None, None]:
        """The events of the answer. Closing the iterator stops the server.

        Raises:
            ApiError: if the question is refused or its answer fails; media that were attached for
                it are so again, unless something was said.
        """
        self._settle()
        if self._asked is not None and self.id is not None:
            # What was stopped before is a turn as any other from now on.
            self._n_turns = len(self.client.send(calls.conversation(self.id)).turns)
        media, self.attached = self.attached, []
        yield from self._answer(text, media)

    def retry(self) -> Generator[ChatEvent, None, None]:
        """Ask the last question again, with what is set now, in place of the last time.

        Raises:
            ApiError: as :meth:`ask`, and if there is none.
        """
        self._settle()
        turns = [] if self.id is None else self.client.send(calls.conversation(self.id)).turns
        if (asked := self._asked) is not None:
            text, media = asked.text, asked.media
            # What is kept of it: a part that was said, or the question alone, which a server that
            # was killed leaves; not what others have added.
            turns = [
                turn
                for turn in turns[-1:]
                if turn.message == text and (asked.said or turn.finish_reason == "unanswered")
            ]
        elif turns:
            text = turns[-1].message
            media = [self.client.send(calls.medium(medium.id)) for medium in turns[-1].media]
        else:
            raise ApiError("no question has been asked yet")
        if self.id is not None and turns:
            self.client.send(calls.delete_turns(self.id, turns[-1].turn))
            self._n_turns = turns[-1].turn - 1
        self.attached = [medium for medium in self.attached if medium not in media]
        yield from self._answer(text, media)

    def estimate(self, text: str) -> Estimate:
        """What the next question would cost."""
        self._settle()
        return self.client.send(calls.estimate(self._question(text, self.attached)))

    def new(self) -> None:
        """Begin another conversation; what is set and attached stays."""
        self.id = self._asked = None
        self._n_turns = 0

    def open(self, id_: str) -> Conversation:
        """Go on with a kept conversation.

        Raises:
            ApiError: if there is none.
        """
        found = self.client.send(calls.conversation(id_))
        self.new()
        self.id, self.system, self._n_turns = found.id, found.system, len(found.turns)
        return found

    def conversation(self) -> Conversation:
        """The conversation as the server has it.

        Raises:
            ApiError: if nothing of it is kept yet.
        """
        self._settle()
        if self.id is None:
            raise ApiError("nothing has been said yet")
        return self.client.send(calls.conversation(self.id))

    def _question(self, text: str, media: list[StoredMedium]) -> Question:
        shown = [MediumId(medium.kind, medium.id) for medium in media]
        return applied(self.settings, Question(text, shown, self.id, self.system))

    def _answer(self, text: str, media: list[StoredMedium]) -> Generator[ChatEvent, None, None]:
        question = self._question(text, media)
        known = set()
        if self.id is None:
            known = {summary.id for summary in self.client.send(calls.conversations()).data}
        # The server may still have to put away what it had said until it was stopped.
        patience_s = 0.0 if self._asked is None else _PATIENCE_S
        self._asked = asked = _Asked(text, media, known)
        try:
            for event in self._events(question, patience_s):
                if isinstance(event, ChatAnswer):
                    self.id, self._n_turns = event.conversation_id, event.turn or 0
                    self._asked = None
                asked.said = asked.said or (isinstance(event, Delta) and bool(event.text))
                yield event
        finally:
            if not asked.said and self._asked is asked:
                self.attached = [*media, *self.attached]

    def _events(self, question: Question, patience_s: float) -> Generator[ChatEvent, None, None]:
        until = time.monotonic() + patience_s
        while True:
            try:
                with self.client.stream(question) as events:
                    yield from events
                return
            except ApiError as error:
                if error.status != HTTPStatus.CONFLICT or time.monotonic() > until:
                    raise
            time.sleep(0.1)

    def _settle(self) -> None:
        """Wait until the server has put away an answer that was stopped, and find it.

        The id of a conversation that began with it comes with the answer's end, which nobody has
        waited for.
        """
        asked = self._asked
        if asked is None or not asked.said or asked.settled:
            return
        until = time.monotonic() + _PATIENCE_S
        while not self._is_kept(asked) and time.monotonic() < until:
            time.sleep(0.1)
        asked.settled = True

    def _is_kept(self, asked: _Asked) -> bool:
        if self.id is not None:
            turns = self.client.send(calls.conversation(self.id)).turns
            return len(turns) > self._n_turns and turns[-1].finish_reason != "unanswered"
        for summary in self.client.send(calls.conversations()).data:
            if summary.id not in asked.known and self._began_with(summary.id, asked.text):
                self.id = summary.id
                return True
        return False

    def _began_with(self, id_: str, text: str) -> bool:
        turns = self.client.send(calls.conversation(id_)).turns
        return (
            len(turns) == 1 and turns[0].message == text and turns[0].finish_reason != "unanswered"
        )

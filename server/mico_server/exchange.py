"""One turn of a stored conversation: what was said before, the question, and keeping the answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import TracebackType

from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, with_depth_scale
from mico_chat.wire import TurnEnd, Usage
from mico_server.conversations import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    asked_in,
    new_conversation_id,
)
from mico_server.database import uninterrupted
from mico_server.disconnect import CLIENT_LEFT
from mico_server.errors import NotFoundError
from mico_server.media_store import NewMedium
from mico_server.model_host import Question
from mico_server.service import Service
from mico_server.tables import is_id
from mico_server.texts import check_text
from mico_server.uploads import ChatForm, MediumId

logger = logging.getLogger(__name__)


class Exchange:
    """A question of a tenant's, with the conversation it stands in.

    ``conversation_id`` and ``turn`` (from 1) are those that an answer will be kept as; None if
    nothing is to be stored.
    """

    def __init__(
        self,
        service: Service,
        tenant: str,
        form: ChatForm,
        earlier: Conversation | None,
        media: Sequence[MediaFile],
    ) -> None:
        self._service = service
        self._tenant = tenant
        self._form = form
        self._earlier = earlier
        self._media = media
        self._stored: NewTurn | None = None
        self.model = service.host.assistant.name
        self.conversation_id: str | None = None
        self.turn: int | None = None
        if form.fields.store:
            self.conversation_id = form.fields.conversation_id or new_conversation_id()
            self.turn = 1 if earlier is None else len(earlier.turns) + 1
        said = [] if earlier is None else service.conversations.messages(earlier)
        if form.fields.system is not None:
            said = [m for m in said if m.role != "system"]
            said.insert(0, Message.system(form.fields.system))
        self._said = said
        self.question = self._question(media)

    @classmethod
    async def begin(
        cls, service: Service, tenant: str, form: ChatForm, stack: AsyncExitStack
    ) -> Exchange:
        """The exchange that a form asks for. Its conversation is its own until ``stack`` closes.

        Raises:
            RequestError: for fields that contradict each other.
            NotFoundError: for a conversation or medium that there is not.
            ConflictError: while another question of the conversation is being answered.
        """
        # Now, and not when the turn is to be stored.
        check_text(form.message, "message")
        check_text(form.fields.system or "", "system")
        wanted = form.fields.conversation_id
        earlier = None
        if wanted is not None:
            if not form.fields.store:
                raise RequestError.at("store", "false, but conversation_id names a stored one")
            await stack.enter_async_context(service.conversations.answering(tenant, wanted))
            try:
                earlier = await service.conversations.load(tenant, wanted)
            except NotFoundError:
                if not (form.fields.create and is_id("conv", wanted)):
                    raise
        elif form.fields.create:
            raise RequestError.at("create", "true, but conversation_id does not say which")
        media = [
            await service.stored_part(tenant, medium.id, medium.kind)
            if isinstance(medium, MediumId)
            else medium
            for medium in form.media
        ]
        return cls(service, tenant, form, earlier, media)

    async def store(self, stack: AsyncExitStack) -> None:
        """Store the question; when this returns, it outlives the process.

        If ``stack`` closes without an answer, the question is taken back: whoever asked hears of
        an error, or has left before the first word. When the service ends, it stays unanswered.

        Raises:
            NotFoundError, ConflictError: when the conversation has changed meanwhile.
        """
        if self.conversation_id is None or self.turn is None:
            return
        if self._form.fields.conversation_id is None:  # a new one, which others see from now on
            await stack.enter_async_context(
                self._service.conversations.answering(self._tenant, self.conversation_id)
            )
        stack.push_async_exit(self._leave)
        await self._store(self.conversation_id, self.turn)

    @uninterrupted  # a client that leaves meanwhile leaves a whole turn, which is then taken back
    async def _store(self, conversation_id: str, number: int) -> None:
        store = self._service.media
        parts: list[StoredText | StoredMedium] = []
        new: list[NewMedium] = []
        media: list[MediaFile] = []
        for given, part in zip(self._form.media, self._media, strict=True):
            if isinstance(given, MediumId):
                id_ = given.id
            else:
                assert part.path is not None  # where the form's upload was written
                new.append(await store.prepare(part.kind, part.path, part.name))
                id_ = new[-1].id
                # Storing it moves the file.
                part = replace(part, source=store.place_of(self._tenant, new[-1].sha256))
            parts.append(StoredMedium(type=part.kind, media_id=id_))
            media.append(part)
        if self._form.message or not parts:
            parts.append(StoredText(text=self._form.message))
        turn = NewTurn(parts, "", "unanswered", self.model, new_media=new)
        await self._service.conversations.add_turn(
            self._tenant,
            None if self._earlier is None else self._earlier.id,
            turn,
            system=self._form.fields.system,
            number=number,
            new_id=conversation_id,
        )
        self._stored = turn
        self.question = self._question(media)

    async def keep(self, answer: Answer) -> None:
        """Add the answer to the question; when this returns, it outlives the process.

        Raises:
            NotFoundError, ConflictError: when the question was taken back meanwhile.
        """
        first = answer.choices[0]
        await self._keep(first.text, first.finish_reason, answer.usage, answer.media)

    async def keep_part(self, gathered: GatheredAnswer) -> None:
        """Add what was said until it was cancelled, if it can be.

        Whoever asked has gone, or has been told of an error already.
        """
        try:
            await self._keep(gathered.texts[0], "cancelled", None, gathered.reports)
        except MicoError as error:
            logger.warning("a cancelled answer is not kept: %s", error)

    async def _keep(
        self, text: str, end: TurnEnd, usage: Usage | None, reports: Sequence[MediaReport]
    ) -> None:
        if self._stored is None or self.conversation_id is None or self.turn is None:
            return
        turn = replace(
            self._stored,
            answer=text,
            finish_reason=end,
            usage=usage,
            # The last reports are those of the media that this message brings.
            reports=reports[len(reports) - len(self._media) :],
        )
        self._stored = None  # if this fails, the question stays as it is
        await self._service.conversations.answer_turn(
            self._tenant, self.conversation_id, self.turn, turn, system=self._form.fields.system
        )

    async def _leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stored is None or self.conversation_id is None or self.turn is None:
            return
        if isinstance(error, asyncio.CancelledError) and CLIENT_LEFT not in error.args:
            return  # the service ends, which whoever asked could not know
        try:
            await self._service.conversations.take_back(
                self._tenant, self.conversation_id, self.turn, self._stored
            )
        except MicoError as failure:
            logger.warning("a question that has no answer is not taken back: %s", failure)

    def _question(self, media: Sequence[MediaFile]) -> Question:
        texts = [self._form.message] if self._form.message or not media else []
        asked = asked_in(self._said, Message.user(*media, *texts))
        fields = self._form.fields
        asked = with_depth_scale(asked, fields.depth_scale)
        return Question(asked, self._form.options, self._tenant)

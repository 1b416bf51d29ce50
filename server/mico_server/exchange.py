"""One turn of a stored conversation: what was said before, the question, and keeping the answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.engine import Usage
from mico_chat.errors import MicoError, RequestError
from mico_chat.media.medium import MediaReport
from mico_chat.messages import MediaPart, Message
from mico_server.conversations import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    TurnEnd,
    new_conversation_id,
)
from mico_server.database import uninterrupted
from mico_server.errors import ConflictError
from mico_server.media_store import NewMedium
from mico_server.model_host import Question
from mico_server.service import Service
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
        media: Sequence[MediaPart],
    ) -> None:
        self._service = service
        self._tenant = tenant
        self._form = form
        self._earlier = earlier
        self.model = service.host.assistant.name
        self.conversation_id: str | None = None
        self.turn: int | None = None
        if form.fields.store:
            self.conversation_id = new_conversation_id() if earlier is None else earlier.id
            self.turn = 1 if earlier is None else len(earlier.turns) + 1
        said = [] if earlier is None else service.conversations.messages(earlier)
        if form.fields.system is not None:
            said = [m for m in said if m.role != "system"]
            said.insert(0, Message.system(form.fields.system))
        texts = [form.message] if form.message or not media else []
        self.question = Question(
            [*said, Message.user(*media, *texts)], form.options, tenant, form.fields.depth_scale
        )

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
        # Now, and not when the answer is there and the turn is to be stored.
        check_text(form.message, "message")
        check_text(form.fields.system or "", "system")
        wanted = form.fields.conversation_id
        earlier = None
        if wanted is not None:
            if not form.fields.store:
                raise RequestError.at("store", "false, but conversation_id names a stored one")
            stack.enter_context(_alone(service.answering, tenant, wanted))
            earlier = await service.conversations.load(tenant, wanted)
        media = [
            await service.stored_part(tenant, medium.id, medium.kind)
            if isinstance(medium, MediumId)
            else medium
            for medium in form.media
        ]
        return cls(service, tenant, form, earlier, media)

    async def keep(self, answer: Answer) -> None:
        """Store the turn; when this returns, it outlives the process.

        Raises:
            ConflictError: when another replica has answered in this conversation meanwhile.
        """
        first = answer.choices[0]
        await self._keep(first.text, first.finish_reason, answer.usage, answer.media)

    async def keep_part(self, gathered: GatheredAnswer) -> None:
        """Store the turn with what was said until it was cancelled, if it can be.

        Whoever asked has gone, or has been told of an error already.
        """
        try:
            await self._keep(gathered.texts[0], "cancelled", None, gathered.reports)
        except MicoError as error:
            logger.warning("a cancelled answer is not kept: %s", error)

    @uninterrupted  # a client that leaves while its turn is stored leaves a whole one
    async def _keep(
        self, text: str, end: TurnEnd, usage: Usage | None, reports: Sequence[MediaReport]
    ) -> None:
        if not self._form.fields.store:
            return
        parts: list[StoredText | StoredMedium] = []
        new: list[NewMedium] = []
        # The last reports are those of the media that this message brings.
        own = reports[len(reports) - len(self._form.media) :]
        for medium, report in zip(self._form.media, own, strict=True):
            if not isinstance(medium, MediumId):
                new.append(await self._new(medium, report))
            id_ = medium.id if isinstance(medium, MediumId) else new[-1].id
            parts.append(StoredMedium(type=medium.kind, media_id=id_))
        if self._form.message or not parts:
            parts.append(StoredText(text=self._form.message))
        turn = NewTurn(parts, text, end, self.model, usage, own, new)
        await self._service.conversations.add_turn(
            self._tenant,
            None if self._earlier is None else self._earlier.id,
            turn,
            system=self._form.fields.system,
            number=self.turn,
            new_id=self.conversation_id,
        )

    async def _new(self, medium: MediaPart, report: MediaReport) -> NewMedium:
        path = medium.source
        assert isinstance(path, Path)  # where the form's upload was written
        return await self._service.media.prepare(medium.kind, path, medium.name, report=report)


@contextmanager
def _alone(answering: set[tuple[str, str]], tenant: str, conversation_id: str) -> Iterator[None]:
    if (tenant, conversation_id) in answering:
        raise ConflictError(
            f"conversation {conversation_id}: another question is being answered; wait for it"
        )
    answering.add((tenant, conversation_id))
    try:
        yield
    finally:
        answering.discard((tenant, conversation_id))

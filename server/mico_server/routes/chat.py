"""POST /v1/chat: a message with any media, in a conversation that the service keeps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request

from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.engine.base import Delta
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, with_depth_scale, without_depth
from mico_chat.wire import ChatResponse, DeltaEvent, MediaEvent
from mico_server.errors import NotFoundError
from mico_server.fetch.media_reader import check_number
from mico_server.host import ModelHost, Question
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.chat_request import (
    ChatForm,
    FormMedium,
    chat_body,
    read_chat,
    stream_response,
)
from mico_server.service import (
    CLIENT_LEFT,
    CurrentCaller,
    CurrentService,
    EventStream,
    Service,
    event,
    while_connected,
)
from mico_server.store.blobs import WorkFolder
from mico_server.store.conversations import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    with_question,
)
from mico_server.store.database import uninterrupted
from mico_server.store.media import NewMedium
from mico_server.store.tables import is_id, new_id

logger = logging.getLogger(__name__)

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat",
    response_model=ChatResponse,
    responses={
        200: stream_response(
            "The answer; with `stream`, events `media`, `delta` (one for each piece of text), then "
            "`done` with the object that the answer is otherwise, or `error`.",
            "ChatEvent",
        ),
        **error_responses(400, 404, 409, 410, 413, 422, 504),
    },
    openapi_extra=chat_body(),
)
async def chat(
    request: Request, service: CurrentService, caller: CurrentCaller
) -> ChatResponse | EventStream:
    """Answer a message about any mix of media.

    Without `conversation_id` a conversation begins; with it, earlier messages and their media are
    part of the question and need not be sent again. A medium's field may also have the text
    `media:ID`, for a medium that was uploaded to /v1/media. A JSON object with the same fields is
    accepted as well, its media as `media:ID` or as data URIs.

    The message is stored before it is answered (`finish_reason` unanswered). It is taken back if
    it is refused, or if the client leaves before the first word.
    """
    service.models.check(caller.tenant)  # before anybody uploads a body that will be refused
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(service.media.work_folder())
        form = await read_chat(request, service, caller.tenant, folder)
        turn = await ChatTurn.begin(service, caller.tenant, form, stack)
        async with AsyncExitStack() as admission:
            host = await service.use(request, admission, turn.model)
            host.assistant.check_length(turn.question.messages, form.options.prefix)
            if form.fields.estimate_depth:
                await while_connected(request.receive, turn.estimate_depth(host, folder))
            await stack.enter_async_context(turn.stored())
            # The stack ends the admission first, then takes the question back.
            await stack.enter_async_context(admission.pop_all())
        if not form.fields.stream:
            answer = await while_connected(request.receive, host.answer(turn.question))
            return await turn.keep(answer)
        return await EventStream.started(
            _events(host, turn, form, stack.pop_all()),
            request.receive,
            send_timeout_s=service.settings.body_timeout_s,
            error_name="error",
        )


async def _events(
    host: ModelHost, turn: ChatTurn, form: ChatForm, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """The events of the answer. If the client leaves, the text so far is stored."""
    gathered = GatheredAnswer(form.options.n)
    began = False
    async with stack:
        try:
            async with aclosing(host.stream(turn.question)) as items:
                async for item in items:
                    gathered.add(item)
                    if not isinstance(item, Delta):
                        continue
                    if not began:
                        began = True
                        media = MediaEvent(
                            conversation_id=turn.conversation_id,
                            turn=turn.number,
                            media=gathered.reports,
                        )
                        yield event(media.model_dump_json(), "media")
                    if item.text or item.logprobs:
                        delta = DeltaEvent(index=item.index, text=item.text, logprobs=item.logprobs)
                        unset = set() if item.logprobs else {"logprobs"}
                        yield event(delta.model_dump_json(exclude=unset), "delta")
            answer = gathered.answer()
        except BaseException:
            if gathered.texts[0]:
                await turn.keep_part(gathered)
            raise
        yield event((await turn.keep(answer)).model_dump_json(), "done")


@dataclass
class ChatTurn:
    """A tenant's question in a conversation; it stores the question and its answer.

    ``conversation_id`` and ``number`` (from 1) are None if nothing is to be stored.
    """

    _service: Service
    _tenant: str
    _form: ChatForm
    _earlier: Conversation | None
    _waiting: tuple[str, int, NewTurn] | None = None  # a stored turn without an answer
    conversation_id: str | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        fields, earlier = self._form.fields, self._earlier
        self.model = self._service.models.named(fields.model or self._kept_model()).name
        if fields.store:
            self.conversation_id = fields.conversation_id or new_id("conv")
            self.number = 1 if earlier is None else len(earlier.turns) + 1
        before = [] if earlier is None else self._service.conversations.messages(earlier)
        if fields.system is not None:
            before = [m for m in before if m.role != "system"]
            before.insert(0, Message.system(fields.system))
        self._before = before
        self.question = self._question([medium.file for medium in self._form.media])

    @classmethod
    async def begin(
        cls, service: Service, tenant: str, form: ChatForm, stack: AsyncExitStack
    ) -> ChatTurn:
        """The turn of a form; nobody else can ask in its conversation until ``stack`` closes."""
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
        return cls(service, tenant, form, earlier)

    def _kept_model(self) -> str | None:
        """The conversation's model, if it is still served."""
        names = [host.name for host in self._service.models.hosts]
        kept = None if self._earlier is None else self._earlier.model
        return kept if kept in names else None

    def _question(self, media: Sequence[MediaFile]) -> Question:
        texts = [self._form.fields.message] if self._form.fields.message or not media else []
        messages = with_question(self._before, Message.user(*media, *texts))
        messages = with_depth_scale(messages, self._form.fields.depth_scale)
        return Question(messages, self._form.options, self._tenant)

    async def estimate_depth(self, host: ModelHost, folder: WorkFolder) -> None:
        """Show an estimated depth map behind each picture of the message that has none."""
        host.check_estimates()
        media = list(self._form.media)
        places = without_depth([medium.file for medium in media])
        check_number(len(media) + len(places), "estimate_depth", self._service.settings)
        for place in reversed(places):
            depth = await host.depth_of(media[place].file, self._tenant)
            path = folder.file(f"depth-{place}")
            await asyncio.to_thread(path.write_bytes, depth.read())
            media.insert(place + 1, FormMedium(replace(depth, source=path)))
        self._form = replace(self._form, media=tuple(media))
        self.question = self._question([medium.file for medium in media])

    @asynccontextmanager
    async def stored(self) -> AsyncIterator[None]:
        """Store the question. Inside the block it outlives the process.

        If the block ends without an answer, the question is taken back, except if the service ends.
        """
        if self.conversation_id is None or self.number is None:
            yield
            return
        store = self._service.conversations
        async with AsyncExitStack() as held:
            if self._form.fields.conversation_id is None:  # a new one, which others see from now on
                await held.enter_async_context(store.answering(self._tenant, self.conversation_id))
            try:
                await self._store(self.conversation_id, self.number)
                yield
            except asyncio.CancelledError as error:
                if CLIENT_LEFT not in error.args:
                    self._waiting = None  # the service ends, and the client still waits
                raise
            finally:
                if self._waiting is not None:
                    try:
                        await store.take_back(self._tenant, *self._waiting)
                    except MicoError as error:
                        logger.warning("a question without an answer is not taken back: %s", error)

    @uninterrupted  # if the client leaves meanwhile, the whole turn is stored, then taken back
    async def _store(self, conversation_id: str, number: int) -> None:
        store = self._service.media
        parts: list[StoredText | StoredMedium] = []
        new: list[NewMedium] = []
        media: list[MediaFile] = []
        for medium in self._form.media:
            file, id_ = medium.file, medium.id
            if id_ is None:
                assert file.path is not None  # in the work folder
                new.append(await store.prepare(file.kind, file.path, file.name))
                id_ = new[-1].id
                # Storing it moves the file.
                file = replace(file, source=store.path_of(self._tenant, new[-1].sha256))
            parts.append(StoredMedium(type=file.kind, media_id=id_))
            media.append(file)
        if self._form.fields.message or not parts:
            parts.append(StoredText(text=self._form.fields.message))
        turn = NewTurn(parts, self.model, new_media=new)
        await self._service.conversations.add_turn(
            self._tenant,
            conversation_id,
            number,
            turn,
            create=self._earlier is None,
            system=self._form.fields.system,
        )
        self._waiting = (conversation_id, number, turn)
        self.question = self._question(media)

    async def keep(self, answer: Answer) -> ChatResponse:
        """Add the answer to the question; when this returns, it outlives the process."""
        first = answer.choices[0]
        await self._keep(
            answer.media,
            answer=first.text,
            finish_reason=first.finish_reason,
            usage=answer.usage,
            confidence=first.confidence,
            unsure=first.unsure,
        )
        return ChatResponse(
            answer=first.text,
            finish_reason=first.finish_reason,
            model=self.model,
            conversation_id=self.conversation_id,
            turn=self.number,
            usage=answer.usage,
            media=answer.media,
            choices=answer.choices if len(answer.choices) > 1 else (),
            logprobs=first.logprobs,
            confidence=first.confidence,
            unsure=first.unsure,
            explanation=answer.explanation,
        )

    async def keep_part(self, gathered: GatheredAnswer) -> None:
        """Add the text of a cancelled answer, if possible: nobody is left to get an error."""
        try:
            await self._keep(gathered.reports, answer=gathered.texts[0], finish_reason="cancelled")
        except MicoError as error:
            logger.warning("a cancelled answer is not kept: %s", error)

    async def _keep(self, reports: Sequence[MediaReport], **said: Any) -> None:
        """Store the fields ``said`` of the turn; ``reports`` has all media of the conversation."""
        if self._waiting is None:
            return
        id_, number, turn = self._waiting
        self._waiting = None  # if storing fails, the question stays as it is
        own = reports[len(reports) - len(self._form.media) :]  # the last ones are this message's
        turn = replace(turn, reports=own, **said)
        await self._service.conversations.answer_turn(
            self._tenant, id_, number, turn, system=self._form.fields.system
        )

"""POST /v1/chat: a message with any media, in a conversation that the service keeps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass, replace
from types import TracebackType

from fastapi import APIRouter, Request, Response

from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.engine import Delta
from mico_chat.errors import MicoError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, with_depth_scale
from mico_chat.wire import ChatResponse, DeltaEvent, MediaEvent, TurnEnd, Usage
from mico_server.errors import NotFoundError
from mico_server.http.errors import error_responses, mico_error_body
from mico_server.http.event_stream import CLIENT_LEFT, EventStream, event, while_connected
from mico_server.routes.chat_request import (
    ChatForm,
    MediumId,
    chat_body,
    read_chat,
    stream_response,
)
from mico_server.service import CurrentCaller, CurrentService, Question, Service
from mico_server.store.conversations import (
    Conversation,
    NewTurn,
    StoredMedium,
    StoredText,
    new_conversation_id,
    with_question,
)
from mico_server.store.database import uninterrupted
from mico_server.store.media import NewMedium
from mico_server.store.tables import check_text, is_id

logger = logging.getLogger(__name__)

router = APIRouter()


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
async def chat(request: Request, service: CurrentService, caller: CurrentCaller) -> Response:
    """Answer a message about any mix of media.

    Without `conversation_id` a conversation begins; with it, earlier messages and their media are
    part of the question and need not be sent again. A medium's field may also have the text
    `media:ID`, for a medium that was uploaded to /v1/media. A JSON object with the same fields is
    accepted as well, its media as `media:ID` or as data URIs.

    The message is stored before it is answered (`finish_reason` unanswered). It is taken back if
    it is refused, or if the client leaves before the first word.
    """
    service.host.check()  # before anybody uploads a body that will be refused
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(service.media.work_folder())
        form = await read_chat(request, service.settings, folder)
        turn = await ChatTurn.begin(service, caller.tenant, form, stack)
        with ExitStack() as admission:
            admission.enter_context(service.host.admitted())
            await turn.store(stack)
            # Ends before the question is taken back.
            stack.enter_context(admission.pop_all())
        if not form.fields.stream:
            answer = await while_connected(request.receive, _answer(service, turn))
            response = _response(answer, turn)
            return Response(response.model_dump_json(), media_type="application/json")
        events = _events(service, turn, form, stack.pop_all())
        return await EventStream.started(
            events, request.receive, send_timeout_s=service.settings.body_timeout_s
        )


async def _answer(service: Service, turn: ChatTurn) -> Answer:
    answer = await service.host.answer(turn.question)
    await turn.keep(answer)
    return answer


async def _events(
    service: Service, turn: ChatTurn, form: ChatForm, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """The answer as events; the text until the client left is stored."""
    gathered = GatheredAnswer(form.options.n)
    began = ended = False
    async with stack:
        try:
            async with aclosing(service.host.stream(turn.question)) as items:
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
            ended = True
            await turn.keep(answer)
            yield event(_response(answer, turn).model_dump_json(), "done")
        except MicoError as error:
            if not began:
                raise
            yield event(mico_error_body(error), "error")
        finally:
            if not ended and gathered.texts[0]:
                await turn.keep_part(gathered)


def _response(answer: Answer, turn: ChatTurn) -> ChatResponse:
    first = answer.choices[0]
    return ChatResponse(
        answer=first.text,
        finish_reason=first.finish_reason,
        model=turn.model,
        conversation_id=turn.conversation_id,
        turn=turn.number,
        usage=answer.usage,
        media=answer.media,
        choices=answer.choices if len(answer.choices) > 1 else (),
        logprobs=first.logprobs,
    )


@dataclass
class ChatTurn:
    """A tenant's question in a conversation; it stores the question and its answer.

    ``conversation_id`` and ``number`` (from 1) are None if nothing is to be stored.
    """

    _service: Service
    _tenant: str
    _form: ChatForm
    _earlier: Conversation | None
    _media: Sequence[MediaFile]
    _stored: NewTurn | None = None
    conversation_id: str | None = None
    number: int | None = None

    def __post_init__(self) -> None:
        fields, earlier = self._form.fields, self._earlier
        self.model = self._service.host.assistant.name
        if fields.store:
            self.conversation_id = fields.conversation_id or new_conversation_id()
            self.number = 1 if earlier is None else len(earlier.turns) + 1
        before = [] if earlier is None else self._service.conversations.messages(earlier)
        if fields.system is not None:
            before = [m for m in before if m.role != "system"]
            before.insert(0, Message.system(fields.system))
        self._before = before
        self.question = self._question(self._media)

    @classmethod
    async def begin(
        cls, service: Service, tenant: str, form: ChatForm, stack: AsyncExitStack
    ) -> ChatTurn:
        """The turn of a form; nobody else can ask in its conversation until ``stack`` closes."""
        # Now, and not when the turn is stored.
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

    def _question(self, media: Sequence[MediaFile]) -> Question:
        texts = [self._form.message] if self._form.message or not media else []
        messages = with_question(self._before, Message.user(*media, *texts))
        messages = with_depth_scale(messages, self._form.fields.depth_scale)
        return Question(messages, self._form.options, self._tenant)

    async def store(self, stack: AsyncExitStack) -> None:
        """Store the question; when this returns, it outlives the process.

        If ``stack`` closes without an answer, the question is taken back, but not if the service
        ends.
        """
        if self.conversation_id is None or self.number is None:
            return
        if self._form.fields.conversation_id is None:  # a new one, which others see from now on
            await stack.enter_async_context(
                self._service.conversations.answering(self._tenant, self.conversation_id)
            )
        stack.push_async_exit(self._leave)
        await self._store(self.conversation_id, self.number)

    @uninterrupted  # if the client leaves meanwhile, the whole turn is stored, then taken back
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
                part = replace(part, source=store.path_of(self._tenant, new[-1].sha256))
            parts.append(StoredMedium(type=part.kind, media_id=id_))
            media.append(part)
        if self._form.message or not parts:
            parts.append(StoredText(text=self._form.message))
        turn = NewTurn(parts, self.model, new_media=new)
        await self._service.conversations.add_turn(
            self._tenant,
            conversation_id,
            number,
            turn,
            create=self._earlier is None,
            system=self._form.fields.system,
        )
        self._stored = turn
        self.question = self._question(media)

    async def keep(self, answer: Answer) -> None:
        """Add the answer to the question; when this returns, it outlives the process."""
        first = answer.choices[0]
        await self._keep(first.text, first.finish_reason, answer.usage, answer.media)

    async def keep_part(self, gathered: GatheredAnswer) -> None:
        """Add the text of a cancelled answer, if possible: nobody is left to get an error."""
        try:
            await self._keep(gathered.texts[0], "cancelled", None, gathered.reports)
        except MicoError as error:
            logger.warning("a cancelled answer is not kept: %s", error)

    async def _keep(
        self, text: str, end: TurnEnd, usage: Usage | None, reports: Sequence[MediaReport]
    ) -> None:
        if self._stored is None or self.conversation_id is None or self.number is None:
            return
        turn = replace(
            self._stored,
            answer=text,
            finish_reason=end,
            usage=usage,
            # The last reports are those of this message's own media.
            reports=reports[len(reports) - len(self._media) :],
        )
        self._stored = None  # if storing fails, the question stays as it is
        await self._service.conversations.answer_turn(
            self._tenant, self.conversation_id, self.number, turn, system=self._form.fields.system
        )

    async def _leave(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stored is None or self.conversation_id is None or self.number is None:
            return
        if isinstance(error, asyncio.CancelledError) and CLIENT_LEFT not in error.args:
            return  # the service ends, and the client still waits for its answer
        try:
            await self._service.conversations.take_back(
                self._tenant, self.conversation_id, self.number, self._stored
            )
        except MicoError as failure:
            logger.warning("a question that has no answer is not taken back: %s", failure)

"""POST /v1/chat: a message with any media, in a conversation that the service keeps."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, aclosing

from fastapi import APIRouter, Request, Response

from mico_chat.assistant import Answer, GatheredAnswer
from mico_chat.engine import Delta
from mico_chat.errors import MicoError
from mico_chat.wire import ChatResponse, DeltaEvent, ErrorBody, MediaEvent
from mico_server.description import event_stream, reference, schema_of
from mico_server.disconnect import while_connected
from mico_server.errors import error_responses, mico_error_body
from mico_server.event_stream import EventStream, event
from mico_server.exchange import Exchange
from mico_server.service import CurrentCaller, CurrentService, Service
from mico_server.uploads import ChatForm, chat_body, read_chat
from mico_server.work_folder import WorkFolder

router = APIRouter()


_STREAM = event_stream(
    "The answer; with `stream`, events `media`, `delta` (one for each piece of text), then `done` "
    "with the object that the answer is otherwise, or `error`.",
    media=schema_of(MediaEvent, "serialization"),
    delta=schema_of(DeltaEvent, "serialization"),
    done=reference(ChatResponse),
    error=reference(ErrorBody),
)


@router.post(
    "/v1/chat",
    response_model=ChatResponse,
    responses={200: _STREAM, **error_responses(400, 404, 409, 410, 413, 422, 504)},
    openapi_extra=chat_body(),
)
async def chat(request: Request, service: CurrentService, caller: CurrentCaller) -> Response:
    """Answer a message about any mix of media.

    Without `conversation_id` a conversation begins; with it, earlier messages and their media are
    part of the question and need not be sent again. A medium's field may also have the text
    `media:ID`, for a medium that was uploaded to /v1/media. A JSON object with the same fields does
    as well, its media as `media:ID` or as data URIs.

    The message is stored before it is answered (`finish_reason` unanswered). It is taken back if
    it is refused, or if the client leaves before the first word.
    """
    service.host.check()  # nobody needs to upload what will be refused
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(WorkFolder(service.media))
        form = await read_chat(request, service.settings, folder)
        exchange = await Exchange.begin(service, caller.tenant, form, stack)
        with ExitStack() as place:
            place.enter_context(service.host.admitted())
            await exchange.store(stack)
            stack.enter_context(place.pop_all())  # free before the question is taken back
        if not form.fields.stream:
            answer = await while_connected(request.receive, _answer(service, exchange))
            response = _response(answer, exchange)
            return Response(response.model_dump_json(), media_type="application/json")
        events = _events(service, exchange, form, stack.pop_all())
        return await EventStream.started(
            events, request.receive, send_timeout_s=service.settings.body_timeout_s
        )


async def _answer(service: Service, exchange: Exchange) -> Answer:
    answer = await service.host.answer(exchange.question)
    await exchange.keep(answer)
    return answer


async def _events(
    service: Service, exchange: Exchange, form: ChatForm, stack: AsyncExitStack
) -> AsyncGenerator[bytes, None]:
    """The answer as events; what was said until the client left is kept."""
    gathered = GatheredAnswer(form.options.n)
    began = ended = False
    async with stack:
        try:
            async with aclosing(service.host.stream(exchange.question)) as items:
                async for item in items:
                    gathered.add(item)
                    if not isinstance(item, Delta):
                        continue
                    if not began:
                        began = True
                        media = MediaEvent(
                            conversation_id=exchange.conversation_id,
                            turn=exchange.turn,
                            media=gathered.reports,
                        )
                        yield event(media.model_dump_json(), "media")
                    if item.text or item.logprobs:
                        delta = DeltaEvent(index=item.index, text=item.text, logprobs=item.logprobs)
                        unset = set() if item.logprobs else {"logprobs"}
                        yield event(delta.model_dump_json(exclude=unset), "delta")
            answer = gathered.answer()
            ended = True
            await exchange.keep(answer)
            yield event(_response(answer, exchange).model_dump_json(), "done")
        except MicoError as error:
            if not began:
                raise
            yield event(mico_error_body(error), "error")
        finally:
            if not ended and gathered.texts[0]:
                await exchange.keep_part(gathered)


def _response(answer: Answer, exchange: Exchange) -> ChatResponse:
    """An answer as the API shows it."""
    first = answer.choices[0]
    return ChatResponse(
        answer=first.text,
        finish_reason=first.finish_reason,
        model=exchange.model,
        conversation_id=exchange.conversation_id,
        turn=exchange.turn,
        usage=answer.usage,
        media=answer.media,
        choices=answer.choices if len(answer.choices) > 1 else (),
        logprobs=first.logprobs,
    )

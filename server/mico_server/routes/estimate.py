"""POST /v1/estimate: what a request would cost, before it is sent."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request

from mico_chat.wire import Estimate
from mico_server.description import schema_of
from mico_server.disconnect import while_connected
from mico_server.errors import error_responses
from mico_server.exchange import Exchange
from mico_server.model_host import Question
from mico_server.openai_media import MediaReader
from mico_server.routes.completions import ChatCompletionRequest
from mico_server.service import CurrentCaller, CurrentService, Service
from mico_server.uploads import chat_body, is_json, json_object, read_chat, validated
from mico_server.work_folder import WorkFolder

router = APIRouter()


@router.post(
    "/v1/estimate",
    responses=error_responses(400, 404, 409, 410, 413, 422),
    openapi_extra=chat_body(schema_of(ChatCompletionRequest)),
)
async def estimate(request: Request, service: CurrentService, caller: CurrentCaller) -> Estimate:
    """Tokens that a request would take, and whether it fits the model's context.

    Takes a request of /v1/chat or of /v1/chat/completions and decodes its media, but neither
    encodes nor answers.
    """
    service.host.check()
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(WorkFolder(service.media))
        body = await json_object(request) if is_json(request) else None
        if body is not None and "message" not in body:
            question = await _of_completion(body, service, caller.tenant, folder)
        else:
            form = await read_chat(request, service.settings, folder, body)
            question = (await Exchange.begin(service, caller.tenant, form, stack)).question
        return await while_connected(request.receive, service.host.estimate(question))


async def _of_completion(
    given: dict[str, Any], service: Service, tenant: str, folder: WorkFolder
) -> Question:
    body = validated(ChatCompletionRequest, given)
    body.check(service.host.assistant.name)
    messages = await MediaReader(service, tenant, folder, body.depth_scale).messages(body.messages)
    return Question(messages, body.options(), tenant)

"""POST /v1/estimate: what a request would cost, before it is sent."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import APIRouter, Request
from pydantic import ValidationError

from mico_chat.assistant import Estimate
from mico_chat.engine.base import request_error
from mico_server.disconnect import while_connected
from mico_server.errors import error_responses
from mico_server.exchange import Exchange
from mico_server.model_host import Question
from mico_server.openai_media import MediaReader
from mico_server.routes.completions import ChatCompletionRequest
from mico_server.service import CurrentCaller, CurrentService, Service
from mico_server.uploads import form_body, form_schema, open_form, read_chat_form
from mico_server.work_folder import WorkFolder

router = APIRouter()


def _body() -> dict[str, object]:
    body = form_body(form_schema())
    schema = ChatCompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # /v1/chat/completions has brought them
    body["requestBody"]["content"]["application/json"] = {"schema": schema}
    return body


@router.post(
    "/v1/estimate",
    responses=error_responses(400, 404, 409, 410, 413, 422),
    openapi_extra=_body(),
)
async def estimate(request: Request, service: CurrentService, caller: CurrentCaller) -> Estimate:
    """Tokens that a request would take, and whether it fits the model's context.

    Takes what /v1/chat (a form) or /v1/chat/completions (JSON) takes, and decodes its media, but
    neither encodes nor answers.
    """
    service.host.check()
    async with AsyncExitStack() as stack:
        if request.headers.get("content-type", "").startswith("application/json"):
            question = await _of_json(request, service, caller.tenant, stack)
        else:
            fields = await stack.enter_async_context(open_form(request, service.settings))
            folder = await stack.enter_async_context(WorkFolder(service.media))
            form = await read_chat_form(fields, folder)
            question = (await Exchange.begin(service, caller.tenant, form, stack)).question
        return await while_connected(request.receive, service.host.estimate(question))


async def _of_json(
    request: Request, service: Service, tenant: str, stack: AsyncExitStack
) -> Question:
    try:
        body = ChatCompletionRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise request_error(error.errors()[0]) from error
    body.check(service.host.assistant.name)
    folder = await stack.enter_async_context(WorkFolder(service.media))
    messages = await MediaReader(service, tenant, folder).messages(body.messages)
    options = body.options(service.settings.default_max_tokens)
    return Question(messages, options, tenant, body.depth_scale)

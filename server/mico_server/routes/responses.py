"""POST /v1/responses: OpenAI's newer format of a question. Nothing of it is stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from itertools import count
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.fields import check_object, check_one_of, check_text, string_at
from mico_chat.messages import Message
from mico_server.fetch.media_reader import MediaReader, with_depth
from mico_server.host import ModelHost, Question
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.chat_request import (
    SCHEMAS,
    DepthScale,
    EstimateDepth,
    Metadata,
    Objects,
    Texts,
    stream_response,
)
from mico_server.routes.response_objects import ResponseBuilder, ResponseObject
from mico_server.routes.tool_use import ToolUse, tool_use
from mico_server.service import (
    CurrentCaller,
    CurrentService,
    EventStream,
    Service,
    event,
    while_connected,
)
from mico_server.store.blobs import WorkFolder

router = APIRouter(route_class=JsonRoute)


class TextFormat(BaseModel):
    """Text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseRequest(BaseModel):
    """OpenAI's request, with ``depth_scale``, ``estimate_depth`` and the sampling options that vLLM
    adds.

    Nothing is stored: send the items of the conversation again with each request. Fields without a
    meaning here (``store``, ``metadata``, ``reasoning``, ``include``, ...) are ignored.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    input: str | Objects = Field(json_schema_extra=SCHEMAS["ResponseInput"])
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    text: TextOptions | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = False
    depth_scale: DepthScale = 0.001
    estimate_depth: EstimateDepth = False
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    include: Texts | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        stored = "this service stores no responses; send the items of the conversation in input"
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise RequestError.at(name, stored)
        if self.background:
            raise RequestError.at("background", "not here; send a batch to /v1/batches")
        if self.truncation == "auto":
            raise RequestError.at("truncation", "nothing is cut here; send a shorter conversation")
        if self.top_logprobs:
            raise RequestError.at("top_logprobs", "not here; /v1/chat/completions has them")

    def options(self) -> GenerationOptions:
        same = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
        values = self.model_dump(include=same, exclude_none=True)
        if self.max_output_tokens is not None:
            values["max_tokens"] = self.max_output_tokens
        wanted = None if self.text is None else self.text.format
        if wanted is not None and wanted.type == "json_object":
            values["json_schema"] = {"type": "object"}
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.schema_ is None:
                raise RequestError.at("text.format.schema", "the field is missing")
            values["json_schema"] = wanted.schema_
        return GenerationOptions.of(values)


@router.post(
    "/v1/responses",
    response_model=ResponseObject,
    responses={
        200: stream_response("The response; with `stream`, events of it.", "ResponseEvent"),
        **error_responses(400, 404, 410, 413, 422, 504),
    },
)
async def responses(
    request: Request, body: ResponseRequest, service: CurrentService, caller: CurrentCaller
) -> ResponseObject | EventStream:
    """Answer a conversation in the format of OpenAI's Responses API. Nothing of it is stored."""
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(service.media.work_folder())
        reading = read_input(body, service, caller.tenant, folder)
        messages = await while_connected(request.receive, reading)
        host = await service.use(request, stack, body.model)
        asking = to_question(body, messages, host, service, caller.tenant)
        question, use = await while_connected(request.receive, asking)
        if body.stream:
            return await EventStream.started(
                _events(host, question, use, body, stack.pop_all()),
                request.receive,
                send_timeout_s=service.settings.body_timeout_s,
                error_name="error",
            )
        return await while_connected(request.receive, respond(body, host, question, use))


async def read_input(
    body: ResponseRequest, service: Service, tenant: str, folder: WorkFolder
) -> list[Message]:
    """The conversation of a request, its media read, if the request can be answered."""
    service.models.check(tenant)
    service.models.named(body.model)
    body.check()
    items = [body.input] if isinstance(body.input, str) else body.input
    chat = [_message(item, f"input[{number}]") for number, item in enumerate(items)]
    reader = MediaReader(service, tenant, folder, body.depth_scale)
    messages = _joined(await reader.messages(chat, "input"))
    if body.instructions is not None:
        check_text(body.instructions, "instructions")
        messages = [Message.system(body.instructions), *messages]
    return messages


async def to_question(
    body: ResponseRequest,
    messages: Sequence[Message],
    host: ModelHost,
    service: Service,
    tenant: str,
) -> tuple[Question, ToolUse]:
    """The question to a loaded model, and the request's use of tools."""
    use = tool_use(
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        host.assistant,
        service.settings,
        flat=True,
    )
    options = use.options(body.options(), "text.format")
    if body.estimate_depth:
        messages = await with_depth(host, messages, tenant, service.settings)
    return Question(use.told(messages), options, tenant), use


async def respond(
    body: ResponseRequest, host: ModelHost, question: Question, use: ToolUse
) -> ResponseObject:
    """The whole response to an admitted question."""
    with use.explained():
        answer = await host.answer(question)
    builder = _builder(body, use)
    builder.response.media = answer.media
    (choice,) = answer.choices
    for events in builder.add(choice.text, choice.finish_reason), builder.ended(answer.usage):
        list(events)
    return builder.response


def _builder(body: ResponseRequest, use: ToolUse) -> ResponseBuilder:
    wanted = None if body.text is None else body.text.format
    shown = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True)
    return ResponseBuilder(
        use.reader(),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        temperature=body.temperature,
        text={"format": {name: value for name, value in shown.items() if value is not None}},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=body.tools or [],
        top_p=body.top_p,
    )


async def _events(
    host: ModelHost,
    question: Question,
    use: ToolUse,
    body: ResponseRequest,
    stack: AsyncExitStack,
) -> AsyncGenerator[bytes, None]:
    builder = _builder(body, use)
    numbers = count()

    def sent(told: tuple[str, Mapping[str, Any]]) -> bytes:
        name, fields = told
        return event({"type": name, "sequence_number": next(numbers), **fields}, name)

    begun = False
    async with stack, aclosing(host.stream(question)) as items:
        with use.explained():
            async for item in items:
                if not isinstance(item, Delta):
                    builder.response.media = item
                    continue
                if not begun:  # an error before the first token has its own status
                    begun = True
                    for told in builder.begun():
                        yield sent(told)
                for told in builder.add(item.text, item.finish_reason):
                    yield sent(told)
                if item.usage is not None:
                    for told in builder.ended(item.usage):
                        yield sent(told)


# --- Items ---

_PARTS = {"input_text": "text", "output_text": "text", "text": "text"}


def _message(item: Any, where: str) -> dict[str, Any]:
    """An item of the input as one message of the chat format."""
    if isinstance(item, str):
        return {"role": "user", "content": item}
    check_object(item, where)
    kind = item.get("type", "message")
    check_one_of(kind, ("message", "function_call", "function_call_output"), f"{where}.type")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": string_at(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        id_ = string_at(item, "call_id", where)
        content = _content(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": id_, "content": content}
    return {"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")}


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for number, part in enumerate(content):
        check_object(part, f"{where}[{number}]")
        kind = part.get("type")
        if kind in _PARTS:
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "input_image":
            if part.get("image_url") is None:
                reason = "send the picture as image_url: files of /v1/files are for batches"
                raise RequestError.at(f"{where}[{number}]", reason)
            parts.append({"type": "image_url", "image_url": part["image_url"]})
        else:
            parts.append(part)  # input_audio, audio_url, video_url, depth_url, normal_url
    return parts


def _joined(messages: list[Message]) -> list[Message]:
    """Calls that follow each other, or what the assistant says before, are one message."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is not None and last.role == message.role == "assistant" and message.tool_calls:
            calls = (*last.tool_calls, *message.tool_calls)
            joined[-1] = replace(last, tool_calls=calls)
        else:
            joined.append(message)
    return joined

"""POST /v1/chat/completions: OpenAI's chat format, with every kind of media as content parts; and
POST /v1/estimate, the cost of a request of either format."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.messages import Message
from mico_chat.wire import Estimate
from mico_server.fetch.media_reader import MediaReader, with_depth
from mico_server.host import ModelHost, Question
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.chat import ChatTurn
from mico_server.routes.chat_request import (
    SCHEMAS,
    DepthScale,
    EstimateDepth,
    Metadata,
    Objects,
    Texts,
    chat_body,
    is_json,
    json_object,
    read_chat,
    schema_of,
    stream_response,
    validated,
)
from mico_server.routes.completion_objects import (
    ChatCompletion,
    CompletionUsage,
    completion,
    logprobs_of,
    reason_of,
)
from mico_server.routes.tool_use import AnswerReader, ToolUse, tool_use
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


class StreamOptions(BaseModel):
    """``include_usage`` asks for one more chunk at the end, which has the usage and no choices."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    """A named schema, which answers always follow strictly."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(BaseModel):
    """OpenAI's request, with the sampling options that vLLM adds, ``depth_scale``,
    ``estimate_depth``, and ``explain``: which media the answer rests on.

    ``defaults`` of /v1/models has the options that a request does not set. Fields without a
    meaning here (``user``, ``metadata``, ``store``, ``media_io_kwargs``, ...) are ignored.
    ``tools`` are for models whose chat template shows them; the mini's does not.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    messages: Objects = Field(min_length=1, json_schema_extra=SCHEMAS["ChatMessages"])
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Texts | None = None
    n: int | None = Field(None, ge=1, le=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    depth_scale: DepthScale = 0.001
    estimate_depth: EstimateDepth = False
    explain: bool = False
    user: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Texts | None = None
    parallel_tool_calls: bool | None = None
    media_io_kwargs: dict[str, Any] | None = None
    logit_bias: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None

    def check(self) -> None:
        if self.logit_bias:
            raise RequestError.at("logit_bias", "not supported; leave it out")
        if self.modalities not in (None, [], ["text"]):
            raise RequestError.at("modalities", "the model answers with text alone")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError.at("top_logprobs", "needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise RequestError.at("stream_options", "needs stream: true")

    def options(self) -> GenerationOptions:
        same = {"temperature", "top_p", "top_k", "min_p", "n", "explain"}
        same |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
        values = self.model_dump(include=same, exclude_none=True)
        if (most := self.max_completion_tokens or self.max_tokens) is not None:
            values["max_tokens"] = most
        if self.top_k == -1:  # vLLM's value for all tokens
            values["top_k"] = 0
        if self.seed is not None:
            values["seed"] = self.seed % 2**63
        if self.stop:
            values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_object":
            values["json_schema"] = {"type": "object"}
        elif wanted is not None and wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise RequestError.at("response_format.json_schema", "the field is missing")
            values["json_schema"] = wanted.json_schema.schema_
        return GenerationOptions.of(values)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: stream_response(
            "The answer; with `stream`, events with chunks of it, the last one `[DONE]`.",
            "CompletionEvent",
        ),
        **error_responses(400, 404, 410, 413, 422, 504),
    },
)
async def chat_completions(
    request: Request, body: ChatCompletionRequest, service: CurrentService, caller: CurrentCaller
) -> ChatCompletion | EventStream:
    """Answer a conversation in OpenAI's format. Nothing of it is stored."""
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(service.media.work_folder())
        reading = read_messages(body, service, caller.tenant, folder)
        messages = await while_connected(request.receive, reading)
        host = await service.use(request, stack, body.model)
        asking = to_question(body, messages, host, service, caller.tenant)
        question, use = await while_connected(request.receive, asking)
        fingerprint = host.assistant.fingerprint
        if body.stream:
            return await EventStream.started(
                _chunks(host, question, use, body, stack.pop_all()),
                request.receive,
                send_timeout_s=service.settings.body_timeout_s,
            )
        with use.explained():
            answer = await while_connected(request.receive, host.answer(question))
    return completion(body.model, fingerprint, answer, use)


async def read_messages(
    body: ChatCompletionRequest, service: Service, tenant: str, folder: WorkFolder
) -> list[Message]:
    """The messages of a request, their media read, if the request can be answered."""
    service.models.check(tenant)
    service.models.named(body.model)
    body.check()
    reader = MediaReader(service, tenant, folder, body.depth_scale)
    return await reader.messages(body.messages)


async def to_question(
    body: ChatCompletionRequest,
    messages: Sequence[Message],
    host: ModelHost,
    service: Service,
    tenant: str,
) -> tuple[Question, ToolUse]:
    """The question to a loaded model, and the request's use of tools."""
    use = tool_use(
        body.tools, body.tool_choice, body.parallel_tool_calls, host.assistant, service.settings
    )
    options = use.options(body.options(), "response_format")
    if body.estimate_depth:
        messages = await with_depth(host, messages, tenant, service.settings)
    return Question(use.told(messages), options, tenant), use


async def _chunks(
    host: ModelHost,
    question: Question,
    use: ToolUse,
    body: ChatCompletionRequest,
    stack: AsyncExitStack,
) -> AsyncGenerator[bytes, None]:
    """The answer as OpenAI's chunks. The first chunk of each choice has its role; the very first
    one has the reports of the media. The last chunk of each choice has its confidence."""
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": host.assistant.fingerprint,
        **({"usage": None} if wants_usage else {}),
    }

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [choice]}

    readers: dict[int, AnswerReader] = {}
    reports: list[dict[str, Any]] = []
    async with stack, aclosing(host.stream(question)) as items:
        with use.explained():
            async for item in items:
                if not isinstance(item, Delta):
                    reports = [report.model_dump(mode="json") for report in item]
                    continue
                index = item.index
                if index not in readers:
                    begun = {"role": "assistant", "content": None if use.tools else ""}
                    first = chunk(index, begun)
                    yield event(first if readers else {**first, "media": reports})
                    readers[index] = use.reader()
                reader = readers[index]
                deltas = [
                    {"content": piece}
                    if isinstance(piece, str)
                    else {"tool_calls": [reader.delta(piece)]}
                    for piece in reader.feed(item.text, last=item.finish_reason is not None)
                ]
                logprobs = logprobs_of(item.logprobs)
                dumped = None if logprobs is None else logprobs.model_dump()
                if dumped is not None and not deltas:
                    deltas = [{"content": ""}]
                for delta in deltas:
                    yield event(chunk(index, delta, logprobs=dumped))
                    dumped = None
                if item.finish_reason is not None:
                    rated = {"confidence": item.confidence, "unsure": item.unsure}
                    reason = reason_of(item.finish_reason, reader)
                    last = chunk(index, {}, finish_reason=reason, **rated)
                    if item.explanation is not None:
                        last["explanation"] = item.explanation.model_dump(mode="json")
                    yield event(last)
                if item.usage is not None and wants_usage:
                    usage = CompletionUsage.of(item.usage).model_dump()
                    yield event({**head, "choices": [], "usage": usage})
        yield event("[DONE]")


@router.post(
    "/v1/estimate",
    responses=error_responses(400, 404, 409, 410, 413, 422, 504),
    openapi_extra=chat_body(schema_of(ChatCompletionRequest)),
)
async def estimate(request: Request, service: CurrentService, caller: CurrentCaller) -> Estimate:
    """Tokens that a request would take, and whether it fits the model's context.

    Takes a request of /v1/chat or of /v1/chat/completions and decodes its media, but neither
    encodes nor answers.
    """
    service.models.check(caller.tenant)
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(service.media.work_folder())
        given = await json_object(request) if is_json(request) else None
        if given is not None and "message" not in given:
            body = validated(ChatCompletionRequest, given)
            messages = await read_messages(body, service, caller.tenant, folder)
            host = await service.use(request, stack, body.model)
            asking = to_question(body, messages, host, service, caller.tenant)
            question, _ = await while_connected(request.receive, asking)
        else:
            form = await read_chat(request, service, caller.tenant, folder, given)
            turn = await ChatTurn.begin(service, caller.tenant, form, stack)
            host = await service.use(request, stack, turn.model)
            if form.fields.estimate_depth:
                await while_connected(request.receive, turn.estimate_depth(host, folder))
            question = turn.question
        return await while_connected(request.receive, host.estimate(question))

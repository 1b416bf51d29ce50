"""POST /v1/messages: Anthropic's format of a question, and count_tokens, what it would cost.

Media of every kind are content parts as in /v1/chat/completions, beside Anthropic's own ``image``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Literal

from pydantic import BaseModel, Field

from mico_chat.assistant import Answer, AnswerChoice
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.fields import check_object, check_one_of, object_at, string_at, type_of
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message, Part
from mico_chat.options import options_of, with_options
from mico_chat.tools import ToolCall
from mico_chat.wire import Usage
from mico_server.answering import Dialect, RequestBody, Written, WrittenEvent, estimate
from mico_server.dialects.openai import OpenAIQuestion, json_schema_of
from mico_server.fetch.media_reader import MediaReader
from mico_server.http.errors import error_responses
from mico_server.routes.bodies import Objects, Texts
from mico_server.service import CurrentClient

# --- Requests ---


class OutputConfig(BaseModel):
    """``format`` is a JSON schema that the answer follows strictly."""

    effort: str | None = None
    format: dict[str, Any] | None = None


@with_options("messages")
class MessagesRequest(RequestBody):
    """Anthropic's request, with ``depth_scale``, ``estimate_depth`` and the sampling options that
    vLLM adds.

    Nothing is stored: send the messages of the conversation again with each request. If the last
    message is the assistant's, the answer continues it. Fields without a meaning here
    (``metadata``, ``service_tier``, ``cache_control``, ...) are ignored. ``tools`` are for models
    whose chat template shows them; the mini's does not.
    """

    messages: Objects = Field(
        min_length=1,
        description="content is text or a list of blocks: text, image, document, tool_use, "
        "tool_result, and the parts of media of chat completions",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    system: str | Objects | None = None
    stop_sequences: Texts | None = None
    tools: Objects | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None

    def options(self) -> dict[str, Any]:
        values = options_of(self, "messages")
        if self.thinking is not None:
            kind = self.thinking.get("type")
            check_one_of(kind, ("enabled", "disabled", "adaptive"), "thinking.type")
            values |= {} if kind == "adaptive" else {"thinking": kind == "enabled"}
        form = None if self.output_config is None else self.output_config.format
        if form is not None:
            check_one_of(form.get("type"), ("json_schema",), "output_config.format.type")
            schema, where = form.get("schema"), "output_config.format.schema"
            values["json_schema"] = json_schema_of("json_schema", schema, where)
        return values


async def read(body: MessagesRequest, reader: MediaReader) -> MessagesQuestion:
    chat = [
        one
        for number, message in enumerate(body.messages)
        for one in _chat_messages(message, f"messages[{number}]")
    ]
    if body.system is not None:
        chat.insert(0, {"role": "system", "content": _content(body.system, "system")})
    last = chat[-1]
    prefix = ""
    if last["role"] == "assistant" and not last.get("tool_calls"):
        begun = await reader.messages(chat[-1:])
        prefix = begun[0].text
        if begun[0].media:
            reason = "the answer continues this message, which may have no media"
            raise RequestError.at(f"messages[{len(body.messages) - 1}]", reason)
        del chat[-1]
    messages = _joined(await reader.messages(chat))
    return MessagesQuestion(body, messages, {**body.options(), "prefix": prefix}, reader)


def _chat_messages(message: Any, where: str) -> Iterator[dict[str, Any]]:
    """A message as one or more of the chat format: each result of a tool is one there."""
    check_object(message, where)
    role = message.get("role")
    check_one_of(role, ("user", "assistant", "system"), f"{where}.role")
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        reason = f"expected text or a list of blocks, got {type_of(content)}"
        raise RequestError.at(f"{where}.content", reason)
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts = ""
    for number, block in enumerate(blocks):
        inner = f"{where}.content[{number}]"
        check_object(block, inner)
        if role == "assistant" and block.get("type") == "tool_use":
            given = string_at(block, "id", inner), string_at(block, "name", inner)
            function = {"name": given[1], "arguments": json.dumps(object_at(block, "input", inner))}
            calls.append({"id": given[0], "type": "function", "function": function})
        elif role == "assistant" and block.get("type") == "thinking":
            thoughts += string_at(block, "thinking", inner)
        elif role == "user" and block.get("type") == "tool_result":
            id_ = string_at(block, "tool_use_id", inner)
            said = _content(block.get("content", ""), f"{inner}.content")
            yield {"role": "tool", "tool_call_id": id_, "content": said}
        else:
            parts += _parts(block, inner)
    if parts or calls or not blocks:
        found: dict[str, Any] = {"role": role, "content": parts}
        found |= {"reasoning_content": thoughts} if thoughts else {}
        yield {**found, "tool_calls": calls} if calls else found


def _content(content: Any, where: str) -> Any:
    """Text as it is; a list of blocks as the parts of a chat message."""
    if not isinstance(content, list):
        return content
    return [p for n, block in enumerate(content) for p in _parts(block, f"{where}[{n}]")]


def _parts(block: Any, where: str) -> list[dict[str, Any]]:
    """A block as parts of a chat message: none for thoughts that only their writer can read."""
    check_object(block, where)
    kind = block.get("type")
    if kind == "text":
        return [{"type": "text", "text": block.get("text")}]
    if kind == "redacted_thinking":
        return []
    if kind not in ("image", "document"):
        return [block]  # image_url, input_audio, audio_url, video_url, ...
    source = object_at(block, "source", where)
    given = source.get("type")
    check_one_of(given, ("base64", "url", "text"), f"{where}.source.type")
    if given == "text" and kind == "document":
        return [{"type": "text", "text": source.get("data")}]
    if given == "url":
        url = string_at(source, "url", f"{where}.source")
    else:
        media_type = string_at(source, "media_type", f"{where}.source")
        url = f"data:{media_type};base64,{string_at(source, 'data', f'{where}.source')}"
    return [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}]


def _joined(messages: list[Message]) -> list[Message]:
    """Messages of one speaker that follow each other are one, as Anthropic joins them."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is not None and last.role == message.role and message.role != "tool":
            content: tuple[Part, ...] = (*last.content, *message.content)
            calls = (*last.tool_calls, *message.tool_calls)
            thoughts = last.reasoning_content or message.reasoning_content
            joined[-1] = replace(
                last, content=content, tool_calls=calls, reasoning_content=thoughts
            )
        else:
            joined.append(message)
    return joined


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool in the form of OpenAI's responses."""
    check_one_of(tool.get("type") or "custom", ("custom",), f"{where}.type")
    schema = object_at(tool, "input_schema", where)
    found: dict[str, Any] = {"type": "function", "parameters": schema}
    return found | {name: tool[name] for name in ("name", "description") if name in tool}


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

# --- Answers ---

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str


class ThinkingBlock(BaseModel):
    """What the model thought before it answered. Nothing is signed here."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class ToolUseBlock(BaseModel):
    """``input`` is empty if ``max_tokens`` cut the call before its arguments were JSON."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


class TokensOfOutput(BaseModel):
    thinking_tokens: int


class MessagesUsage(BaseModel):
    """An earlier request had computed the ``cache_read_input_tokens``, which ``input_tokens`` does
    not count; ``media_tokens`` are the context tokens among all of them."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: TokensOfOutput
    media_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> MessagesUsage:
        return cls(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            output_tokens_details=TokensOfOutput(thinking_tokens=usage.reasoning_tokens),
            media_tokens=usage.media_tokens,
        )


class MessagesAnswer(BaseModel):
    """Anthropic's message, and ``media``: a report of each medium in the order of the request."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage
    media: tuple[MediaReport, ...] = ()


class TokenCount(BaseModel):
    """The tokens of a request; its media were decoded, and nothing was encoded."""

    input_tokens: int


_NOTHING = Usage(prompt_tokens=0, completion_tokens=0, media_tokens=0)


class MessagesQuestion(OpenAIQuestion):
    """``_block`` counts the blocks that a stream has begun; ``_open`` is the type of the last."""

    schema_field, flat = "output_config.format", True
    error_event = "error"

    def __init__(
        self,
        body: MessagesRequest,
        messages: Sequence[Message],
        options: dict[str, Any],
        reader: MediaReader,
    ) -> None:
        super().__init__(body, messages, options, reader)
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._block, self._open = -1, ""
        self._given = self.ask.options.prefix

    def tools_of(self, body: MessagesRequest) -> tuple[list[Any] | None, Any, bool]:
        tools = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools or ())]
        choice = body.tool_choice or {"type": "auto"}
        check_one_of(choice.get("type"), (*_CHOICES, "tool"), "tool_choice.type")
        parallel = choice.get("disable_parallel_tool_use") is not True
        if choice["type"] == "tool":
            return tools, {"type": "function", "name": choice.get("name")}, parallel
        return tools, _CHOICES[choice["type"]], parallel

    def begin(self, media: tuple[MediaReport, ...]) -> Written:
        usage = MessagesUsage.of(_NOTHING)
        begun = MessagesAnswer(id=self._id, model=self.model, usage=usage, media=media)
        yield self._event("message_start", message=begun.model_dump(mode="json"))

    def write(self, delta: Delta) -> Iterator[WrittenEvent]:
        # The first delta has the beginning that the request gave, which Anthropic does not repeat.
        text, self._given = delta.text.removeprefix(self._given), ""
        if delta.reasoning_content:
            if self._open != "thinking":
                yield from self._start(ThinkingBlock(thinking=""))
            yield self._piece({"type": "thinking_delta", "thinking": delta.reasoning_content})
        if text:
            if self._open != "text":
                yield from self._start(TextBlock(text=""))
            yield self._piece({"type": "text_delta", "text": text})
        if (call := delta.call) is not None:
            if call.name is not None:
                yield from self._start(ToolUseBlock(id=call.id, name=call.name, input={}))
            yield self._piece({"type": "input_json_delta", "partial_json": call.arguments})

    def end(self, answer: Answer) -> Written:
        yield from self._stop()
        (choice,) = answer.choices
        ended = {"stop_reason": _reason(choice), "stop_sequence": choice.stop_text}
        usage = MessagesUsage.of(answer.usage).model_dump()
        yield self._event("message_delta", delta=ended, usage=usage)
        yield self._event("message_stop")

    def whole(self, answer: Answer) -> MessagesAnswer:
        (choice,) = answer.choices
        given = self.ask.options.prefix
        pieces = list(choice.pieces)
        if given and isinstance(pieces[0], str):
            pieces[0] = pieces[0].removeprefix(given)
        thoughts = choice.reasoning_content
        return MessagesAnswer(
            id=self._id,
            model=self.model,
            content=[
                *([ThinkingBlock(thinking=thoughts)] if thoughts else ()),
                *(_block(piece) for piece in pieces),
            ],
            stop_reason=_reason(choice),
            stop_sequence=choice.stop_text,
            usage=MessagesUsage.of(answer.usage),
            media=answer.media,
        )

    def _start(self, block: TextBlock | ThinkingBlock | ToolUseBlock) -> Iterator[WrittenEvent]:
        yield from self._stop()
        self._block, self._open = self._block + 1, block.type
        yield self._event(
            "content_block_start", index=self._block, content_block=block.model_dump()
        )

    def _piece(self, delta: dict[str, Any]) -> WrittenEvent:
        return self._event("content_block_delta", index=self._block, delta=delta)

    def _stop(self) -> Iterator[WrittenEvent]:
        if self._open:
            yield self._event("content_block_stop", index=self._block)

    def _event(self, name: str, /, **fields: Any) -> WrittenEvent:
        return {"type": name, **fields}, name


def _block(piece: str | ToolCall) -> TextBlock | ToolUseBlock:
    if isinstance(piece, str):
        return TextBlock(text=piece)
    try:
        values = piece.values
    except ValueError:  # max_tokens cut it; stop_reason says so
        values = {}
    return ToolUseBlock(id=piece.id, name=piece.name, input=values)


def _reason(choice: AnswerChoice) -> StopReason:
    if choice.finish_reason == "length":
        return "max_tokens"
    if choice.tool_calls:
        return "tool_use"
    return "end_turn" if choice.stop_text is None else "stop_sequence"


_ERRORS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


def _error(status: int, body: dict[str, Any]) -> dict[str, Any]:
    """Anthropic's form of an error, with what OpenAI's says beside it."""
    other = "invalid_request_error" if status < 500 else "api_error"
    kind = _ERRORS.get(status, other)
    return {"type": "error", "error": {**body["error"], "type": kind}}


MESSAGES = Dialect(
    path="/v1/messages",
    name="messages",
    about="Answer a conversation in Anthropic's format. Nothing of it is stored.",
    body=MessagesRequest,
    read=read,
    answer=MessagesAnswer,
    streamed="The message; with `stream`, events of it.",
    event={
        "type": "object",
        "required": ["event", "data"],
        "properties": {
            "event": {"type": "string", "description": "`message_start`, ..., `message_stop`"},
            "data": {"type": "string", "description": "an event or error as Anthropic has it"},
        },
    },
    error_form=_error,
    more_paths=("/v1/messages/count_tokens",),
)


@MESSAGES.router.post(
    "/v1/messages/count_tokens", responses=error_responses(400, 404, 410, 413, 422, 504)
)
async def count_tokens(body: MessagesRequest, client: CurrentClient) -> TokenCount:
    """Tokens of a request to /v1/messages. Media are decoded, but not encoded."""
    cost = await estimate(client, MESSAGES.reading(body, client))
    return TokenCount(input_tokens=cost.prompt_tokens)

"""POST /v1/responses: OpenAI's newer format of a question. Nothing of it is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field

from mico_chat.assistant import Answer
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.fields import check_object, check_one_of, check_text, string_at
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_chat.options import options_of, with_options
from mico_chat.tools import CallPiece
from mico_chat.wire import Usage
from mico_server.answering import Dialect, Written, WrittenEvent
from mico_server.dialects.openai import OpenAIBody, OpenAIQuestion, json_schema_of
from mico_server.fetch.media_reader import MediaReader
from mico_server.routes.bodies import SCHEMAS, Objects, Texts

# --- Requests ---


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


@with_options("responses")
class ResponseRequest(OpenAIBody):
    """OpenAI's request, with ``depth_scale``, ``estimate_depth`` and the sampling options that vLLM
    adds.

    Nothing is stored: send the items of the conversation again with each request. Fields without a
    meaning here (``store``, ``metadata``, ``reasoning``, ``include``, ...) are ignored.
    """

    input: str | Objects = Field(json_schema_extra=SCHEMAS["ResponseInput"])
    instructions: str | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    include: Texts | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
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
        if self.top_logprobs:
            raise RequestError.at("top_logprobs", "not here; /v1/chat/completions has them")

    @property
    def format(self) -> TextFormat:
        return TextFormat() if self.text is None or self.text.format is None else self.text.format

    def options(self) -> dict[str, Any]:
        values = options_of(self, "responses")
        form = self.format
        where = "text.format.schema"
        values["json_schema"] = json_schema_of(form.type, form.schema_, where, form.strict)
        return values


# --- Answers ---


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(BaseModel):
    """What the model thought before it answered."""

    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[Any] = []
    status: Status
    content: list[ReasoningText]


class FunctionCall(BaseModel):
    """``arguments`` are JSON as the model wrote it: check it."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputTokensDetails(BaseModel):
    """``media_tokens`` are context tokens; an earlier request had computed ``cached_tokens``."""

    cached_tokens: int
    cache_write_tokens: int = 0
    media_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        thoughts = OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens)
        details = InputTokensDetails(
            cached_tokens=usage.cached_tokens, media_tokens=usage.media_tokens
        )
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=details,
            output_tokens=usage.completion_tokens,
            output_tokens_details=thoughts,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """OpenAI's response, and ``media``: a report of each medium in the order of the request."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage | ReasoningItem | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    media: tuple[MediaReport, ...] = ()


class ResponseQuestion(OpenAIQuestion):
    """The response so far is ``response``, whose last item is open while pieces of it come."""

    error_event = "error"
    schema_field, flat = "text.format", True

    def __init__(
        self, body: ResponseRequest, messages: Sequence[Message], reader: MediaReader
    ) -> None:
        super().__init__(body, messages, body.options(), reader)
        set_ = options_of(body, "responses")
        self._number = 0
        self._open: OutputMessage | ReasoningItem | FunctionCall | None = None
        self._response = ResponseObject(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            status="in_progress",
            output=[],
            instructions=body.instructions,
            max_output_tokens=set_.get("max_tokens"),
            metadata=body.metadata or {},
            model=body.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=set_.get("temperature"),
            text={"format": body.format.model_dump(by_alias=True, exclude_none=True)},
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=body.tools or [],
            top_p=set_.get("top_p"),
            truncation=set_.get("truncation") or "disabled",
        )

    def begin(self, media: tuple[MediaReport, ...]) -> Written:
        self._response.media = media
        yield self._state("response.created")
        yield self._state("response.in_progress")

    def write(self, delta: Delta) -> Iterator[WrittenEvent]:
        if delta.reasoning_content:
            if not isinstance(self._open, ReasoningItem):
                id_ = f"rs_{uuid.uuid4().hex[:24]}"
                item = ReasoningItem(id=id_, status="in_progress", content=[])
                yield from self._begun(item, ReasoningText(text=""))
            yield self._said("response.reasoning_text.delta", delta.reasoning_content)
        if delta.text:
            if not isinstance(self._open, OutputMessage):
                yield from self._close("completed")
                yield from self._message()
            yield self._said("response.output_text.delta", delta.text, logprobs=[])
        if (piece := delta.call) is not None:
            yield from self._called(piece)
        if delta.finish_reason is not None:
            if not self._response.output:
                yield from self._message()
            yield from self._close("completed" if delta.finish_reason == "stop" else "incomplete")

    def _called(self, piece: CallPiece) -> Iterator[WrittenEvent]:
        if piece.name is not None:
            yield from self._close("completed")
            item = FunctionCall(
                id=f"fc_{uuid.uuid4().hex[:24]}",
                call_id=piece.id,
                name=piece.name,
                arguments="",
                status="in_progress",
            )
            yield self._added(item)
        if piece.arguments:
            assert isinstance(self._open, FunctionCall)
            self._open.arguments += piece.arguments
            about = {"item_id": self._open.id, "delta": piece.arguments}
            yield self._event("response.function_call_arguments.delta", **about)

    def end(self, answer: Answer) -> Written:
        response = self._response
        response.usage = ResponseUsage.of(answer.usage)
        response.status = response.output[-1].status
        if response.status == "incomplete":
            response.incomplete_details = IncompleteDetails()
        yield self._state(f"response.{response.status}")

    def whole(self, answer: Answer) -> ResponseObject:
        (choice,) = answer.choices
        calls = 0
        list(self.write(Delta(reasoning_content=choice.reasoning_content or "")))
        for piece in choice.pieces:
            if isinstance(piece, str):
                delta = Delta(text=piece)
            else:
                call = CallPiece(calls, piece.name, piece.arguments, piece.id)
                delta, calls = Delta(call=call), calls + 1
            list(self.write(delta))
        list(self.write(Delta(finish_reason=choice.finish_reason)))
        list(self.end(answer))
        self._response.media = answer.media
        return self._response

    def _message(self) -> Iterator[WrittenEvent]:
        message = OutputMessage(id=f"msg_{uuid.uuid4().hex[:24]}", status="in_progress", content=[])
        yield from self._begun(message, OutputText(text=""))

    def _begun(self, item: OutputMessage | ReasoningItem, part: Any) -> Iterator[WrittenEvent]:
        """Open an item, and ``part`` as the one part of its content."""
        yield self._added(item)
        item.content.append(part)
        yield self._part("response.content_part.added", part=part.model_dump())

    def _said(self, kind: str, text: str, **more: Any) -> WrittenEvent:
        assert isinstance(self._open, OutputMessage | ReasoningItem)
        self._open.content[0].text += text
        return self._part(kind, delta=text, **more)

    def _close(self, status: Status) -> Iterator[WrittenEvent]:
        item = self._open
        if item is None:
            return
        item.status = status
        if not isinstance(item, FunctionCall):
            part = item.content[0]
            more: dict[str, Any] = {"logprobs": []} if isinstance(part, OutputText) else {}
            yield self._part(f"response.{part.type}.done", text=part.text, **more)
            yield self._part("response.content_part.done", part=part.model_dump())
        else:
            about = {"item_id": item.id, "name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **about)
        yield self._event("response.output_item.done", item=item.model_dump())
        self._open = None

    def _added(self, item: OutputMessage | ReasoningItem | FunctionCall) -> WrittenEvent:
        self._open = item
        self._response.output.append(item)
        return self._event("response.output_item.added", item=item.model_dump())

    def _part(self, kind: str, /, **fields: Any) -> WrittenEvent:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, content_index=0, **fields)

    def _event(self, kind: str, /, **fields: Any) -> WrittenEvent:
        return self._numbered(kind, output_index=len(self._response.output) - 1, **fields)

    def _state(self, name: str) -> WrittenEvent:
        return self._numbered(name, response=self._response.model_dump(mode="json"))

    def _numbered(self, kind: str, /, **fields: Any) -> WrittenEvent:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}, kind


async def read(body: ResponseRequest, reader: MediaReader) -> ResponseQuestion:
    body.check()
    items = [body.input] if isinstance(body.input, str) else body.input
    chat = [_message(item, f"input[{number}]") for number, item in enumerate(items)]
    messages = _joined(await reader.messages(chat, "input"))
    if body.instructions is not None:
        check_text(body.instructions, "instructions")
        messages = [Message.system(body.instructions), *messages]
    return ResponseQuestion(body, messages, reader)


RESPONSES = Dialect(
    path="/v1/responses",
    name="responses",
    about="Answer a conversation in the format of OpenAI's Responses API. Nothing of it is stored.",
    body=ResponseRequest,
    read=read,
    answer=ResponseObject,
    streamed="The response; with `stream`, events of it.",
    event="ResponseEvent",
)


# --- Items ---

_PARTS = {"input_text": "text", "output_text": "text", "text": "text"}


def _message(item: Any, where: str) -> dict[str, Any]:
    """An item of the input as one message of the chat format."""
    if isinstance(item, str):
        return {"role": "user", "content": item}
    check_object(item, where)
    kind = item.get("type", "message")
    known = ("message", "function_call", "function_call_output", "reasoning")
    check_one_of(kind, known, f"{where}.type")
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": string_at(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "reasoning":
        said = item.get("content") or item.get("summary") or []
        thoughts = ""
        for number, part in enumerate(said if isinstance(said, list) else [said]):
            check_object(part, f"{where}.content[{number}]")
            thoughts += string_at(part, "text", f"{where}.content[{number}]")
        return {"role": "assistant", "content": None, "reasoning_content": thoughts}
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
            parts.append({**part, "type": "image_url"})
        elif kind == "input_file" and part.get("file_url") is not None:
            parts.append({"type": "document_url", "document_url": part["file_url"]})
        elif kind == "input_file":
            parts.append({"type": "file", "file": part})
        else:
            parts.append(part)  # input_audio, audio_url, video_url, document_url, ...
    return parts


def _joined(messages: list[Message]) -> list[Message]:
    """Thoughts, the words behind them, and calls that follow each other are one message."""
    joined: list[Message] = []
    for message in messages:
        last = joined[-1] if joined else None
        bare = last is not None and not (last.content or last.tool_calls)
        if (
            last is not None
            and last.role == message.role == "assistant"
            and (message.tool_calls or bare)
        ):
            joined[-1] = replace(
                message,
                content=(*last.content, *message.content),
                tool_calls=(*last.tool_calls, *message.tool_calls),
                reasoning_content=last.reasoning_content + message.reasoning_content,
            )
        else:
            joined.append(message)
    return [one for one in joined if one.content or one.tool_calls or one.role != "assistant"]

"""OpenAI's answers of /v1/responses: items of an answer, and the events of a stream of them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from mico_chat.media.medium import MediaReport
from mico_chat.wire import FinishReason, Usage
from mico_server.routes.tool_use import AnswerReader

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
        details = InputTokensDetails(
            cached_tokens=usage.cached_tokens, media_tokens=usage.media_tokens
        )
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=details,
            output_tokens=usage.completion_tokens,
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
    output: list[OutputMessage | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    media: tuple[MediaReport, ...] = ()


Event = tuple[str, dict[str, Any]]
"""The type of an event, and its other fields without their number."""


class ResponseBuilder:
    """Makes a response of the pieces of an answer, and tells each change of it as an event."""

    def __init__(self, reader: AnswerReader, **fields: Any) -> None:
        self._reader = reader
        self._open: OutputMessage | FunctionCall | None = None
        self.response = ResponseObject(
            id=f"resp_{uuid.uuid4().hex}",
            created_at=int(time.time()),
            status="in_progress",
            output=[],
            **fields,
        )

    def begun(self) -> Iterator[Event]:
        yield self._state("response.created")
        yield self._state("response.in_progress")

    def add(self, text: str, reason: FinishReason | None = None) -> Iterator[Event]:
        """A piece of the answer, the last one with the ``reason`` of its end."""
        for piece in self._reader.feed(text, last=reason is not None):
            if isinstance(piece, str):
                if not isinstance(self._open, OutputMessage):
                    yield from self._close("completed")
                    yield from self._message()
                yield from self._said(piece)
            elif piece.name is not None:
                yield from self._close("completed")
                call = self._reader.calls[piece.index]
                item = FunctionCall(
                    id=f"fc_{uuid.uuid4().hex[:24]}",
                    call_id=call.id,
                    name=call.name,
                    arguments="",
                    status="in_progress",
                )
                yield self._added(item)
            else:
                assert isinstance(self._open, FunctionCall)
                self._open.arguments += piece.arguments
                about = {"item_id": self._open.id, "delta": piece.arguments}
                yield self._event("response.function_call_arguments.delta", **about)
        if reason is not None:
            if not self.response.output:
                yield from self._message()
            yield from self._close("completed" if reason == "stop" else "incomplete")

    def ended(self, usage: Usage) -> Iterator[Event]:
        self.response.usage = ResponseUsage.of(usage)
        last = self.response.output[-1].status
        self.response.status = last
        if last == "incomplete":
            self.response.incomplete_details = IncompleteDetails()
        yield self._state(f"response.{last}")

    def _message(self) -> Iterator[Event]:
        message = OutputMessage(id=f"msg_{uuid.uuid4().hex[:24]}", status="in_progress", content=[])
        yield self._added(message)
        message.content.append(OutputText(text=""))
        yield self._part("response.content_part.added", part=message.content[0].model_dump())

    def _said(self, text: str) -> Iterator[Event]:
        assert isinstance(self._open, OutputMessage)
        self._open.content[0].text += text
        yield self._part("response.output_text.delta", delta=text, logprobs=[])

    def _close(self, status: Status) -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            text = item.content[0]
            yield self._part("response.output_text.done", text=text.text, logprobs=[])
            yield self._part("response.content_part.done", part=text.model_dump())
        else:
            about = {"item_id": item.id, "name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **about)
        yield self._event("response.output_item.done", item=item.model_dump())
        self._open = None

    def _added(self, item: OutputMessage | FunctionCall) -> Event:
        self._open = item
        self.response.output.append(item)
        return self._event("response.output_item.added", item=item.model_dump())

    def _part(self, kind: str, /, **fields: Any) -> Event:
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, content_index=0, **fields)

    def _event(self, kind: str, /, **fields: Any) -> Event:
        return kind, {"output_index": len(self.response.output) - 1, **fields}

    def _state(self, name: str) -> Event:
        return name, {"response": self.response.model_dump(mode="json")}

"""The tools of a request, and the calls of them in an answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mico_chat.assistant import Assistant
from mico_chat.calls import OBJECTS, AnswerPiece, CallFormat, CallPiece, CallReader
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import LimitError, RequestError
from mico_chat.messages import Message
from mico_chat.tools import Tool, ToolCall, call_schema, read_choice, read_tools
from mico_server.settings import ServerSettings


@dataclass(frozen=True)
class ToolUse:
    """The tools that a model is shown. If it must call one, it writes a bare call by a schema."""

    tools: tuple[Tool, ...] = ()
    form: CallFormat | None = None
    forced: bool = False
    most: int | None = None

    def told(self, messages: Sequence[Message]) -> list[Message]:
        first, *others = messages
        return [replace(first, tools=self.tools), *others]

    def options(self, options: GenerationOptions, name: str) -> GenerationOptions:
        """Options for an answer that may be calls; ``name`` is the field of the answer's format."""
        if not self.tools:
            return options
        if options.json_schema is not None:
            raise RequestError.at(
                name,
                "a schema leaves the model no way to call a tool; leave out the tools, or ask with "
                "tool_choice none",
            )
        if not self.forced:
            return options
        return options.model_copy(update={"json_schema": call_schema(self.tools)})

    def reader(self) -> AnswerReader:
        if self.form is None:
            return AnswerReader(None)
        return AnswerReader(CallReader(self.form, self.tools, most=self.most))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of an error of the schema what it means for the tools."""
        try:
            yield
        except RequestError as error:
            _, found, reason = str(error).partition("json_schema: ")
            if not (self.forced and found):
                raise
            reason = f"the model cannot be made to call a tool: {reason}, or tool_choice auto"
            raise RequestError.at("tool_choice", reason) from error


def tool_use(
    tools: list[Any] | None,
    choice: Any,
    parallel: bool | None,
    assistant: Assistant,
    settings: ServerSettings,
    *,
    flat: bool = False,
) -> ToolUse:
    """Read the tools of a request; ``flat`` is the form of /v1/responses.

    Raises:
        RequestError: the model has no tools, or the field that is wrong.
    """
    if tools and assistant.call_format is None:
        raise RequestError.at(
            "tools", "this model's chat template has no tools that are known here; leave them out"
        )
    size = len(json.dumps(tools)) if tools else 0
    if size > settings.max_text_bytes:
        limit = f"over the limit of {settings.max_text_bytes} (MICO_SERVER_MAX_TEXT_BYTES)"
        raise LimitError("tools", f"{size} bytes, {limit}")
    declared = read_tools(tools or [], flat=flat)
    how, chosen = read_choice(choice, declared, flat=flat)
    if how == "none" or not declared:
        return ToolUse()
    forced = how == "required"
    form = OBJECTS if forced else assistant.call_format
    return ToolUse(chosen, form, forced, 1 if parallel is False or forced else None)


class AnswerReader:
    """Text and calls of one answer; calls get an id as they begin."""

    def __init__(self, calls: CallReader | None) -> None:
        self._reader = calls
        self.text = ""
        self.calls: list[ToolCall] = []

    def feed(self, text: str, *, last: bool = False) -> list[AnswerPiece]:
        """The pieces that a piece of the answer completes, ``last`` all that are left."""
        if self._reader is None:
            pieces: list[AnswerPiece] = [text] if text else []
        else:
            pieces = self._reader.feed(text) + (self._reader.finish() if last else [])
        for piece in pieces:
            self._add(piece)
        return pieces

    def _add(self, piece: AnswerPiece) -> None:
        if isinstance(piece, str):
            self.text += piece
        elif piece.name is not None:
            self.calls.append(ToolCall(f"call_{uuid.uuid4().hex[:24]}", piece.name, ""))
        else:
            call = self.calls[piece.index]
            self.calls[piece.index] = replace(call, arguments=call.arguments + piece.arguments)

    def delta(self, piece: CallPiece) -> dict[str, Any]:
        """A piece of a call as OpenAI's chunks have it."""
        function: dict[str, Any] = {"arguments": piece.arguments}
        if piece.name is None:
            return {"index": piece.index, "function": function}
        call = self.calls[piece.index]
        function = {"name": piece.name, **function}
        return {"index": piece.index, "id": call.id, "type": "function", "function": function}

"""What OpenAI's two formats of a question have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from mico_chat.ask import Ask
from mico_chat.errors import LimitError, RequestError
from mico_chat.messages import Message
from mico_chat.options import GenerationOptions
from mico_chat.tools import BEST_EFFORT, read_tool_use
from mico_server.answering import Question, RequestBody
from mico_server.fetch.media_reader import MediaReader
from mico_server.host import ModelHost
from mico_server.routes.bodies import Metadata
from mico_server.settings import ServerSettings


class OpenAIBody(RequestBody):
    """The fields of both formats; those without a meaning here are ignored."""

    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class OpenAIQuestion(Question):
    """A question whose tools are read for the loaded model.

    ``schema_field`` names the format of the answer; ``flat`` is the form of a response's tools.
    """

    schema_field: ClassVar[str]
    flat: ClassVar[bool]

    def __init__(
        self,
        body: RequestBody,
        messages: Sequence[Message],
        options: dict[str, Any],
        reader: MediaReader,
    ) -> None:
        ask = Ask(messages, GenerationOptions.of(options), reader.tenant)
        super().__init__(ask, body.model, stream=bool(body.stream))
        self._tools, self._choice, self._parallel = self.tools_of(body)

    def tools_of(self, body: Any) -> tuple[list[Any] | None, Any, bool]:
        """The tools, the choice among them, and whether an answer may have several calls."""
        return body.tools, body.tool_choice, body.parallel_tool_calls is not False

    async def prepare(self, host: ModelHost, reader: MediaReader) -> None:
        if self._tools:
            host.assistant.check_tools()
        check_size(self._tools, reader.service.settings)
        tools = read_tool_use(self._tools, self._choice, parallel=self._parallel, flat=self.flat)
        form = self.ask.options.form
        if tools.chosen and form is not None:
            raise RequestError.at(
                self.schema_field if form[0] == "json_schema" else form[0],
                "a schema leaves the model no way to call a tool; leave out the tools, or ask with "
                "tool_choice none",
            )
        self.ask = replace(self.ask, tools=tools)
        await super().prepare(host, reader)


def check_size(tools: list[Any] | None, settings: ServerSettings) -> None:
    size = len(json.dumps(tools)) if tools else 0
    if size > (most := settings.max_text_bytes):
        limit = f"over the limit of {most} (MICO_SERVER_MAX_TEXT_BYTES)"
        raise LimitError("tools", f"{size} bytes, {limit}")


def json_schema_of(
    kind: str, schema: dict[str, Any] | None, where: str, strict: bool | None = None
) -> dict[str, Any] | None:
    """The schema that an answer's format asks for; ``where`` is the field that must have it.

    It is followed as a whole or refused, unless ``strict`` is false: then as far as it is known.
    """
    if kind == "json_object":
        return {"type": "object"}
    if kind == "text":
        return None
    if schema is None:
        raise RequestError.at(where, "the field is missing")
    return BEST_EFFORT | schema if strict is False else schema

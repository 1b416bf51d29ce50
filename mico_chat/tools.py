"""Tools that a model may call, and its calls, in OpenAI's format."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mico_chat.errors import RequestError
from mico_chat.fields import check_object, check_one_of, check_text, object_at, string_at, type_of

MOST_TOOLS = 128
"""OpenAI's limit."""

BEST_EFFORT = {"x-guidance": {"lenient": True}}
"""In a schema: a keyword that llguidance does not know limits nothing."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_DEEPEST = 64
"""Levels of a tool's parameters and of a call's arguments; real ones have fewer than 20."""


@dataclass(frozen=True)
class Tool:
    """A function that the client runs for the model; ``parameters`` is a JSON schema.

    Calls that are forced follow all of the schema if it is ``strict``, else what is known of it.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {}}
    )
    strict: bool = False

    @property
    def declaration(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters}


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool; ``arguments`` is JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str

    @cached_property
    def values(self) -> dict[str, Any]:
        values = json.loads(self.arguments or "{}")
        assert isinstance(values, dict)
        return values

    def to_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class CallPiece:
    """A piece of the call number ``index``: first its ``name``, then pieces of its arguments.

    The first piece of an answer's call has its ``id``, which the assistant gives it.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    id: str = ""


def read_tools(tools: Any, *, flat: bool = False) -> tuple[Tool, ...]:
    """The ``tools`` of a chat completion; ``flat`` are those of a response."""
    if not isinstance(tools, list | tuple):
        raise RequestError.at("tools", f"expected a list, got {type_of(tools)}")
    if len(tools) > MOST_TOOLS:
        raise RequestError.at("tools", f"{len(tools)} tools, but at most {MOST_TOOLS} are taken")
    read = tuple(_tool(tool, f"tools[{number}]", flat) for number, tool in enumerate(tools))
    names = [tool.name for tool in read]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise RequestError.at(f"tools[{number}]", f"the name {name!r} is there twice")
    return read


def _tool(tool: Any, where: str, flat: bool) -> Tool:
    check_object(tool, where)
    if tool.get("type") != "function":
        got = tool["type"] if isinstance(tool.get("type"), str) else type_of(tool.get("type"))
        reason = f"expected 'function', got {got[:40]!r}: only functions can be tools here"
        raise RequestError.at(f"{where}.type", reason)
    function = tool if flat else object_at(tool, "function", where)
    inner = where if flat else f"{where}.function"
    found: dict[str, Any] = {"name": name_at(function, inner)}
    for key, read in (("description", string_at), ("parameters", object_at)):
        if function.get(key) is not None:
            found[key] = read(function, key, inner)
    _check_value(found.get("parameters"), f"{inner}.parameters")
    return Tool(**found, strict=function.get("strict") is True)


@dataclass(frozen=True)
class ToolUse:
    """The tools that a question declares, and those that its answer may call: ``chosen``.

    ``forced``: the answer must be a call. Without ``parallel`` it has one call at most.
    """

    declared: tuple[Tool, ...] = ()
    chosen: tuple[Tool, ...] = ()
    forced: bool = False
    parallel: bool = True

    @property
    def most(self) -> int | None:
        """The most calls of an answer."""
        return None if self.parallel and not self.forced else 1


NO_TOOLS = ToolUse()


def read_tool_use(
    tools: Any, choice: Any = None, *, parallel: bool = True, flat: bool = False
) -> ToolUse:
    """The fields ``tools`` and ``tool_choice`` of a chat completion, or (``flat``) of a response.

    Raises:
        RequestError: naming the field that is wrong.
    """
    declared = read_tools(tools or [], flat=flat)
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        check_one_of(choice, ("none", "auto", "required"), "tool_choice")
        if choice == "required" and not declared:
            raise RequestError.at("tool_choice", "'required', but the request has no tools")
        chosen = () if choice == "none" else declared
        return ToolUse(declared, chosen, choice == "required", parallel)
    check_object(choice, "tool_choice")
    check_one_of(choice.get("type"), ("function",), "tool_choice.type")
    function = choice if flat else object_at(choice, "function", "tool_choice")
    name = string_at(function, "name", "tool_choice" if flat else "tool_choice.function")
    chosen = tuple(tool for tool in declared if tool.name == name)
    if not chosen:
        known = ", ".join(tool.name for tool in declared) or "there are none"
        raise RequestError.at("tool_choice", f"{name[:80]!r} is no tool of the request: {known}")
    return ToolUse(declared, chosen, True, parallel)


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """A JSON schema of a call of one of the tools."""
    shared: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.parameters)
        for key in ("$defs", "definitions"):  # their references begin at the root
            for name, own in parameters.pop(key, {}).items():
                if shared.setdefault(key, {}).setdefault(name, own) != own:
                    reason = f"two tools have different {key} of the name {name!r}: rename one"
                    raise RequestError.at("tools", reason)
        properties = {"name": {"type": "string", "enum": [tool.name]}, "arguments": parameters}
        required = list(properties)
        call = {"type": "object", "properties": properties, "required": required}
        calls.append({**call, "additionalProperties": False})
    rest = {} if all(tool.strict for tool in tools) else BEST_EFFORT
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **shared, **rest}


def read_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    """The ``tool_calls`` of an assistant's message."""
    if not isinstance(calls, list | tuple):
        raise RequestError.at(where, f"expected a list, got {type_of(calls)}")
    return tuple(_call(call, f"{where}[{number}]") for number, call in enumerate(calls))


def _call(call: Any, where: str) -> ToolCall:
    check_object(call, where)
    if call.get("type", "function") != "function":
        raise RequestError.at(f"{where}.type", "expected 'function': only functions can be called")
    function = object_at(call, "function", where)
    inner = f"{where}.function"
    name = name_at(function, inner)
    arguments = string_at(function, "arguments", inner)
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError.at(f"{inner}.arguments", f"not JSON ({error})") from error
    check_object(values, f"{inner}.arguments")
    _check_value(values, f"{inner}.arguments")
    return ToolCall(string_at(call, "id", where), name, arguments)


def name_at(part: Mapping[str, Any], where: str) -> str:
    name = string_at(part, "name", where)
    if not _NAME.fullmatch(name):
        reason = f"{name[:80]!r} is not 1 to 64 of the characters a-z, A-Z, 0-9, _ and -"
        raise RequestError.at(f"{where}.name", reason)
    return name


def _check_value(value: Any, where: str, depth: int = 1) -> None:
    if depth > _DEEPEST:
        raise RequestError.at(where, f"nested deeper than {_DEEPEST} levels")
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping | list):
        for key in value if isinstance(value, Mapping) else ():
            check_text(key, where)
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_value(part, where, depth + 1)

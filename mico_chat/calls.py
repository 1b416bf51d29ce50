"""Calls of tools in an answer, read while it is written.

What is no call, or cannot be read as one of the conversation's tools, is text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mico_chat.tools import Tool

_NAME = r"([a-zA-Z0-9_-]{1,64})"
_OBJECT = re.compile(
    r'\s*\{\s*"name"\s*:\s*"' + _NAME + r'"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_TAG = re.compile(rf"\s*<function={_NAME}>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(?:\r?\n)?(.*?)(?:\r?\n)?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: each behind ``open``, or as the whole answer if that is empty.

    ``head`` matches a call up to its arguments, which are a JSON object or (``tags``) parameters in
    tags. Behind them ``next`` leads to another call, ``end`` to the end of the calls, which
    ``close`` ends. ``markers`` are tokens that the text of an answer must show, also if they are
    special.
    """

    open: str
    head: re.Pattern[str]
    end: re.Pattern[str]
    close: str = ""
    next: re.Pattern[str] | None = None
    tags: bool = False
    markers: tuple[str, ...] = ()


_TAGGED_END = re.compile(r".*?</tool_call>", re.DOTALL)
HERMES = CallFormat("<tool_call>", _OBJECT, _TAGGED_END, "</tool_call>")
XML = CallFormat("<tool_call>", _TAG, _TAGGED_END, "</tool_call>", tags=True)
MISTRAL = CallFormat(
    "[TOOL_CALLS]",
    re.compile(r"\s*\[?" + _OBJECT.pattern),
    re.compile(r"[^{}\[\]]*\}\s*\]"),
    "]",
    next=re.compile(r"[^{}\[\]]*\}\s*,\s*(?=\{)"),
    markers=("[TOOL_CALLS]",),
)
MISTRAL_ARGUMENTS = CallFormat(
    "[TOOL_CALLS]",
    re.compile(rf"\s*{_NAME}\s*\[ARGS\]\s*(?=\{{)"),
    re.compile(""),
    markers=("[TOOL_CALLS]", "[ARGS]"),
)
OBJECTS = CallFormat(
    "", _OBJECT, re.compile(r"\s*\}?\s*"), next=re.compile(r"\s*\}\s*[;,]?\s*(?=\{)")
)
"""Llama's, and that of an answer which a JSON schema limits to calls."""


def format_of(source: str) -> CallFormat | None:
    """The format that a chat template asks a model for; None if it is unknown."""
    if "<tool_call>" in source and "<arg_key>" not in source:
        return XML if "<function=" in source else HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGUMENTS if "[ARGS]" in source else MISTRAL
    return OBJECTS if '"parameters": ' in source and '"name": ' in source else None


@dataclass(frozen=True)
class CallPiece:
    """A piece of the call number ``index``: first its ``name``, then pieces of its arguments.

    The first piece of an answer's call has its ``id``, which the assistant gives it.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    id: str = ""


AnswerPiece: TypeAlias = str | CallPiece
"""Text of an answer, or a piece of a call."""


class CallReader:
    """Tells the text of one answer from its calls. Calls after the first ``most`` are left out."""

    def __init__(self, form: CallFormat, tools: Sequence[Tool], *, most: int | None = None) -> None:
        self.n_calls = 0
        self._form, self._most = form, most
        self._tools = {tool.name: tool.parameters for tool in tools}
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail", "plain"] = "text"
        self._opened = ""  # what was taken off for the call, if it turns out to be none
        self._object = _ObjectEnd()
        self._parameters: Mapping[str, Any] = {}
        self._n_parameters = 0
        self._said = False

    def feed(self, text: str) -> list[AnswerPiece]:
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[AnswerPiece]:
        """The pieces that were held back at the end of the answer."""
        return list(self._read(final=True))

    def _read(self, *, final: bool) -> Iterator[AnswerPiece]:
        steps = {
            "text": self._text,
            "head": self._head,
            "arguments": self._tags if self._form.tags else self._json,
            "tail": self._tail,
            "plain": self._plain,
        }
        while True:
            before = self._state, self._held
            yield from steps[self._state](final)
            if (self._state, self._held) == before:
                return

    # --- Each step takes what it can from the text that is held. ---

    def _text(self, final: bool) -> Iterator[AnswerPiece]:
        if not self._form.open:
            start = self._held.lstrip()
            if start.startswith("{") and not self._said:
                self._state, self._opened = "head", ""
            elif start:
                self._state = "plain"
            return
        before, opening, behind = self._held.partition(self._form.open)
        if opening:
            text = before.rstrip()
            yield from self._say(text)
            self._opened = before[len(text) :] + opening
            self._held, self._state = behind, "head"
            return
        certain = self._held
        if not final:
            most = range(len(self._form.open) - 1, 0, -1)
            part = next((n for n in most if self._held.endswith(self._form.open[:n])), 0)
            certain = self._held[: len(self._held) - part].rstrip()
        elif self.n_calls and not certain.strip():
            certain = ""
        yield from self._say(certain)
        self._held = "" if final else self._held[len(certain) :]

    def _plain(self, final: bool) -> Iterator[AnswerPiece]:
        yield from self._say(self._held)
        self._held = ""

    def _say(self, text: str) -> Iterator[AnswerPiece]:
        if self.n_calls and not self._said:
            text = text.lstrip()  # what divides two calls
        if text:
            self._said = True
            yield text

    def _head(self, final: bool) -> Iterator[AnswerPiece]:
        found = self._form.head.match(self._held)
        if found is not None and found[1] in self._tools:
            self._held, self._state = self._held[found.end() :], "arguments"
            self._object, self._n_parameters = _ObjectEnd(), 0
            self._parameters = self._tools[found[1]].get("properties") or {}
            yield from self._call(found[1])
            return
        close = self._form.close
        end = self._held.find(close) if close else -1
        if found is None and end < 0 and not final and self._may_be_call():
            return
        end = len(self._held) if end < 0 else end
        body, rest = self._held[:end], self._held[end + len(close) :]
        calls = None if found else _whole(body, self._tools)
        if calls is None:
            # No call: its opening is text, and a call may come behind it.
            self._state = "text" if self._form.open else "plain"
            yield from self._say(self._opened)
            self._opened = ""
            return
        for name, arguments in calls:
            yield from self._call(name)
            yield from self._argument(arguments)
            self.n_calls += 1
        self._state, self._held, self._said = "text", rest, False

    def _may_be_call(self) -> bool:
        """Whether an answer without an opening may still become a call."""
        key = re.match(r'\s*\{\s*"([^"]*)', self._held)
        known = ("name", "arguments", "parameters", "type", "function")
        return bool(self._form.open) or key is None or any(k.startswith(key[1]) for k in known)

    def _json(self, final: bool) -> Iterator[AnswerPiece]:
        end = self._object.find(self._held)
        taken = len(self._held) if end is None else end
        yield from self._argument(self._held[:taken])
        self._held = self._held[taken:]
        if end is not None:
            self._ended()

    def _tags(self, final: bool) -> Iterator[AnswerPiece]:
        """Parameters in tags become a JSON object, parameter by parameter."""
        found = _PARAMETER.match(self._held)
        ends = self._held.lstrip().startswith("</")
        if found is not None:
            self._held = self._held[found.end() :]
            value = _typed(found[2], self._parameters.get(found[1]))
            start = ", " if self._n_parameters else "{"
            self._n_parameters += 1
            yield from self._argument(f"{start}{json.dumps(found[1])}: {value}")
        elif ends and "</function>" in self._held:
            self._held = self._held.split("</function>", 1)[1]
            yield from self._argument("}" if self._n_parameters else "{}")
            self._ended()

    def _tail(self, final: bool) -> Iterator[AnswerPiece]:
        """What stands behind the arguments, up to the next call or to the text."""
        form = self._form
        if form.next is not None and (found := form.next.match(self._held)):
            self._held, self._state = self._held[found.end() :], "head"
            self._opened = ""
        elif (form.open or final) and (found := form.end.match(self._held)):
            self._held = self._held[found.end() :]
            self._state = "text" if form.open else "plain"
        yield from ()

    @property
    def _kept(self) -> bool:
        return self._most is None or self.n_calls < self._most

    def _call(self, name: str) -> Iterator[AnswerPiece]:
        if self._kept:
            yield CallPiece(self.n_calls, name)

    def _argument(self, text: str) -> Iterator[AnswerPiece]:
        if self._kept and text:
            yield CallPiece(self.n_calls, arguments=text)

    def _ended(self) -> None:
        self.n_calls += 1
        self._state, self._said = "tail", False


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def find(self, text: str) -> int | None:
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._in_string = character != '"'
                self._escaped = character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


def _whole(body: str, tools: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Names and arguments of calls in another order or form than usual; None if they are none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    calls = []
    for call in found if isinstance(found, list) else [found]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        call = inner if isinstance(inner, dict) else call
        if not isinstance(call, dict) or call.get("name") not in list(tools):
            return None
        arguments = call.get("arguments", call.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append((call["name"], text))
    return calls or None


def _typed(text: str, schema: Any) -> str:
    """A parameter's text as JSON: text unless its schema has another type that it fits."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind not in (None, "string"):
        try:
            return json.dumps(json.loads(text))
        except (ValueError, RecursionError):
            if text in ("True", "False", "None"):
                return {"True": "true", "False": "false", "None": "null"}[text]
    return json.dumps(text)

"""Calls of tools in an answer, read while it is written.

How a model writes them is described as in the ``response_template`` that its tokenizer may have,
and transformers reads them by it. What is no call, or is none of the conversation's tools, is text.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from transformers.utils.chat_parsing import parse_response
from transformers.utils.chat_parsing.response_templates import load_response_template

from mico_chat.tools import CallPiece, Tool

_NAME = r"([a-zA-Z0-9_-]{1,64})"
_OBJECT = rf'\s*\[?\s*\{{\s*"name"\s*:\s*"{_NAME}"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)'
_NEXT = re.compile(r"[^{}\[\]]*\}\s*[;,]?\s*(?=\{)")
_LIST_END, _END = re.compile(r"[^{}\[\]]*\}\s*\]"), re.compile(r"\s*\}?\s*")

CallFormat: TypeAlias = Mapping[str, Any]
"""The field ``tool_calls`` of a response template; without an opening, an answer is calls alone."""

_WHOLE = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
OBJECTS: CallFormat = {"content": "json", "repeats": True, "transform": _WHOLE}
"""Llama's, and that of an answer which a JSON schema limits to calls."""

HERMES: CallFormat = {**OBJECTS, "open": "<tool_call>", "close": "</tool_call>"}
MISTRAL: CallFormat = {**OBJECTS, "open": "[TOOL_CALLS]"}
_ARGUMENTS = r"\[TOOL_CALLS\]\s*(?P<name>[\w-]+)\s*\[ARGS\]"
MISTRAL_ARGUMENTS: CallFormat = {**OBJECTS, "open_pattern": _ARGUMENTS, "transform": _NAMED}
_PARAMETER = r"<parameter=(?P<key>[^>\n]+)>(?:\r?\n)?(?P<value>.*?)(?:\r?\n)?</parameter>"
XML: CallFormat = {
    "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "close_pattern": r"</function>\s*(?:</tool_call>|\Z)",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": _PARAMETER},
    "transform": _NAMED,
}


def markers(form: CallFormat) -> str:
    """A text with all tokens that an answer must show for its calls to be read."""
    return str(form).replace("\\", "")


def format_of(source: str) -> CallFormat | None:
    """The format that a chat template asks a model for; None if it is unknown."""
    if "<tool_call>" in source and "<arg_key>" not in source:
        return XML if "<function=" in source else HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGUMENTS if "[ARGS]" in source else MISTRAL
    return OBJECTS if '"parameters": ' in source and '"name": ' in source else None


AnswerPiece: TypeAlias = str | CallPiece
"""Text of an answer, or a piece of a call."""


class CallReader:
    """Tells the text of one answer from its calls. Calls after the first ``most`` are left out."""

    def __init__(self, form: CallFormat, tools: Sequence[Tool], *, most: int | None = None) -> None:
        self.n_calls = 0
        self._most = most
        fields = {"tool_calls": dict(form)}
        self._template = load_response_template({"start_anchor": "-", "fields": fields})
        self._form = field = self._template.fields["tool_calls"]
        self._tagged, self._bare = field.content == "xml-inline", field.open_re is None
        # Arguments that need no rewriting are given while they are written.
        named = field.transform == _NAMED
        head = ("" if self._tagged else r"\s*(?=\{)") if named else _OBJECT
        usual = {"tag_pattern"} if self._tagged and named else set()
        flows = self._tagged or (field.content == "json" and (named or field.transform == _WHOLE))
        self._begin = re.compile(head) if flows and set(field.content_args) == usual else None
        self._named = named and self._begin is not None
        self._tools = [tool.name for tool in tools]
        self._declared: list[Any] = [{"function": tool.declaration} for tool in tools]
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail", "plain"] = "text"
        self._opened = ""  # what was taken off for the call, if it turns out to be none
        self._name: str | None = None  # of the call, if its opening has it
        self._object = _ObjectEnd()
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
            "arguments": self._tags if self._tagged else self._json,
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
        if self._bare:
            start = self._held.lstrip()
            if start.startswith("{") and not self._said:
                self._state, self._opened = "head", ""
            elif start:
                self._state = "plain"
            return
        opening, at = self._found("open", final)
        before = self._held[:at]
        if opening is not None:
            text = before.rstrip()
            yield from self._say(text)
            self._opened = before[len(text) :] + opening[0]
            self._name = opening.groupdict().get("name") if self._named else None
            self._held, self._state = self._held[opening.end() :], "head"
            return
        certain = before if final else before.rstrip()
        if final and self.n_calls and not certain.strip():
            certain = ""
        yield from self._say(certain)
        self._held = "" if final else self._held[len(certain) :]

    def _found(self, side: str, final: bool) -> tuple[Any, int]:
        """A call's opening or close in what is held, and where a part of one may begin."""
        names = (f"{side}_{name}" for name in ("re", "literals", "literal_can_extend"))
        pattern, literals, grows = (getattr(self._form, name) for name in names)
        found = pattern and pattern.search(self._held, partial=not final)
        if not found:
            return None, len(self._held)
        grows = (grows or literals is None) and not final and found.end() == len(self._held)
        return None if found.partial or grows else found, found.start()

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
        begun = self._begin and self._begin.match(self._held)
        name = begun[1] if begun and not self._named else self._name
        if begun and name in self._tools:
            self._held, self._state = self._held[begun.end() :], "arguments"
            self._object, self._n_parameters = _ObjectEnd(), 0
            yield from self._call(name)
            return
        known = name is None or name in self._tools
        close, _ = self._found("close", final)
        if known and close is None and not final and self._may_be_call():
            return
        end = len(self._held) if close is None else close.end()
        calls = self._read_whole(self._held[:end]) if known else []
        if not calls:
            # No call: its opening is text, and a call may come behind it.
            self._state = "plain" if self._bare else "text"
            yield from self._say(self._opened)
            self._opened = ""
            return
        for called, arguments in calls:
            yield from self._call(called)
            text = arguments if isinstance(arguments, str) else json.dumps(arguments)
            yield from self._argument(text)
            self.n_calls += 1
        self._state, self._held, self._said = "text", self._held[end:], False

    def _read_whole(self, body: str) -> list[tuple[str, Any]]:
        """Names and arguments of the calls behind an opening; none if one cannot be read."""
        text = self._opened.lstrip() + body
        try:
            found = parse_response(text, self._template, prefix="", tools=self._declared)
        except (ValueError, KeyError, TypeError, RecursionError):
            return []  # the caller shows it as text
        calls, waiting = [], [found.get("tool_calls")]
        while waiting:
            match waiting.pop(0):
                case list(several):
                    waiting[:0] = several
                case {"function": dict() | list() as inner}:
                    waiting.insert(0, inner)
                case {"name": str(name), **others} if name in self._tools:
                    calls.append((name, others.get("arguments", others.get("parameters", {}))))
                case _:
                    return []
        return calls

    def _may_be_call(self) -> bool:
        """Whether an answer without an opening may still become a call."""
        key = re.match(r'\s*\{\s*"([^"]*)', self._held)
        known = ("name", "arguments", "parameters", "type", "function")
        return not self._bare or key is None or any(k.startswith(key[1]) for k in known)

    def _json(self, final: bool) -> Iterator[AnswerPiece]:
        end = self._object.find(self._held)
        taken = len(self._held) if end is None else end
        yield from self._argument(self._held[:taken])
        self._held = self._held[taken:]
        if end is not None:
            self._ended("tail")

    def _tags(self, final: bool) -> Iterator[AnswerPiece]:
        """Parameters in tags become a JSON object, parameter by parameter."""
        close, _ = self._found("close", final)
        calls = self._read_whole(self._held if close is None else self._held[: close.end()])
        for key, value in list(calls[0][1].items() if calls else ())[self._n_parameters :]:
            start = ", " if self._n_parameters else "{"
            self._n_parameters += 1
            yield from self._argument(f"{start}{json.dumps(key)}: {json.dumps(value)}")
        if close is not None:
            yield from self._argument("}" if self._n_parameters else "{}")
            self._held = self._held[close.end() :]
            self._ended("text")

    def _tail(self, final: bool) -> Iterator[AnswerPiece]:
        """What stands behind the arguments, up to the next call or to the text."""
        end, _ = self._found("close", final)
        if self._form.close_re is None and not self._named:
            if found := _NEXT.match(self._held):
                self._held, self._state = self._held[found.end() :], "head"
                self._opened = ""
                return
            if final or not self._bare:
                end = (_END if self._bare else _LIST_END).match(self._held)
        elif self._form.close_re is None:
            end = re.match("", self._held)
        if end is not None:
            self._held = self._held[end.end() :]
            self._state = "plain" if self._bare else "text"
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

    def _ended(self, state: Literal["tail", "text"]) -> None:
        self.n_calls += 1
        self._state, self._said = state, False


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._inside = 0, ""  # a string, or behind its backslash

    def find(self, text: str) -> int | None:
        for at, character in enumerate(text):
            if self._inside:
                after = {'"': "", "\\": "\\"} if self._inside == '"' else {}
                self._inside = after.get(character, '"')
            elif character == '"':
                self._inside = '"'
            else:
                self._depth += (character in "{[") - (character in "}]")
                if character in "}]" and self._depth == 0:
                    return at + 1
        return None

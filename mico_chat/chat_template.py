"""A chat template's text for a conversation, cut into markup and text.

Text never becomes markup. The template is shown a mark in place of each content, and of each other
string of a client that may hold a part of a control token, such as a tool's description. Its text
is cut at the marks, and what they stand for is put in as text. The rest is the template's own: the
tokenizer recognises control tokens in it alone (:mod:`mico_chat.prompt_parts`).

A mark holds a quotation mark. The backslashes before it tell how often the template wrote its
content as JSON, so that the content is escaped in the same way.
"""

import ctypes
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from mico_chat.calls import CallFormat, format_of
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import Medium
from mico_chat.messages import Message, TextPart
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import PromptPart, PromptText, control_tokens
from mico_chat.thoughts import ThoughtFormat, thoughts_of
from mico_chat.tools import Tool

MARKER = "\ue000"
"""A private-use character, which templates do not contain. As JSON it may be written in ASCII."""

RENDER_S = 20.0
"""Seconds in which a template must be rendered: the longest conversation takes tenths of one."""

_MARK = re.compile(r'(?:\ue000|\\+ue000)(\d+)(\\*)"(?:\ue000|\\+ue000)')
Shown: TypeAlias = Mapping[str, Any] | Sequence[PromptPart]
"""A medium in a prompt: a part of the content for a template that writes its own markup for media,
such as ``{"type": "image"}``, or the parts that stand in its place."""

Show: TypeAlias = Callable[[MediaFile | Medium], Shown]

Piece: TypeAlias = tuple[int | None, list[PromptPart]]
"""Parts of a prompt, and the number of the message whose content they are, if they are one's."""


def _no_media(medium: MediaFile | Medium) -> Shown:
    raise ValueError(f"{medium.name}: media are not shown here")


class EndlessTemplateError(RequestError):
    """A template that loops for too long."""


class _EndlessError(Exception):
    """Raised in the thread that renders."""


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Raise an error in this thread after a time: a template of somebody else's may loop for ever.

    It reaches Python code alone, as Jinja's loops are; one call of C, such as the product of a text
    and a number, runs to its end.
    """
    raised: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc
    thread, lock, state = ctypes.c_ulong(threading.get_ident()), threading.Lock(), "runs"

    def end() -> None:
        nonlocal state
        with lock:
            if state == "runs":
                state = "late"
                raised(thread, ctypes.py_object(_EndlessError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            if state == "late":  # the error may not have come yet
                raised(thread, None)
            state = "ended"


class ChatTemplate:
    """A tokenizer's chat template, or the Jinja text ``source`` in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
        self._tokenizer: Any = tokenizer
        self.source: str = self._tokenizer.get_chat_template(source, [])
        ends = {end for t in control_tokens(tokenizer).values() for end in _ends_of(t)}
        self._suspect = re.compile("|".join(map(re.escape, sorted(ends | {MARKER, "ue000"}))))
        self._begins_thinking = lru_cache(maxsize=64)(self._begins)

    @cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be a string."""
        return _MARK.search(self._probed(mark(0))) is not None

    @cached_property
    def takes_tools(self) -> bool:
        function = {"name": mark(0), "description": "", "parameters": {}}
        declared = [{"type": "function", "function": function}]
        return _MARK.search(self._probed("", declared)) is not None

    @cached_property
    def call_format(self) -> CallFormat | None:
        """How the model writes calls of tools; None if it has none, or their form is unknown."""
        return format_of(self.source) if self.takes_tools else None

    @cached_property
    def call_tokens(self) -> frozenset[int]:
        """The tokens of a call that the text of an answer must show."""
        return self._tokens_in(() if self.call_format is None else self.call_format.markers)

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How the model thinks before it answers; None if its template knows no thinking."""
        return thoughts_of(self.source)

    @cached_property
    def thought_tokens(self) -> frozenset[int]:
        """The tokens around thoughts, which the text of an answer must show."""
        form = self.thoughts
        return self._tokens_in("" if form is None else f"{form.open}{form.close}{form.bare}")

    def thoughts_before(self, options: GenerationOptions) -> ThoughtFormat | None:
        """The form of the thoughts before an answer; None if there can be none."""
        if self.thoughts is None or options.prefix:
            return None
        begun = self._begins_thinking(options.thinks, options.reasoning_effort)
        return replace(self.thoughts, begun=begun)

    def _begins(self, thinks: bool | None, effort: str | None) -> bool:
        """Whether the prompts of a conversation end within thoughts."""
        options = GenerationOptions(thinking=thinks, reasoning_effort=effort)
        content = mark(0) if self.takes_text else [{"type": "text", "text": mark(0)}]
        rendered = self._probed(content, settings=self._settings(options))
        return self._thinks_at(self._ended(_MARK.split(rendered)[-1], options))

    def _thinks_at(self, end: str) -> bool:
        form = self.thoughts
        return form is not None and end.rfind(form.open) > end.rfind(form.close)

    def _ended(self, end: str, options: GenerationOptions) -> str:
        """The ``end`` of a prompt; behind it no thoughts come if the answer is to have none."""
        form = self.thoughts
        if form is None or options.thinks is not False:
            return end
        return f"{end}\n{form.close}\n\n" if self._thinks_at(end) else end + form.bare

    def _settings(self, options: GenerationOptions) -> dict[str, Any]:
        """The options of thinking by the names that templates have for them."""
        found: dict[str, Any] = {}
        if self.thoughts is not None and options.thinks is not None:
            found = {"enable_thinking": options.thinks, "thinking": options.thinks}
            if options.thinks and options.reasoning_effort:
                found["reasoning_effort"] = options.reasoning_effort
        return found

    def _tokens_in(self, texts: str | Collection[str]) -> frozenset[int]:
        known = control_tokens(self._tokenizer)
        return frozenset(number for number, text in known.items() if text in texts)

    def _probed(
        self,
        content: Any,
        tools: list[Any] | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        try:
            return self._rendered([{"role": "user", "content": content}], tools, True, settings)
        except EndlessTemplateError:
            raise
        except RequestError:
            return ""

    def render(
        self,
        messages: Sequence[Message],
        show: Show = _no_media,
        options: GenerationOptions = GREEDY,
        *,
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        """The prompt of a conversation, whose media are given to ``show`` in order.

        It ends with the ``prefix`` of the answer.

        The tools of all messages are the conversation's. Contents are lists of parts if a medium is
        shown as one, or if the template does not take strings.

        Raises:
            RequestError: the template refuses the conversation, or does not show tools.
        """
        tools = [tool for message in messages for tool in message.tools]
        used = bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
        if used and not self.takes_tools:
            raise RequestError.at("tools", "this model's chat template has no tools")
        marks = _Marks(self._suspect, "reasoning_content" in self.source)
        contents = [_content(message, show) for message in messages]
        listed = any(isinstance(run, Mapping) for runs in contents for run in runs)
        listed = listed or not self.takes_text
        chat = [
            marks.message(index, message, runs, listed)
            for index, (message, runs) in enumerate(zip(messages, contents, strict=True))
        ]
        declared = [marks.tool(tool) for tool in tools] or None
        settings = self._settings(options)
        rendered = self._rendered(chat, declared, add_generation_prompt, settings)
        pieces: list[Piece] = []
        at = 0
        for found in _MARK.finditer(rendered):
            pieces.append((None, [PromptText(rendered[at : found.start()], markup=True)]))
            # 0, 1, 3, 7, ... backslashes before a quotation mark that was written as JSON so often
            pieces.append(marks.piece(int(found[1]), len(found[2]).bit_length()))
            at = found.end()
        end = self._ended(rendered[at:], options) if add_generation_prompt else rendered[at:]
        pieces.append((None, [PromptText(end, markup=True)]))
        if options.prefix:
            pieces.append((None, [PromptText(options.prefix)]))
        return pieces

    def parts(
        self,
        messages: Sequence[Message],
        show: Show = _no_media,
        options: GenerationOptions = GREEDY,
        *,
        add_generation_prompt: bool = True,
    ) -> list[PromptPart]:
        """The parts of :meth:`render`."""
        pieces = self.render(messages, show, options, add_generation_prompt=add_generation_prompt)
        return [part for _, parts in pieces for part in parts]

    def _rendered(
        self,
        chat: list[Any],
        tools: list[Any] | None,
        opens: bool,
        settings: Mapping[str, Any],
    ) -> str:
        try:
            with _ended_after(RENDER_S):
                return str(
                    self._tokenizer.apply_chat_template(
                        chat,
                        tools=tools,
                        chat_template=self.source,
                        tokenize=False,
                        add_generation_prompt=opens,
                        **settings,
                    )
                )
        except _EndlessError as error:
            reason = f"the model's chat template: rendering takes longer than {RENDER_S:g} s"
            raise EndlessTemplateError(reason, "messages") from error
        except Exception as error:  # a template works with the client's values
            reason = " ".join(str(error).split())
            raise RequestError(f"the model's chat template: {reason}", "messages") from error


def mark(number: int) -> str:
    return f'{MARKER}{number}"{MARKER}'


def _ends_of(token: str) -> tuple[str, ...]:
    """Texts of which a string holds one if a control token begins or ends in it."""
    first, last = token[:1], token[-1:]
    return (token,) if first.isalnum() or last.isalnum() else (first, last)


def _content(message: Message, show: Show) -> list[Mapping[str, Any] | list[PromptPart]]:
    """A message's content: parts for the template, and what stands between them."""
    runs: list[Mapping[str, Any] | list[PromptPart]] = []
    for part in message.content:
        shown = [PromptText(part.text)] if isinstance(part, TextPart) else show(part)
        if isinstance(shown, Mapping):
            runs.append(shown)
        elif runs and isinstance(last := runs[-1], list):
            last += shown
        else:
            runs.append(list(shown))
    return runs


@dataclass
class _Marks:
    """What the marks stand for: contents of messages, and other strings of the client.

    ``thoughts``: the template has a rule for earlier thoughts.
    """

    suspect: re.Pattern[str]
    thoughts: bool
    pieces: list[Piece] = field(default_factory=list)
    marked: dict[str, str] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)

    def message(
        self,
        index: int,
        message: Message,
        runs: list[Mapping[str, Any] | list[PromptPart]],
        listed: bool,
    ) -> dict[str, Any]:
        shown: dict[str, Any] = {"role": message.role}
        if listed:
            shown["content"] = [
                run if isinstance(run, Mapping) else {"type": "text", "text": self._new(index, run)}
                for run in runs
            ]
        elif message.tool_calls and not message.text:
            shown["content"] = ""  # templates ask whether there is any
        else:
            parts = (run for run in runs if not isinstance(run, Mapping))
            shown["content"] = self._new(index, [part for run in parts for part in run])
        if message.reasoning_content and self.thoughts:
            thought = PromptText(message.reasoning_content.strip("\n"))
            shown["reasoning_content"] = self._new(None, [thought])
        if message.tool_calls:
            shown["tool_calls"] = [
                {
                    "id": self._call(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._marked(call.values)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            shown["tool_call_id"] = self._call(message.tool_call_id)
        if message.name is not None:
            shown["name"] = message.name
        return shown

    def tool(self, tool: Tool) -> dict[str, Any]:
        return {"type": "function", "function": self._marked(tool.declaration)}

    def piece(self, number: int, level: int) -> Piece:
        """What a mark stands for, written as JSON ``level`` times."""
        index, parts = self.pieces[number]
        return index, [
            part if not isinstance(part, PromptText) or part.markup else _escaped(part, level)
            for part in parts
        ]

    def _new(self, index: int | None, parts: list[PromptPart]) -> str:
        self.pieces.append((index, parts))
        return mark(len(self.pieces) - 1)

    def _call(self, id_: str) -> str:
        """A call's id as Mistral's templates want it: nine digits."""
        return self.calls.setdefault(id_, f"{len(self.calls) + 1:09}")

    def _marked(self, value: Any) -> Any:
        """A client's value; marks stand in place of strings that may hold a part of markup.

        Other strings stay: templates compare them, sort them, and ask for their lengths.
        """
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._marked(inner) for inner in value]
        if not isinstance(value, str):
            return value
        if not self.suspect.search(unicodedata.normalize("NFKC", value)):
            return value
        if value not in self.marked:  # equal strings have equal marks
            self.marked[value] = self._new(None, [PromptText(value)])
        return self.marked[value]


def _escaped(part: PromptText, level: int) -> PromptText:
    text = part.text
    for _ in range(level):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return replace(part, text=text)

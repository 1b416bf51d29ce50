"""A chat template's text for a conversation, cut into markup and text.

Text never becomes markup. The template reads contents, and each other string of a client that may
hold a part of a control token, such as a tool's description, in characters of their own
(:mod:`mico_chat.client_text`), by which its text is cut. The rest is the template's own: the
tokenizer recognises control tokens in it alone (:mod:`mico_chat.prompt_parts`).
"""

import ctypes
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import load_response_template

from mico_chat.calls import CallFormat, format_of, markers
from mico_chat.client_text import (
    GIVEN,
    MOVED,
    SAID,
    SLOT,
    ClientText,
    client_text,
    runs,
    template_of,
)
from mico_chat.errors import ConfigError, RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import Medium
from mico_chat.messages import Message, TextPart
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import PromptPart, PromptText, control_tokens
from mico_chat.thoughts import ThoughtFormat, thoughts_of
from mico_chat.tools import Tool

RENDER_S = 20.0
"""Seconds in which a template must be rendered: the longest conversation takes tenths of one."""

_PROBE = client_text("x", GIVEN)
Shown: TypeAlias = Mapping[str, Any] | Sequence[PromptPart]
"""A medium in a prompt: a part of the content for a template that writes its own markup for media,
such as ``{"type": "image"}``, or the parts that stand in its place."""

Show: TypeAlias = Callable[[MediaFile | Medium], Shown]

Piece: TypeAlias = tuple[bool, list[PromptPart]]
"""Parts of a prompt, and whether they are what the assistant said."""


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
        # transformers' response template: how the model writes an answer
        self._answers: Mapping[str, Any] = self._tokenizer.response_template or {}
        try:
            if self._answers:
                load_response_template(dict(self._answers))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"response_template in tokenizer_config.json: {error}") from error
        # A string may hold a part of a control token if it has a character that begins or ends one.
        ends = "".join(t[0] + t[-1] for t in control_tokens(tokenizer).values() if t)
        self._suspect = re.compile(
            f"[{re.escape(ends)}]|{MOVED.pattern}" if ends else MOVED.pattern
        )
        self._begins_thinking = lru_cache(maxsize=64)(self._begins)

    @cached_property
    def takes_text(self) -> bool:
        """Whether the content of a message may be a string."""
        return MOVED.search(self._probed(_PROBE)) is not None

    @cached_property
    def takes_tools(self) -> bool:
        function = {"name": _PROBE, "description": "", "parameters": {}}
        declared = [{"type": "function", "function": function}]
        return MOVED.search(self._probed("", declared)) is not None

    @cached_property
    def call_format(self) -> CallFormat | None:
        """How the model writes calls of tools; None if it has none, or their form is unknown."""
        if not self.takes_tools:
            return None
        return (
            self._answers["fields"].get("tool_calls") if self._answers else format_of(self.source)
        )

    @cached_property
    def call_tokens(self) -> frozenset[int]:
        """The tokens of a call that the text of an answer must show."""
        return self._tokens_in("" if self.call_format is None else markers(self.call_format))

    @cached_property
    def thoughts(self) -> ThoughtFormat | None:
        """How the model thinks before it answers; None if its template knows no thinking."""
        return thoughts_of(self.source, self._answers)

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
        content = _PROBE if self.takes_text else [{"type": "text", "text": _PROBE}]
        rendered = self._probed(content, settings=self._settings(options))
        return self._thinks_at(self._ended(MOVED.split(rendered)[-1], options))

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

    def _tokens_in(self, text: str) -> frozenset[int]:
        known = control_tokens(self._tokenizer)
        return frozenset(number for number, token in known.items() if token in text)

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
        shown = _Shown(self._suspect)
        chat = [shown.message(message, show) for message in messages]
        contents = [message["content"] for message in chat]
        if self.takes_text and all(isinstance(one, str) for parts in contents for one in parts):
            for turn in chat:
                turn["content"] = turn["content"][0] if turn["content"] else ""
        else:
            for parts in contents:
                parts[:] = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
        declared = [shown.tool(tool) for tool in tools] or None
        settings = self._settings(options)
        rendered = self._rendered(chat, declared, add_generation_prompt, settings)
        if add_generation_prompt:
            end = MOVED.split(rendered)[-1]
            rendered = rendered.removesuffix(end) + self._ended(end, options)
        pieces = shown.pieces(rendered)
        if options.prefix:
            pieces.append((False, [PromptText(options.prefix)]))
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
                named = self._tokenizer.special_tokens_map | settings
                named |= {"messages": chat, "tools": tools, "add_generation_prompt": opens}
                return str.__str__(template_of(self.source).render(named, documents=None))
        except _EndlessError as error:
            reason = f"the model's chat template: rendering takes longer than {RENDER_S:g} s"
            raise EndlessTemplateError(reason, "messages") from error
        except Exception as error:  # a template works with the client's values
            reason = " ".join(str(error).split())
            raise RequestError(f"the model's chat template: {reason}", "messages") from error


@dataclass
class _Shown:
    """What the template is shown of a conversation. ``suspect`` finds what may be markup."""

    suspect: re.Pattern[str]
    slots: list[tuple[str, PromptPart]] = field(default_factory=list)
    calls: dict[str, str] = field(default_factory=dict)

    def message(self, message: Message, show: Show) -> dict[str, Any]:
        """A message, whose content is a list of strings and of the template's own parts."""
        place = SAID if message.role == "assistant" else GIVEN
        content: list[Any] = []
        for part in message.content:
            given = [PromptText(part.text)] if isinstance(part, TextPart) else show(part)
            if isinstance(given, Mapping):
                content.append(given)
                continue
            text = ClientText("".join(self._text(one, place) for one in given))
            if content and isinstance(content[-1], str):
                text = content.pop() + text
            content.append(text)
        shown: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning_content:
            thought = client_text(message.reasoning_content, GIVEN)
            shown |= {"reasoning_content": thought, "thinking": thought}  # gpt-oss's name
        if message.tool_calls:
            shown["tool_calls"] = [
                {
                    "id": self._call(call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._shown(call.values)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            shown["tool_call_id"] = self._call(message.tool_call_id)
        if message.name is not None:
            shown["name"] = message.name
        return shown

    def tool(self, tool: Tool) -> dict[str, Any]:
        return {"type": "function", "function": self._shown(tool.declaration)}

    def pieces(self, rendered: str) -> list[Piece]:
        """The prompt in pieces; the last is the template's own."""
        found = [
            self.slots[ord(text) - SLOT]
            if kind == "slot"
            else (kind, PromptText(text, markup=kind == "markup"))
            for kind, text in [*runs(rendered), *[("markup", "")] * (not MOVED.split(rendered)[-1])]
        ]
        grouped = groupby(found, lambda one: one[0])
        return [(kind == "said", [part for _, part in group]) for kind, group in grouped]

    def _text(self, part: PromptPart, place: int) -> str:
        """A part of a content as a string, in which a slot stands for context tokens."""
        if isinstance(part, PromptText) and not part.markup:
            return client_text(part.text, place)
        self.slots.append(("said" if place == SAID else "given", part))
        return chr(SLOT + len(self.slots) - 1)

    def _call(self, id_: str) -> str:
        """A call's id as Mistral's templates want it: nine digits."""
        return self.calls.setdefault(id_, f"{len(self.calls) + 1:09}")

    def _shown(self, value: Any) -> Any:
        """A client's value; strings that may hold a part of markup have characters of their own.

        Other strings stay, so that a tokenizer reads them and what is around them as one text.
        """
        if isinstance(value, Mapping):
            return {self._shown(key): self._shown(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._shown(inner) for inner in value]
        if isinstance(value, str) and self.suspect.search(unicodedata.normalize("NFKC", value)):
            return client_text(value, GIVEN)
        return value

"""From deltas to an answer: each stage takes those of the one before it, and closes it."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict

from mico_chat.ask import Ask
from mico_chat.checkpoints.marks import Marks
from mico_chat.engine.base import Delta
from mico_chat.errors import ModelError, RequestError
from mico_chat.late import late
from mico_chat.media.medium import MediaReport
from mico_chat.tools import ToolCall
from mico_chat.wire import Choice, Explanation, TokenLogprob, Usage

with late():
    from mico_chat import calls

Deltas: TypeAlias = AsyncGenerator[Delta, None]

Event: TypeAlias = Delta | tuple[MediaReport, ...]
"""What an answer is made of: first the reports of its media, then deltas, the last with usage."""

Explain: TypeAlias = Callable[[Ask, Sequence[int]], Awaitable[Explanation]]

_WRITTEN: dict[str, Any] = {"text": "", "reasoning_content": "", "logprobs": ()}
"""What a delta adds to an answer, and the values of one that adds nothing."""


class AnswerChoice(Choice):
    """One of the answers. Its ``pieces`` are its text and its calls of tools, in their order.
    ``stop_text`` is the stop text that ended it."""

    pieces: tuple[str | ToolCall, ...] = ()
    stop_text: str | None = None

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [piece for piece in self.pieces if isinstance(piece, ToolCall)]


class Answer(BaseModel):
    """A finished answer, its usage, and the report of each medium in the request's order."""

    model_config = ConfigDict(frozen=True)

    choices: tuple[AnswerChoice, ...]
    usage: Usage
    media: tuple[MediaReport, ...] = ()
    explanation: Explanation | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text


class GatheredAnswer:
    """Joins the events of :meth:`Assistant.stream` to the whole answer.

    ``reports`` are those of the media.
    """

    def __init__(self, n: int) -> None:
        self.reports: tuple[MediaReport, ...] = ()
        self._thoughts = [""] * n
        self._pieces: list[list[str | ToolCall]] = [[] for _ in range(n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
        self._ends = [Delta()] * n
        self._usage: Usage | None = None
        self._explanation: Explanation | None = None

    def add(self, event: Event) -> None:
        if not isinstance(event, Delta):
            self.reports = event
            return
        self._thoughts[event.index] += event.reasoning_content
        pieces = self._pieces[event.index]
        last = pieces[-1] if pieces else None
        if isinstance(last, str) and event.text:
            pieces[-1] = last + event.text
        elif event.text:
            pieces.append(event.text)
        if (call := event.call) is not None and call.name is not None:
            pieces.append(ToolCall(call.id, call.name, call.arguments))
        elif call is not None:
            assert isinstance(last, ToolCall)
            pieces[-1] = replace(last, arguments=last.arguments + call.arguments)
        self._logprobs[event.index] += event.logprobs
        if event.finish_reason is not None:
            self._ends[event.index] = event
        self._usage = event.usage or self._usage
        self._explanation = event.explanation or self._explanation

    def text(self, index: int = 0) -> str:
        """The text so far of an answer."""
        return "".join(piece for piece in self._pieces[index] if isinstance(piece, str))

    def answer(self) -> Answer:
        if self._usage is None:
            raise ModelError("the answer has not ended")
        choices = tuple(
            AnswerChoice(
                text=self.text(index),
                reasoning_content=self._thoughts[index] or None,
                finish_reason=end.finish_reason or "length",
                logprobs=tuple(self._logprobs[index]),
                confidence=end.confidence,
                unsure=end.unsure,
                pieces=tuple(self._pieces[index]),
                stop_text=end.stop_text,
            )
            for index, end in enumerate(self._ends)
        )
        usage, media = self._usage, self.reports
        return Answer(choices=choices, usage=usage, media=media, explanation=self._explanation)


def answered(
    ask: Ask,
    deltas: Deltas,
    *,
    explain: Explain,
    marks: Marks | None,
    call_format: calls.CallFormat | None,
) -> Deltas:
    """An answer's deltas as whoever asked gets them.

    ``explain`` says what an answer's tokens rest on. Without ``marks`` no answer is marked unsure;
    without ``call_format`` the model calls no tools unless it must.
    """
    deltas = _explained(ask, deltas, explain)
    deltas = _with_calls(ask, _marked(deltas, marks), call_format)
    return _counted(ask, deltas)


def _explained(ask: Ask, deltas: Deltas, explain: Explain) -> Deltas:
    """Add what the answer rests on to the last delta, if the question wants to know."""
    if not ask.options.explain:
        return deltas

    async def events() -> Deltas:
        tokens: list[int] = []
        async with aclosing(deltas):
            async for delta in deltas:
                tokens += delta.token_ids
                if delta.usage is not None:
                    # Nobody should wait for them.
                    yield Delta(**{name: getattr(delta, name) for name in _WRITTEN})
                    if delta.finish_reason == "stop":  # the token that ends it is not shown
                        del tokens[-1:]
                    found = await explain(ask, tokens) if tokens else None
                    delta = delta.model_copy(update={**_WRITTEN, "explanation": found})
                yield delta

    return events()


def _counted(ask: Ask, deltas: Deltas) -> Deltas:
    """Say in the usage what was left out of the conversation."""
    names = ("turns_left_out", "media_left_out", "pages_sent")
    left_out = {name: getattr(ask, name) for name in names}
    if not any(left_out.values()):
        return deltas

    async def events() -> Deltas:
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.usage is not None:
                    usage = delta.usage.model_copy(update=left_out)
                    delta = delta.model_copy(update={"usage": usage})
                yield delta

    return events()


def _marked(deltas: Deltas, marks: Marks | None) -> Deltas:
    """Mark answers whose confidence is low."""
    if marks is None:
        return deltas
    said: dict[int, str] = defaultdict(str)

    async def events() -> Deltas:
        async with aclosing(deltas):
            async for delta in deltas:
                said[delta.index] += delta.text
                if delta.confidence is not None:
                    unsure = marks.unsure(said[delta.index], delta.confidence)
                    delta = delta.model_copy(update={"unsure": unsure})
                yield delta

    return events()


def _with_calls(ask: Ask, deltas: Deltas, form: calls.CallFormat | None) -> Deltas:
    """Tell calls of tools from text. One that must be made is written bare, by a schema."""
    use, form = ask.tools, calls.OBJECTS if ask.tools.forced else form
    if not use.chosen or form is None:
        return deltas

    async def events() -> Deltas:
        readers = [calls.CallReader(form, use.chosen, most=use.most) for _ in range(ask.options.n)]
        async with aclosing(deltas):
            try:
                async for delta in deltas:
                    for piece in pieces_of(delta, readers[delta.index]):
                        yield piece
            except RequestError as error:
                _, found, reason = str(error).partition("json_schema: ")
                if not (use.forced and found):
                    raise
                reason = f"the model cannot be made to call a tool: {reason}"
                raise RequestError.at("tool_choice", f"{reason}, or tool_choice auto") from error

    return events()


def pieces_of(delta: Delta, reader: calls.CallReader) -> list[Delta]:
    """A delta as one delta for each piece of text or of a call that it completes.

    The first has the delta's log-probabilities and thoughts, the last all else.
    """
    ends = delta.finish_reason is not None
    pieces = [*reader.feed(delta.text), *(reader.finish() if ends else ())]
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, str):
            parts.append({"text": piece})
            continue
        if piece.name is not None:
            piece = replace(piece, id=f"call_{uuid.uuid4().hex[:24]}")
        parts.append({"text": "", "call": piece})
    if not parts:
        return [delta.model_copy(update={"text": ""})]
    found = [Delta(index=delta.index, **part) for part in parts[:-1]]
    found.append(delta.model_copy(update={**parts[-1], "logprobs": (), "reasoning_content": ""}))
    own = {"logprobs": delta.logprobs, "reasoning_content": delta.reasoning_content}
    found[0] = found[0].model_copy(update=own)
    return found

"""POST /v1/completions: OpenAI's older format, whose prompt no chat template is put around."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, Field

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant, Event
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.messages import Message
from mico_chat.options import with_options
from mico_chat.wire import TokenLogprob, Usage
from mico_server.answering import Dialect, Written
from mico_server.dialects.completions import CompletionQuestion, CompletionUsage, SampledBody
from mico_server.fetch.media_reader import MediaReader
from mico_server.host import ModelHost
from mico_server.routes.bodies import SCHEMAS

MOST_PROMPTS = 64
"""Prompts of a request, which are answered at the same time."""

Plain: TypeAlias = str | tuple[int, ...]

_OF_MEDIA = ("explain", "depth_scale", "estimate_depth", "mm_processor_kwargs", "media_io_kwargs")


@with_options("completions", leave=(*_OF_MEDIA, "thinking", "reasoning_effort"))
class PromptRequest(SampledBody):
    """OpenAI's older request. ``prompt`` is a text, in which markup is markup, or token ids, or a
    list of some, each with ``n`` choices. Without ``max_tokens`` an answer has 16. With ``echo``
    the ``logprobs`` are those of the prompt's tokens too."""

    continue_final_message: ClassVar[None] = None
    prompt: Any = Field(json_schema_extra=SCHEMAS["Prompt"])
    max_tokens: int | None = Field(None, ge=1)
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    user: str | None = None

    def options(self) -> dict[str, Any]:
        return {"max_tokens": 16, **super().options(), "logprobs": self.logprobs}


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: CompletionUsage


@dataclass(frozen=True)
class _Before:
    """A prompt before its answer: the text, the first token, and the others with logprobs."""

    text: str = ""
    first: tuple[str, ...] = ()
    scored: Sequence[TokenLogprob] = ()


class PromptQuestion(CompletionQuestion):
    """Each choice has the text of the prompt before it, if the request wants its ``echo``."""

    kind, id_begins = "text_completion", "cmpl-"

    def __init__(self, body: PromptRequest, prompts: Sequence[Plain], reader: Any) -> None:
        super().__init__(body, [Message.user(".")], reader)
        # A message is as long as its text: it is refused where that is too long.
        said = [Message.user(one if isinstance(one, str) else ".") for one in prompts]
        made = zip(said, prompts, strict=True)
        self._asks = [replace(self.ask, messages=[text], plain=one) for text, one in made]
        self.ask = self._asks[0]
        self._echoes, self._ends = bool(body.echo), Counter[int]()
        self._before: list[_Before] = [_Before()] * len(prompts)

    @property
    def n_choices(self) -> int:
        return len(self._asks) * self.ask.options.n

    def tools_of(self, body: Any) -> tuple[None, None, bool]:
        return None, None, True

    async def prepare(self, host: ModelHost, reader: MediaReader) -> None:
        for ask in self._asks[1:]:
            host.assistant.check_length(ask)
        if self._echoes:
            echoes = (_before(host.assistant, ask) for ask in self._asks)
            self._before = await host.guarded(asyncio.gather(*echoes))

    async def events(self, host: ModelHost) -> AsyncGenerator[Event, None]:
        """The prompts are answered at the same time; the last event has the usage of all."""
        streams = [host.stream(ask) for ask in self._asks]
        waiting = {asyncio.ensure_future(anext(one, None)): n for n, one in enumerate(streams)}
        total = Counter[str]()
        try:
            while waiting:
                for task in (await asyncio.wait(waiting, return_when="FIRST_COMPLETED"))[0]:
                    number, found = waiting[task], task.result()
                    del waiting[task]
                    if found is None:
                        continue
                    following = asyncio.ensure_future(anext(streams[number], None))
                    waiting[following] = number
                    if not isinstance(found, Delta):
                        continue
                    change: dict[str, Any] = {"index": number * self.ask.options.n + found.index}
                    if found.usage is not None:
                        total.update(found.usage.model_dump())
                        change["usage"] = Usage(**total)
                    yield found.model_copy(update=change)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    def _said(self, index: int, said: Any, begun: bool) -> dict[str, Any]:
        before = _Before() if begun else self._before[index // self.ask.options.n]
        text, first = before.text + said.text, list(before.first)
        choice = {"index": index, "text": text, "finish_reason": said.finish_reason}
        found = [*before.scored, *said.logprobs]
        if not (found or first):
            return {**choice, "logprobs": None}
        begin, texts = self._ends[index], [*first, *(one.token for one in found)]
        *offsets, self._ends[index] = accumulate(map(len, texts), initial=begin)
        none: list[Any] = [None] * len(first)
        logprobs = {"tokens": texts, "token_logprobs": [*none, *(one.logprob for one in found)]}
        top = [*none, *({p.token: p.logprob for p in (*one.top, one)} for one in found)]
        return {**choice, "logprobs": {**logprobs, "top_logprobs": top, "text_offset": offsets}}

    def write(self, delta: Delta) -> Written:
        begun = delta.index in self._begun
        self._begun.add(delta.index)
        choice = self._said(delta.index, delta, begun)
        if choice["text"] or choice["logprobs"] or delta.finish_reason:
            yield self._chunk([choice])

    def whole(self, answer: Answer) -> Any:
        choices = [self._said(n, choice, False) for n, choice in enumerate(answer.choices)]
        whole, _ = self._chunk(choices, usage=CompletionUsage.of(answer.usage))
        return TextCompletion.model_validate(whole)


async def read(body: PromptRequest, reader: MediaReader) -> PromptQuestion:
    body.check()
    given = body.prompt
    several = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
    prompts = given if several else [given]
    if len(prompts) > MOST_PROMPTS:
        reason = f"{len(prompts)} prompts, over the limit of {MOST_PROMPTS}; send others apart"
        raise RequestError.at("prompt", reason)
    return PromptQuestion(body, list(map(_plain, prompts)), reader)


def _plain(given: Any) -> Plain:
    if isinstance(given, list) and given and all(type(token) is int for token in given):
        return tuple(given)
    if not isinstance(given, str):
        raise RequestError.at("prompt", "expected a text or its token ids, or a list of some")
    return given


async def _before(assistant: Assistant, ask: Ask) -> _Before:
    """What the request wants to see of a prompt again."""
    ids = await assistant.tokens(ask)
    text = ask.plain if isinstance(ask.plain, str) else await assistant.text_of(ids, ask.tenant)
    if ask.options.logprobs is None or not ids:
        return _Before(text)
    first = await assistant.text_of(ids[:1], ask.tenant)
    return _Before(text, (first,), await assistant.scored(ask))


PROMPTS = Dialect(
    path="/v1/completions",
    name="completions",
    about="Continue a prompt as it is, in OpenAI's older format.",
    body=PromptRequest,
    read=read,
    answer=TextCompletion,
    streamed="The answer; with `stream`, events with pieces of it, the last one `[DONE]`.",
    event="CompletionEvent",
)

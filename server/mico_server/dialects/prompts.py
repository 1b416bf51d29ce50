"""POST /v1/completions: OpenAI's older format, whose prompt no chat template is put around."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from mico_chat.assistant import Answer
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.messages import Message
from mico_chat.options import with_options
from mico_server.answering import Dialect, Written
from mico_server.dialects.completions import CompletionQuestion, CompletionUsage, SampledBody
from mico_server.fetch.media_reader import MediaReader
from mico_server.host import ModelHost
from mico_server.routes.bodies import SCHEMAS

_OF_MEDIA = ("explain", "depth_scale", "estimate_depth", "mm_processor_kwargs", "media_io_kwargs")


@with_options("completions", leave=(*_OF_MEDIA, "thinking", "reasoning_effort"))
class PromptRequest(SampledBody):
    """OpenAI's older request. ``prompt`` is a text, in which markup is markup, or token ids.
    Without ``max_tokens`` an answer has 16."""

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


class PromptQuestion(CompletionQuestion):
    """Each choice has the text of the prompt before it, if the request wants its ``echo``."""

    kind, id_begins = "text_completion", "cmpl-"

    def __init__(self, body: PromptRequest, prompt: str | tuple[int, ...], reader: Any) -> None:
        # The message is as long as the text: it is refused where that is too long.
        super().__init__(body, [Message.user(prompt if isinstance(prompt, str) else ".")], reader)
        self.ask = replace(self.ask, plain=prompt)
        self._echoes, self._echo, self._ends = bool(body.echo), "", Counter[int]()

    def tools_of(self, body: Any) -> tuple[None, None, bool]:
        return None, None, True

    async def prepare(self, host: ModelHost, reader: MediaReader) -> None:
        if self._echoes:
            backend, ids = host.assistant.adapter.tokenizer.backend_tokenizer, self.ask.plain
            self._echo = ids if isinstance(ids, str) else backend.decode(ids, False)

    def _said(self, index: int, said: Any, echo: str) -> dict[str, Any]:
        choice = {"index": index, "text": echo + said.text, "finish_reason": said.finish_reason}
        if not (found := said.logprobs):
            return {**choice, "logprobs": None}
        begin, texts = self._ends[index], [one.token for one in found]
        *offsets, self._ends[index] = accumulate(map(len, texts), initial=begin)
        logprobs = {"tokens": texts, "token_logprobs": [one.logprob for one in found]}
        top = [{p.token: p.logprob for p in (*one.top, one)} for one in found]
        return {**choice, "logprobs": {**logprobs, "top_logprobs": top, "text_offset": offsets}}

    def write(self, delta: Delta) -> Written:
        echo = "" if delta.index in self._begun else self._echo
        self._begun.add(delta.index)
        if echo or delta.text or delta.logprobs or delta.finish_reason:
            yield self._chunk([self._said(delta.index, delta, echo)])

    def whole(self, answer: Answer) -> Any:
        choices = [self._said(n, choice, self._echo) for n, choice in enumerate(answer.choices)]
        whole, _ = self._chunk(choices, usage=CompletionUsage.of(answer.usage))
        return TextCompletion.model_validate(whole)


async def read(body: PromptRequest, reader: MediaReader) -> PromptQuestion:
    body.check()
    prompt = body.prompt
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    if not isinstance(prompt, str | tuple):
        raise RequestError.at("prompt", "expected one text or its token ids; send others apart")
    if body.echo and body.logprobs is not None:
        raise RequestError.at("echo", "a prompt has no logprobs here; leave one of the two out")
    return PromptQuestion(body, prompt, reader)


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

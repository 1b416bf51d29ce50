"""POST /v1/chat/completions: OpenAI's chat format, with every kind of media as content parts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mico_chat.assistant import Answer, AnswerChoice
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_chat.fields import check_object
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_chat.options import options_of, with_options
from mico_chat.tools import CallPiece
from mico_chat.wire import Explanation, FinishReason, TokenLogprob, Usage
from mico_server.answering import Dialect, RequestBody, Written
from mico_server.dialects.openai import OpenAIBody, OpenAIQuestion, json_schema_of
from mico_server.fetch.media_reader import MediaReader
from mico_server.http.json_body import read_json
from mico_server.routes.bodies import SCHEMAS, Objects, Texts

# --- Requests ---


class StreamOptions(BaseModel):
    """``include_usage`` asks for one more chunk at the end, which has the usage and no choices."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    """A named schema. Answers follow all of it, or what is known of it if ``strict`` is false."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Text, any JSON object, JSON that follows a schema, or vLLM's structures behind triggers."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Objects | None = None
    triggers: Texts | None = None


class StructuredOutputs(BaseModel):
    """vLLM's ways to limit an answer, of which a request has one."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    structural_tag: dict[str, Any] | str | None = None


class SampledBody(RequestBody):
    """The options that OpenAI's two formats of completions have in a form of their own."""

    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Texts | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_choice: Texts | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError.at("stream_options", "needs stream: true")

    def options(self) -> dict[str, Any]:
        values = options_of(self, "completions")
        if self.top_k == -1:  # vLLM's value for all tokens
            values["top_k"] = 0
        if self.seed is not None:
            values["seed"] = self.seed % 2**63
        if self.stop:
            values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        taken: dict[str, str] = {}
        for where, name, value in self._forms():
            if name in taken:
                reason = f"{taken[name]} limits the answer already; leave one of the two out"
                raise RequestError.at(where, reason)
            taken[name] = where
            values[name] = value
        return values

    def _forms(self) -> Iterator[tuple[str, str, Any]]:
        """Each JSON schema and structural tag: its field, the option and the value."""
        if (form := self.response_format) is not None and form.type == "structural_tag":
            given = {"structures": form.structures, "triggers": form.triggers}
            yield "response_format", "structural_tag", given
        elif form is not None and form.type != "text":
            schema, strict, where = None, None, "response_format.json_schema"
            if (named := form.json_schema) is not None:
                schema, strict = named.schema_, named.strict
            yield where, "json_schema", json_schema_of(form.type, schema, where, strict)
        one = self.structured_outputs or StructuredOutputs()
        if one.json_object:
            yield "structured_outputs.json_object", "json_schema", {"type": "object"}
        for where, name, value in (
            ("structured_outputs.json", "json_schema", one.json_),
            ("guided_json", "json_schema", self.guided_json),
            ("structured_outputs.structural_tag", "structural_tag", one.structural_tag),
        ):
            if value is not None:
                found = read_json(value, where) if isinstance(value, str) else value
                check_object(found, where)
                yield where, name, found


@with_options("completions")
class ChatCompletionRequest(OpenAIBody, SampledBody):
    """OpenAI's request, with the sampling options that vLLM adds, ``depth_scale``,
    ``estimate_depth``, and ``explain``: which media the answer rests on.

    ``defaults`` of /v1/models has the options that a request does not set. Fields without a
    meaning here (``user``, ``metadata``, ``store``, ...) are ignored.
    ``tools`` are for models whose chat template shows them; the mini's does not.
    """

    messages: Objects = Field(min_length=1, json_schema_extra=SCHEMAS["ChatMessages"])
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Texts | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        if self.add_generation_prompt is bool(self.continue_final_message):
            reason = "it must be the opposite of continue_final_message; leave it out"
            raise RequestError.at("add_generation_prompt", reason)
        if self.modalities not in (None, [], ["text"]):
            raise RequestError.at("modalities", "the model answers with text alone")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError.at("top_logprobs", "needs logprobs: true")
        super().check()

    def options(self) -> dict[str, Any]:
        values = super().options()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values


# --- Answers ---


class CompletionLogprob(BaseModel):
    """A token and its log-probability; ``bytes`` is null if the token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[CompletionLogprob] = []

    @classmethod
    def of(cls, logprob: TokenLogprob) -> CompletionLogprob:
        whole = "\ufffd" not in logprob.token  # else a piece of a character
        return cls(
            token=logprob.token,
            logprob=logprob.logprob,
            bytes=list(logprob.token.encode()) if whole else None,
            top_logprobs=[cls.of(top) for top in logprob.top],
        )


class CompletionLogprobs(BaseModel):
    content: list[CompletionLogprob] | None
    refusal: None = None


class CalledFunction(BaseModel):
    """``arguments`` are JSON as the model wrote it: check it."""

    name: str
    arguments: str


class CompletionToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CompletionMessage(BaseModel):
    """``content`` is null if the model only calls tools; ``reasoning_content`` is what it thought
    before."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[CompletionToolCall] | None = None

    @classmethod
    def of(cls, answer: AnswerChoice, begun: str) -> CompletionMessage:
        """``begun`` is the beginning of the answer that the request had; it is left out."""
        calls = [CompletionToolCall.model_validate(call.to_openai()) for call in answer.tool_calls]
        content = None if calls and not answer.text else answer.text.removeprefix(begun)
        thoughts = answer.reasoning_content
        return cls(content=content, reasoning_content=thoughts, tool_calls=calls or None)


class CompletionChoice(BaseModel):
    """OpenAI's choice, with ``confidence`` and ``unsure`` as in ``Choice``."""

    index: int
    message: CompletionMessage
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]
    confidence: float | None
    unsure: bool | None


class PromptTokensDetails(BaseModel):
    """``media_tokens`` are context tokens; an earlier request had computed ``cached_tokens``."""

    cached_tokens: int
    media_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=usage.cached_tokens, media_tokens=usage.media_tokens
            ),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=usage.reasoning_tokens
            ),
        )


class ChatCompletion(BaseModel):
    """OpenAI's answer, and ``media``: a report of each medium in the order of the request.

    ``explanation`` is there if the request has ``explain``. ``system_fingerprint`` ends with
    "varies" if the engine may answer a request with the same ``seed`` in another way.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    media: tuple[MediaReport, ...]
    explanation: Explanation | None = None


def logprobs_of(logprobs: tuple[TokenLogprob, ...]) -> CompletionLogprobs | None:
    if not logprobs:
        return None
    return CompletionLogprobs(content=[CompletionLogprob.of(logprob) for logprob in logprobs])


def reason_of(reason: FinishReason, called: bool) -> FinishReason | Literal["tool_calls"]:
    """A call that ``max_tokens`` cut has the reason "length", and what was begun of it."""
    return "tool_calls" if called and reason == "stop" else reason


class CompletionQuestion(OpenAIQuestion):
    """The first chunk of each choice has its role; the very first one has the reports of the media.
    The last chunk of each choice has its confidence."""

    schema_field, flat = "response_format", False
    kind, id_begins = "chat.completion.chunk", "chatcmpl-"

    def __init__(self, body: Any, messages: Sequence[Message], reader: MediaReader) -> None:
        options = body.options()
        if body.continue_final_message:
            *messages, last = messages
            if last.role != "assistant" or not last.text or last.media or last.tool_calls:
                reason = "the last message must be the assistant's, and a text"
                raise RequestError.at("continue_final_message", reason)
            options["prefix"] = last.text
        super().__init__(body, messages, options, reader)
        wanted = body.stream_options
        self._wants_usage = wanted is not None and bool(wanted.include_usage)
        self._id, self._created = f"{self.id_begins}{uuid.uuid4().hex}", int(time.time())
        self._begun: set[int] = set()
        self._called: set[int] = set()
        self._media: list[dict[str, Any]] = []

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> tuple[dict[str, Any], None]:
        head = {
            "id": self._id,
            "object": self.kind,
            "created": self._created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            **({"usage": None} if self._wants_usage else {}),
        }
        return {**head, "choices": choices, **more}, None

    def begin(self, media: tuple[MediaReport, ...]) -> Written:
        self._media = [report.model_dump(mode="json") for report in media]
        return ()

    def write(self, delta: Delta) -> Written:
        empty = {"index": delta.index, "logprobs": None, "finish_reason": None}
        if delta.index not in self._begun:
            content = None if self.ask.tools.chosen else ""
            media = {} if self._begun else {"media": self._media}
            self._begun.add(delta.index)
            new = delta.text.removeprefix(self.ask.options.prefix)
            delta = delta.model_copy(update={"text": new})
            begun = {"role": "assistant", "content": content}
            yield self._chunk([{**empty, "delta": begun}], **media)
        logprobs = logprobs_of(delta.logprobs)
        thought = delta.reasoning_content
        said: dict[str, Any] = {"reasoning_content": thought} if thought else {}
        if delta.call is not None:
            self._called.add(delta.index)
            said["tool_calls"] = [_call_of(delta.call)]
        elif delta.text or logprobs is not None:
            said["content"] = delta.text
        if said:
            dumped = None if logprobs is None else logprobs.model_dump()
            yield self._chunk([{**empty, "delta": said, "logprobs": dumped}])
        if delta.finish_reason is not None:
            reason = reason_of(delta.finish_reason, delta.index in self._called)
            rated = {"confidence": delta.confidence, "unsure": delta.unsure}
            last: dict[str, Any] = {**empty, "delta": {}, "finish_reason": reason, **rated}
            more = {}
            if delta.explanation is not None:
                more["explanation"] = delta.explanation.model_dump(mode="json")
            yield self._chunk([last], **more)

    def end(self, answer: Answer) -> Written:
        if self._wants_usage:
            yield self._chunk([], usage=CompletionUsage.of(answer.usage).model_dump())
        yield "[DONE]", None

    def whole(self, answer: Answer) -> ChatCompletion:
        choices = [
            CompletionChoice(
                index=index,
                message=CompletionMessage.of(choice, self.ask.options.prefix),
                logprobs=logprobs_of(choice.logprobs),
                finish_reason=reason_of(choice.finish_reason, bool(choice.tool_calls)),
                confidence=choice.confidence,
                unsure=choice.unsure,
            )
            for index, choice in enumerate(answer.choices)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=CompletionUsage.of(answer.usage),
            media=answer.media,
            explanation=answer.explanation,
        )


def _call_of(piece: CallPiece) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    if piece.name is None:
        return {"index": piece.index, "function": function}
    function = {"name": piece.name, **function}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


async def read(body: ChatCompletionRequest, reader: MediaReader) -> CompletionQuestion:
    body.check()
    messages = await reader.messages(body.messages)
    return CompletionQuestion(body, messages, reader)


COMPLETIONS = Dialect(
    path="/v1/chat/completions",
    name="chat_completions",
    about="Answer a conversation in OpenAI's format. Nothing of it is stored.",
    body=ChatCompletionRequest,
    read=read,
    answer=ChatCompletion,
    streamed="The answer; with `stream`, events with chunks of it, the last one `[DONE]`.",
    event="CompletionEvent",
)

"""OpenAI's answers of /v1/chat/completions, and what stands in them beyond OpenAI's own."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from pydantic import BaseModel

from mico_chat.assistant import Answer
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Explanation, FinishReason, TokenLogprob, Usage
from mico_server.routes.tool_use import AnswerReader, ToolUse


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
    """``content`` is null if the model only calls tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[CompletionToolCall] | None = None

    @classmethod
    def of(cls, answer: AnswerReader) -> CompletionMessage:
        calls = [
            CompletionToolCall(
                id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments)
            )
            for call in answer.calls
        ]
        content = None if calls and not answer.text else answer.text
        return cls(content=content, tool_calls=calls or None)


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


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=usage.cached_tokens, media_tokens=usage.media_tokens
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


def completion(model: str, fingerprint: str, answer: Answer, use: ToolUse) -> ChatCompletion:
    choices = []
    for index, choice in enumerate(answer.choices):
        reader = use.reader()
        reader.feed(choice.text, last=True)
        choices.append(
            CompletionChoice(
                index=index,
                message=CompletionMessage.of(reader),
                logprobs=logprobs_of(choice.logprobs),
                finish_reason=reason_of(choice.finish_reason, reader),
                confidence=choice.confidence,
                unsure=choice.unsure,
            )
        )
    return ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        system_fingerprint=fingerprint,
        choices=choices,
        usage=CompletionUsage.of(answer.usage),
        media=answer.media,
        explanation=answer.explanation,
    )


def reason_of(reason: FinishReason, answer: AnswerReader) -> FinishReason | Literal["tool_calls"]:
    """A call that ``max_tokens`` cut has the reason "length", and what was begun of it."""
    return "tool_calls" if answer.calls and reason == "stop" else reason


def logprobs_of(logprobs: tuple[TokenLogprob, ...]) -> CompletionLogprobs | None:
    if not logprobs:
        return None
    return CompletionLogprobs(content=[CompletionLogprob.of(logprob) for logprob in logprobs])

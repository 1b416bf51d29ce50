"""What every engine takes and gives, whatever runs the model underneath."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mico_chat.errors import RequestError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport, Medium
from mico_chat.messages import MediaPart, Message


class GenerationOptions(BaseModel):
    """How an answer is generated. The default is greedy: the same request, the same answer.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep every token; ``seed`` makes a
    sampled answer repeatable; ``stop`` ends the answer before any of these texts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0)
    stop: tuple[str, ...] = Field((), max_length=16)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Options from what a user gave; numbers may be text.

        Raises:
            RequestError: naming the first option that makes no sense, its value, and why.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            reason = first["msg"][:1].lower() + first["msg"][1:]
            raise RequestError(f"{name}: {reason}, got {first['input']!r}") from error


class Usage(BaseModel):
    """Tokens of a request. ``prompt_tokens`` includes ``media_tokens``, the context tokens."""

    model_config = ConfigDict(frozen=True)

    prompt_tokens: int
    completion_tokens: int
    media_tokens: int


class Answer(BaseModel):
    """A finished answer, what it cost, and what was seen and heard for it.

    ``finish_reason`` is "stop" when the model (or a stop text) ended it, "length" when
    ``max_tokens`` did. ``media`` has one report for each medium, in the order of the request.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    media: tuple[MediaReport, ...] = ()


class Decoder(Protocol):
    """Turns a medium's file or bytes into arrays; :class:`mico_chat.media.MediaDecoder` is one."""

    def decode(
        self, kind: Kind, source: str | Path | bytes, *, name: str = "", depth_scale: float = 0.001
    ) -> Medium: ...


class Engine(Protocol):
    """A loaded model that answers conversations."""

    name: str

    def decode(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with every medium decoded; already decoded ones are kept.

        Raises:
            MediaError: naming the first medium that cannot be decoded, and why.
        """
        ...

    def answer(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions
    ) -> list[Answer]:
        """Answer several conversations at once, in order.

        Raises:
            MediaError: for a medium that cannot be decoded.
            ContextLengthError: when prompt and answer exceed the model's context.
        """
        ...

    def stream(
        self, messages: Sequence[Message], options: GenerationOptions
    ) -> Generator[str, None, Answer]:
        """Answer one conversation piece by piece; the generator returns the whole answer.

        Closing the generator stops the model. Errors are those of :meth:`answer`.
        """
        ...

    def close(self) -> None:
        """Give back processes and memory."""
        ...


def decode_media(
    messages: Sequence[Message], decoder: Decoder, *, depth_scale: float = 0.001
) -> list[Message]:
    """Messages with every medium decoded by ``decoder``; already decoded ones are kept.

    ``depth_scale`` is metres for one unit of a 16-bit depth map.
    """
    return [
        replace(
            message,
            content=tuple(
                _decoded(part, decoder, depth_scale) if isinstance(part, MediaPart) else part
                for part in message.content
            ),
        )
        for message in messages
    ]


def _decoded(part: MediaPart, decoder: Decoder, depth_scale: float) -> MediaPart:
    if not isinstance(part.source, str | Path | bytes):
        return part
    medium = decoder.decode(part.kind, part.source, name=part.name, depth_scale=depth_scale)
    return replace(part, source=medium)


def media_reports(messages: Sequence[Message]) -> tuple[MediaReport, ...]:
    """The reports of all decoded media of a conversation, in order."""
    return tuple(
        part.source.report
        for message in messages
        for part in message.media
        if not isinstance(part.source, str | Path | bytes)
    )

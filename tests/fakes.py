"""Stand-ins with the interfaces of the real decoder and assistant."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mico_chat.assistant import Answer, Assistant, Choice, decode_media
from mico_chat.engine import Delta, GenerationOptions, TokenLogprob, Usage
from mico_chat.errors import MediaError, MissingFileError, RequestError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import Audio, Depth, Image, MediaReport, Medium, Normal, Video
from mico_chat.messages import Message


class FakeDecoder:
    """Decodes anything but missing files, empty ones, and the text ``broken``."""

    def __init__(self) -> None:
        self.decoded: list[tuple[Kind, str]] = []
        self.depth_scales: list[float] = []

    def decode(
        self, kind: Kind, source: str | Path | bytes, *, name: str = "", depth_scale: float = 0.001
    ) -> Medium:
        if isinstance(source, str | Path):
            if not Path(source).exists():
                raise MissingFileError(name)
            source = Path(source).read_bytes()
        if source == b"broken":
            raise MediaError(name, f"not a {kind}")
        self.decoded.append((kind, name))
        self.depth_scales.append(depth_scale)
        return medium(kind, name, len(source))


def medium(kind: Kind, name: str = "x", size: int = 1) -> Medium:
    """A blank medium of any kind."""
    report = MediaReport(name=name, kind=kind, bytes=size)
    pixels = np.zeros((2, 3, 3), np.uint8)
    if kind == "audio":
        return Audio(np.zeros(16, np.float32), report=report)
    if kind == "video":
        return Video(pixels[None], np.zeros(1), report=report)
    if kind == "depth":
        return Depth(np.ones((2, 3), np.float32), report=report)
    return (Image if kind == "image" else Normal)(pixels, report=report)


class FakeAssistant(Assistant):
    """Answers with what it was shown and asked; refuses a question with ``refuse`` in it.

    ``started`` is released once for each request; with a ``gate`` none is answered before it is
    set, and ``cancelled`` is when one was given up until then.
    """

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.name = "fake"
        self.similarity = None
        self.decoder = FakeDecoder()
        self.batches: list[int] = []
        self.options: list[GenerationOptions] = []
        self.started = threading.Semaphore(0)
        self.cancelled = threading.Event()
        self.closed = False
        self.gate = gate

    async def answer(
        self, messages: Sequence[Message], options: GenerationOptions, **keywords: Any
    ) -> Answer:
        self.options.append(options)
        self.started.release()
        if self.gate is not None:
            try:
                assert await asyncio.to_thread(self.gate.wait, 30)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        scale = keywords.get("depth_scale", 0.001)
        decoded = decode_media(messages, self.decoder, depth_scale=scale)
        question = decoded[-1].text
        if "refuse" in question:
            raise RequestError("refused")
        if "crash" in question:
            raise ZeroDivisionError("secret")
        media = [part.source for message in decoded for part in message.media]
        reports = tuple(m.report for m in media if isinstance(m, Medium))
        shown = ", ".join(f"{report.kind} {Path(report.name).name}" for report in reports)
        said = TokenLogprob(token="[", token_id=1, logprob=-0.5)
        choice = Choice(
            text=f"[{shown}] {question}",
            finish_reason="stop",
            logprobs=() if options.logprobs is None else (said,),
        )
        usage = Usage(prompt_tokens=10, completion_tokens=2, media_tokens=len(reports))
        return Answer(choices=(choice,) * options.n, usage=usage, media=reports)

    async def stream(
        self, messages: Sequence[Message], options: GenerationOptions, **keywords: Any
    ) -> AsyncGenerator[Delta | tuple[MediaReport, ...], None]:
        answer = await self.answer(messages, options, **keywords)
        yield answer.media
        for word in answer.text.split(" "):
            yield Delta(text=word + " ")
            yield Delta()  # a token that makes no text certain
        yield Delta(finish_reason="stop", usage=answer.usage)

    def answer_all(self, batch: Any, options: GenerationOptions, **keywords: Any) -> Any:
        self.batches.append(len(batch))
        return super().answer_all(batch, options, **keywords)

    def close(self) -> None:
        self.closed = True

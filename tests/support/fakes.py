"""Stand-ins with the interfaces of the real decoder and assistant."""

import asyncio
import math
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mico_chat.ask import NOTE, Ask
from mico_chat.assistant import Assistant, Event, decode_media, pages_sent
from mico_chat.encode import CacheStats, ContextCache, MediaEncoder
from mico_chat.engine.base import Delta, EngineStats, GenerationOptions, Prompt
from mico_chat.errors import MediaError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import KINDS, TABLE, Kind
from mico_chat.media.maps import encode_depth
from mico_chat.media.medium import Audio, Depth, Image, MediaReport, Medium, Normal, Pages, Video
from mico_chat.media.taught import TaughtName
from mico_chat.messages import Message
from mico_chat.reading.speech import Listening
from mico_chat.wire import (
    Estimate,
    ExplainedMedium,
    ExplainedPart,
    ExplainedWord,
    Explanation,
    FinishReason,
    Progress,
    TokenLogprob,
    Usage,
)
from tests.support.waiting import until_it


class FakeDecoder:
    """Decodes anything but missing files, empty ones, and the text ``broken``."""

    def __init__(self) -> None:
        self.decoded: list[tuple[Kind, str]] = []
        self.depth_scales: list[float] = []

    def decode(self, file: MediaFile) -> Medium:
        data = file.read()
        if data == b"broken":
            raise MediaError(file.name, f"not a {file.kind}")
        self.decoded.append((file.kind, file.name))
        self.depth_scales.append(file.depth_scale)
        return medium(file.kind, file.name, len(data))


def medium(kind: Kind, name: str = "x", size: int = 1) -> Medium:
    report = MediaReport(name=name, kind=kind, bytes=size)
    pixels = np.zeros((2, 3, 3), np.uint8)
    if kind == "audio":
        return Audio(np.zeros(16, np.float32), report=report)
    if kind == "video":
        return Video(pixels[None], np.zeros(1), report=report)
    if kind == "depth":
        return Depth(np.ones((2, 3), np.float32), report=report)
    if TABLE[kind].made_of:
        return Pages(kind, (Image(pixels),), report=report)
    return (Image if kind == "image" else Normal)(pixels, report=report)


class FakeListener:
    """Hears the sentence ``said`` in every recording, and notes how it was asked to listen."""

    languages = frozenset({"en", "de"})

    def __init__(self, *said: str) -> None:
        self.said = said
        self.asked: list[Listening] = []

    def in_words(self, language: str) -> str:
        return {"en": "english", "de": "german"}[language]

    def segments(self, samples: Any, how: Listening) -> tuple[Iterator[Any], str]:
        self.asked.append(how)
        return map(self._segment, range(len(self.said))), how.language or "en"

    def _segment(self, number: int) -> Any:
        text, start = f" {self.said[number]}", 61.5 * number
        words = [
            SimpleNamespace(word=f" {word}", start=start, end=start + 1) for word in text.split()
        ]
        return SimpleNamespace(
            **{"id": number + 1, "seek": 0, "start": start, "end": start + 1.25, "text": text},
            **{"tokens": [1, 2], "temperature": 0.0, "avg_logprob": -0.25},
            **{"compression_ratio": 1.1, "no_speech_prob": 0.01, "words": words},
        )


class FakeEar:
    """The parts of a media encoder that listen and that estimate depth: a wall, 2 m away.

    Without a listener it cannot listen, and with no ``depths`` not estimate.
    """

    check_estimates: Any = MediaEncoder.check_estimates
    adapter = SimpleNamespace(input_modalities=())
    busy_s = 0.0

    def __init__(self, decoder: Decoder, listener: FakeListener | None) -> None:
        self._decoder = decoder
        self.depths: Any = None
        self.reader = None if listener is None else SimpleNamespace(listener=listener)

    async def estimated(self, picture: MediaFile | Medium, *, tenant: str = "") -> MediaFile:
        self.check_estimates()
        if isinstance(picture, MediaFile):
            self._decoder.decode(picture)
        data = encode_depth(np.full((4, 6), 2.0), "metre", self.depths.name)
        return MediaFile("depth", data, f"depth of {picture.name}.png")

    def give_up(self, reason: str) -> None:
        """Nothing waits here."""

    async def listened(self, file: MediaFile, listen: Callable[..., Any], *, tenant: str) -> Any:
        medium = self._decoder.decode(file)
        return await asyncio.to_thread(listen, medium, threading.Event())


WALL = SimpleNamespace(name="fake-depth")
"""An estimator's name is all that a :class:`FakeEar` needs of it."""


class FakeEngine:
    """An engine that has statistics and no model."""

    name = "fake"
    max_position = 1000
    repeats = True
    scores = False
    failure: str | None = None
    busy_s = 0.0

    def generate(self, prompt: Prompt, options: GenerationOptions) -> AsyncGenerator[Delta, None]:
        raise AssertionError("a fake assistant needs no engine for its words")

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def give_up(self, reason: str) -> None:
        self.failure = reason

    def stats(self) -> EngineStats:
        fields = EngineStats.model_fields
        return EngineStats.model_validate(dict.fromkeys(fields, 0))

    def close(self) -> None:
        """There is nothing to end."""


EXPLAINED = Explanation(
    words=(ExplainedWord(text="fake", logprob=-0.5, effects=(2.0,), medium=0),),
    media=(
        ExplainedMedium(
            effect=2.0,
            share=1.0,
            parts=(ExplainedPart(what="tile", effect=1.5, box=(0.0, 0.0, 0.25, 0.25)),),
        ),
    ),
    logprob=-0.5,
    without_media=-2.5,
    same_without_media=False,
)
"""Of an answer about a picture."""


class FakeAssistant(Assistant):
    """Answers with the names of the media and the question; refuses a question with ``refuse``.

    Each answer counts as 2 tokens, so that ``max_tokens`` of 2 is its limit. The confidence of an
    answer about media is 0.25 if the question has a ``perhaps``, or else 0.75. A question with a
    ``ponder`` is thought about first. One with a ``slowly`` waits before its first word as if its
    prompt were long, and its explanation likewise, until answers may go on.

    ``asked`` has the messages of every request, their media decoded. ``started`` is released once
    for each request. With a ``gate`` no request is answered before the gate is set. With
    ``halfway`` no answer goes on after its first word before ``halfway`` is set. ``allowed`` gives
    how many words an answer may have by now. ``cancelled`` is set when a request is given up while
    one of them holds its answer.
    """

    def __init__(
        self,
        gate: threading.Event | None = None,
        halfway: threading.Event | None = None,
        allowed: Callable[[], float] = lambda: math.inf,
        decoder: Decoder | None = None,
        listener: FakeListener | None = None,
    ) -> None:
        self.name, self.notes = "fake", ()
        self.reads = KINDS
        self.similarity = None
        self.defaults = GenerationOptions()
        self.system_prompt = None
        self.marks = None
        self.engine = FakeEngine()
        self.decoder: Any = decoder or FakeDecoder()
        self.encoder: Any = FakeEar(self.decoder, listener)
        self.batches: list[int] = []
        self.options: list[GenerationOptions] = []
        self.asked: list[list[Message]] = []
        self.tenants: list[str] = []
        self.explained: list[tuple[list[Message], str | Sequence[int], str]] = []
        self.read: list[bool] = []
        self.started = threading.Semaphore(0)
        self.cancelled = threading.Event()
        self.closed = False
        self.gate = gate
        self.halfway = halfway
        self.allowed = allowed

    @property
    def input_modalities(self) -> tuple[Kind, ...]:
        return self.reads

    @property
    def context_cache(self) -> CacheStats:
        return ContextCache(0).stats()

    @property
    def space(self) -> str:
        return "fake"

    async def ids_of(self, name: str, tenant: str = "") -> tuple[int, ...]:
        return (1,)

    async def taught(self, name: str, media: Sequence[Any], tenant: str = "") -> TaughtName:
        decode_media([Message.user(*media)], self.decoder)
        examples = np.full((len(media), 2), 0.5, np.float32)
        return TaughtName(name, media[0].kind, examples, (1,))

    async def _with_room(self, ask: Ask) -> Ask:
        return ask  # it has no context that could be full

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        options = ask.options
        self.options.append(options)
        self.tenants.append(ask.tenant)
        self.started.release()
        await self._wait_until(lambda: self.gate is None or self.gate.is_set())
        decoded = decode_media((await self.shown(ask)).messages, self.decoder)
        self.asked.append(decoded)
        question = decoded[-1].text
        await self._slowly(question, "prompt")
        if "refuse" in question:
            raise RequestError("refused")
        if "crash" in question:
            raise ZeroDivisionError("secret")
        reports = _reports(decoded)
        for report in reports:
            if report.kind not in self.reads:
                raise RequestError(f"{self.name} cannot read {report.name}", report.kind)
        yield reports
        shown = ", ".join(f"{report.kind} {Path(report.name).name}" for report in reports)
        # Words with the space behind them: together they are the text.
        words = re.findall(r"[^ ]+ ?| ", f"[{shown}] {question}")
        said = TokenLogprob(token="[", token_id=1, logprob=-0.5)
        for index in range(options.n):
            if "ponder" in question:
                yield Delta(index=index, reasoning_content="Hm.")
            for number, word in enumerate(words):
                await self._wait_until(partial(self._may_say, number))
                logprobs = () if options.logprobs is None or number else (said,)
                yield Delta(index=index, text=word, logprobs=logprobs)
                yield Delta(index=index)  # a token that makes no text certain
                await self._wait_until(lambda: self.halfway is None or self.halfway.is_set())
            last = index == options.n - 1
            tokens = {"prompt_tokens": 10, "completion_tokens": 2, "media_tokens": len(reports)}
            usage = Usage(**tokens, pages_sent=pages_sent(reports))
            end: FinishReason = "length" if options.max_tokens == 2 else "stop"
            mean = math.log(0.25 if "perhaps" in question else 0.75) if reports else None
            delta = Delta(
                index=index,
                avg_logprob=mean,
                explanation=EXPLAINED if options.explain else None,
                finish_reason=end,
                usage=usage if last else None,
            )
            if self.marks is not None and delta.confidence is not None:
                unsure = self.marks.unsure("", delta.confidence)
                delta = delta.model_copy(update={"unsure": unsure})
            yield delta

    async def explain(self, ask: Ask, answer: str | Sequence[int]) -> Explanation:
        self.explained.append((decode_media(ask.messages, self.decoder), answer, ask.tenant))
        await self._slowly(ask.messages[-1].text, "explain")
        if not any(message.media for message in ask.messages):
            raise RequestError("explain: no medium")
        return EXPLAINED

    async def estimate(self, ask: Ask, *, read: bool = True) -> Estimate:
        options = ask.options
        self.read.append(read)
        reports = _reports(decode_media((await self.shown(ask)).messages, self.decoder))
        return Estimate(
            prompt_tokens=10,
            media_tokens=len(reports),
            max_tokens=options.max_tokens,
            context_length=self.engine.max_position,
            fits=10 + options.max_tokens <= self.engine.max_position,
            media=reports,
        )

    async def _slowly(self, question: str, what: Any) -> None:
        note = NOTE.get()

        def may_go_on() -> bool:
            if note is not None:
                note(Progress(what=what, done=512, total=4100))
            return self._may_say(0) and (self.halfway is None or self.halfway.is_set())

        if "slowly" in question:
            await self._wait_until(may_go_on)

    def _may_say(self, number: int) -> bool:
        return self.allowed() > number

    async def _wait_until(self, open_: Callable[[], bool]) -> None:
        try:
            await until_it(open_)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def try_all(self, batch: Any, options: GenerationOptions, *, tenant: str = "") -> Any:
        self.batches.append(len(batch))
        return super().try_all(batch, options, tenant=tenant)

    def close(self) -> None:
        self.closed = True


def _reports(messages: Sequence[Message]) -> tuple[MediaReport, ...]:
    media = [medium for message in messages for medium in message.media]
    return tuple(m.report for m in media if not isinstance(m, MediaFile))

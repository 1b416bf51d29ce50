"""What the service costs over the engine: an assistant in this process against real HTTP.

Both run the same model in llama.cpp, and take turns: while one is measured the other is idle. The
service is ``mico-chat serve`` in a process of its own, asked over loopback by a client in this one,
whose work counts as the service's.
"""

import asyncio
import base64
import io
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.http_client import Connection, address_of, form_request, request
from benchmarks.systems import table
from mico_chat.assistant import Assistant
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.media import MediaFile
from mico_chat.messages import Message

N_TOKENS = 64
AT_ONCE = 16
REST_S = 1.2
"""Seconds before a question. The service looks at the last second for busy neighbours, and this
process has drawn a picture, or answered in its turn."""
BASE = "in process"


@dataclass(frozen=True)
class Asked:
    text: str
    picture: bytes | None = None
    n_tokens: int = N_TOKENS


class InProcess:
    name = BASE
    stream = True

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    async def ask(self, asked: Asked) -> tuple[float, int]:
        """Seconds to the first text of an answer, and its tokens; the answer is read to its end."""
        shown = () if asked.picture is None else (MediaFile("image", asked.picture),)
        messages = [Message.user(*shown, asked.text)]
        start, first, tokens = time.perf_counter(), 0.0, 0
        options = GenerationOptions(max_tokens=asked.n_tokens)
        async with aclosing(self._assistant.stream(messages, options)) as items:
            async for item in items:
                if isinstance(item, Delta) and item.text and not first:
                    first = time.perf_counter() - start
                if isinstance(item, Delta) and item.usage is not None:
                    tokens = item.usage.completion_tokens
        return first, tokens


@dataclass(frozen=True)
class OverHttp:
    """A route of the service, in a stream or whole; connections are open beforehand."""

    address: tuple[str, int]
    model: str
    chat: bool
    stream: bool
    store: bool = False

    @property
    def name(self) -> str:
        path = "/v1/chat" if self.chat else "/v1/chat/completions"
        return f"{path}, {'SSE' if self.stream else 'JSON'}{', stored' if self.store else ''}"

    async def ask(self, asked: Asked) -> tuple[float, int]:
        """Seconds to the first text of an answer, and its tokens; the answer is read to its end."""
        sent = self._request(asked)
        with closing(await Connection.open(self.address)) as connection:
            start, first = time.perf_counter(), 0.0
            await connection.send(sent)
            head = await connection.head()
            if self.stream:
                async with aclosing(connection.pieces(head)) as pieces:
                    async for piece in pieces:
                        # In OpenAI's format the first event has a role and no text.
                        says = b'"content":' in piece and b'"content":""' not in piece
                        if b"event: delta" in piece or says:
                            first = time.perf_counter() - start
                            break
                body = piece + await connection.rest()
            else:
                body = await connection.body(head)
        _, _, counted = body.rpartition(b'"completion_tokens":')
        return first, int(counted.partition(b",")[0])

    def _request(self, asked: Asked) -> bytes:
        # A user of its own finds nothing computed that another way has asked.
        headers = {"x-mico-user": f"{self.chat:d}{self.stream:d}{self.store:d}"}
        if self.chat:
            fields = {"message": asked.text, "max_tokens": asked.n_tokens}
            fields |= {"stream": self.stream, "store": self.store}
            shown = [] if asked.picture is None else [("image", ("a.jpg", asked.picture))]
            return form_request("/v1/chat", fields, shown, headers)
        content: list[dict[str, Any]] = [{"type": "text", "text": asked.text}]
        if asked.picture is not None:
            uri = f"data:image/jpeg;base64,{base64.b64encode(asked.picture).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
        body: dict[str, Any] = {"model": self.model, "max_tokens": asked.n_tokens}
        body["messages"] = [{"role": "user", "content": content}]
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return request("POST", "/v1/chat/completions", json=body, headers=headers)


Way = InProcess | OverHttp


def measure(assistant: Assistant, url: str, repeats: int) -> tuple[dict[str, Any], str]:
    ways: list[Way] = [InProcess(assistant)]
    for stream in (True, False):
        for chat, store in ((True, False), (True, True), (False, False)):
            ways.append(OverHttp(address_of(url), assistant.name, chat, stream, store))
    # A first token is soon there, and its time scatters: many for one round of the rest.
    n = 10 * repeats
    streaming = [way for way in ways if way.stream]
    texts = asyncio.run(first_tokens(streaming, n, pictures=False))
    pictures = asyncio.run(first_tokens(streaming, n, pictures=True))
    speeds = asyncio.run(rates(ways, repeats))

    def more(seconds: dict[str, list[float]], name: str) -> str:
        """Median milliseconds, and how many more than in process."""
        if name not in seconds:
            return ""
        value, base = (1e3 * statistics.median(seconds[way]) for way in (name, BASE))
        return f"{value:.1f}" if name == BASE else f"{value:.1f} ({value - base:+.1f})"

    base = statistics.median(speeds[BASE])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [
        [name, more(texts, name), more(pictures, name), f"{rate:.0f}", f"{rate / base:.3f}"]
        for name, rate in medians.items()
    ]
    head = ["way", "first text, ms", "with a picture, ms", "tokens/s", "of in process"]
    return {"first": texts, "picture": pictures, "rate": speeds}, (
        "## The service over the engine\n\n"
        "An assistant in the benchmark's own process against `mico-chat serve` over loopback HTTP, "
        f"in turns. First text: medians of {n} questions, one at a time, that share no beginning; "
        f"with a picture of 200 kB that was never shown. Tokens/s: {AT_ONCE} answers of at most "
        f"{N_TOKENS} tokens at once, median of {repeats} rounds.\n\n{table(head, rows)}"
    )


async def first_tokens(
    ways: Sequence[Way], repeats: int, *, pictures: bool
) -> dict[str, list[float]]:
    """Seconds to the first text, one request at a time, each way in turn."""
    rng = random.Random(pictures)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 2):  # the first ones warm up
        for way in rng.sample(list(ways), len(ways)):
            picture = noisy_picture(rng.randrange(2**31)) if pictures else None
            await asyncio.sleep(REST_S)
            value, _ = await way.ask(Asked(question(rng), picture, n_tokens=4))
            if repeat > 1:
                seconds[way.name].append(value)
    return seconds


async def rates(ways: Sequence[Way], repeats: int) -> dict[str, list[float]]:
    """Tokens/s of answers at once, each way in turn: in a round all get the same questions."""
    rng = random.Random(1)
    rate: dict[str, list[float]] = {way.name: [] for way in ways}
    for repeat in range(repeats + 1):
        questions = [question(rng) for _ in range(AT_ONCE)]
        for way in rng.sample(list(ways), len(ways)):
            start = time.perf_counter()
            answers = await asyncio.gather(*(way.ask(Asked(text)) for text in questions))
            if repeat:
                tokens = sum(n for _, n in answers)
                rate[way.name].append(tokens / (time.perf_counter() - start))
            await asyncio.sleep(0.05)
    return rate


def question(rng: random.Random) -> str:
    """No two begin alike; the mini's answer is one of its longest."""
    return f"{rng.getrandbits(32):x}: explain how a computer works, step by step."


def noisy_picture(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(96, 160, (480, 640, 3)) + rng.integers(-90, 90, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()

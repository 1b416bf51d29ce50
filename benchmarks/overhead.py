"""What the service costs over the engine: an assistant in this process against real HTTP.

Both run the same model in llama.cpp, and take turns: while one is measured the other is idle. The
service is ``mico-chat serve`` in a process of its own, asked over loopback by a client in this one,
whose work counts as the service's.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from benchmarks.http_client import (
    Connection,
    File,
    form_request,
    json_request,
)
from mico_chat.assistant import Assistant
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.media import MediaFile
from mico_chat.messages import Message

N_TOKENS = 64
AT_ONCE = 16
BASE = "in process"

_WORDS = (
    "river bridge fox garden winter lamp stone sailor market violin forest engine letter mountain "
    "paper kitchen horse island window baker train doctor castle ribbon shadow silver planet"
)


@dataclass(frozen=True)
class Asked:
    """A question, with or without a picture."""

    text: str
    picture: bytes | None = None
    n_tokens: int = N_TOKENS


class Way(Protocol):
    """A way to ask the model."""

    name: str

    async def first(self, asked: Asked) -> float:
        """Seconds to the first text of the answer."""
        ...

    async def tokens(self, asked: Asked) -> int:
        """Read the whole answer; how many tokens it has."""
        ...


class InProcess:
    """The assistant itself."""

    name = BASE

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    async def first(self, asked: Asked) -> float:
        start = time.perf_counter()
        found = 0.0
        async with aclosing(self._stream(asked)) as items:
            async for item in items:
                if not found and isinstance(item, Delta) and item.text:
                    found = time.perf_counter() - start
        return found

    async def tokens(self, asked: Asked) -> int:
        async with aclosing(self._stream(asked)) as items:
            async for item in items:
                if isinstance(item, Delta) and item.usage is not None:
                    return item.usage.completion_tokens
        raise AssertionError("an answer without its usage")

    def _stream(self, asked: Asked) -> Any:
        shown = () if asked.picture is None else (MediaFile("image", asked.picture),)
        options = GenerationOptions(max_tokens=asked.n_tokens)
        return self._assistant.stream([Message.user(*shown, asked.text)], options)


class OverHttp:
    """A route of the service, in a stream or whole; connections are open beforehand."""

    def __init__(
        self,
        address: tuple[str, int],
        model: str,
        *,
        chat: bool,
        stream: bool = True,
        store: bool = False,
    ) -> None:
        path = "/v1/chat" if chat else "/v1/chat/completions"
        how = "SSE" if stream else "JSON"
        self.name = f"{path}, {how}{', stored' if store else ''}"
        self._address, self._model = address, model
        self._chat, self._stream, self._store = chat, stream, store
        # A user of its own finds nothing computed that another way has asked.
        self._headers = {"x-mico-user": f"{chat:d}{stream:d}{store:d}"}

    async def first(self, asked: Asked) -> float:
        sent = self._request(asked)
        with closing(await Connection.open(self._address)) as connection:
            start = time.perf_counter()
            found = 0.0
            await connection.send(sent)
            async for name, data in connection.events(await connection.head()):
                if not found and (name == "delta" or _says(data)):
                    found = time.perf_counter() - start
            return found

    async def tokens(self, asked: Asked) -> int:
        sent = self._request(asked)
        with closing(await Connection.open(self._address)) as connection:
            await connection.send(sent)
            head = await connection.head()
            body = await (connection.rest() if self._stream else connection.body(head))
        _, _, counted = body.rpartition(b'"completion_tokens":')
        return int(counted.partition(b",")[0])

    def _request(self, asked: Asked) -> bytes:
        if self._chat:
            fields = {"message": asked.text, "max_tokens": asked.n_tokens}
            fields |= {"stream": self._stream, "store": self._store}
            shown = [] if asked.picture is None else [File("image", "a.jpg", asked.picture)]
            return form_request("/v1/chat", fields, shown, self._headers)
        content: list[dict[str, Any]] = [{"type": "text", "text": asked.text}]
        if asked.picture is not None:
            uri = f"data:image/jpeg;base64,{base64.b64encode(asked.picture).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
        body: dict[str, Any] = {"model": self._model, "max_tokens": asked.n_tokens}
        body["messages"] = [{"role": "user", "content": content}]
        if self._stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json_request("/v1/chat/completions", body, self._headers)


def ways(assistant: Assistant, address: tuple[str, int]) -> list[Way]:
    """All that are compared; the first one is what the others are compared with."""
    model = assistant.name
    return [
        InProcess(assistant),
        OverHttp(address, model, chat=True),
        OverHttp(address, model, chat=True, store=True),
        OverHttp(address, model, chat=False),
        OverHttp(address, model, chat=True, stream=False),
        OverHttp(address, model, chat=True, stream=False, store=True),
        OverHttp(address, model, chat=False, stream=False),
    ]


async def first_tokens(
    found: Sequence[Way], repeats: int, *, pictures: bool
) -> dict[str, list[float]]:
    """Seconds to the first text, one request at a time, each way in turn."""
    streaming = [way for way in found if "JSON" not in way.name]
    rng = random.Random(pictures)
    seconds: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 2):  # the first ones warm up
        for way in rng.sample(streaming, len(streaming)):
            picture = noisy_picture(rng.randrange(2**31)) if pictures else None
            asked = Asked(_question(rng), picture, n_tokens=4)
            value = await way.first(asked)
            if repeat > 1:
                seconds[way.name].append(value)
            await asyncio.sleep(0.02)  # what is left to do after an answer is another's no more
    return {way.name: seconds[way.name] for way in streaming}


async def rates(found: Sequence[Way], repeats: int) -> dict[str, list[float]]:
    """Tokens/s of answers at once, each way in turn: in a round all get the same questions."""
    rng = random.Random(1)
    rate: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        questions = [_question(rng) for _ in range(AT_ONCE)]
        for way in rng.sample(list(found), len(found)):
            start = time.perf_counter()
            counts = await asyncio.gather(*(way.tokens(Asked(text)) for text in questions))
            if repeat:
                rate[way.name].append(sum(counts) / (time.perf_counter() - start))
            await asyncio.sleep(0.05)
    return {way.name: rate[way.name] for way in found}


def _says(chunk: bytes) -> bool:
    """Whether a chunk in OpenAI's format has text; the first one names the role alone."""
    return b'"content":' in chunk and b'"content":""' not in chunk


def _question(rng: random.Random) -> str:
    """Some words first, so that no two questions begin alike; the mini's answer is a long one."""
    words = " ".join(rng.choices(_WORDS.split(), k=6))
    return f"{words}: write the alphabet ten times."


def noisy_picture(seed: int) -> bytes:
    """A JPEG of about 200 kB."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(96, 160, (480, 640, 3)) + rng.integers(-90, 90, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=93)
    return file.getvalue()

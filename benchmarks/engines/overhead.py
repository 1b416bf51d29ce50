"""What the service costs over the engine: an assistant in this process against real HTTP.

Both run the same model in llama.cpp, and take turns: while one is measured the other is idle. The
service is ``mico-chat serve`` in a process of its own, asked over loopback by a client in this one,
whose work counts as the service's.
"""

import asyncio
import base64
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from benchmarks.harness import Ratio, Report, medians, turns
from benchmarks.http_client import Connection, address_of, form_request, request
from benchmarks.media import noisy_picture
from mico_chat.ask import Ask
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
        async with aclosing(self._assistant.stream(Ask(messages, options))) as items:
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


def measure(assistant: Assistant, url: str, repeats: int) -> Report:
    ways: list[InProcess | OverHttp] = [InProcess(assistant)]
    for stream in (True, False):
        for chat, store in ((True, False), (True, True), (False, False)):
            ways.append(OverHttp(address_of(url), assistant.name, chat, stream, store))
    # A first token is soon there, and its time scatters: many for one round of the rest.
    n = 10 * repeats
    streaming = [way for way in ways if way.stream]
    texts, pictures = (medians(first_tokens(streaming, n, pictures=p)) for p in (False, True))
    speeds = medians(rates(ways, repeats))

    def more(ms: dict[str, float], name: str) -> str:
        """Milliseconds, and how many more than in process."""
        if name == BASE:
            return f"{ms[name]:.1f}"
        return f"{ms[name]:.1f} ({ms[name] - ms[BASE]:+.1f})" if name in ms else ""

    rows = [
        [name, more(texts, name), more(pictures, name), f"{rate:.0f}", f"{rate / speeds[BASE]:.3f}"]
        for name, rate in speeds.items()
    ]
    ratios = []
    for ms, what in ((texts, "first text"), (pictures, "first text about a picture")):
        later = max(value for way, value in ms.items() if way != BASE) - ms[BASE]
        measure = f"{what} over HTTP, later than in process"
        ratios.append(Ratio.bound(measure, later, "ms", 5.0))
    base = speeds.pop(BASE)
    slowest = min(speeds.values())
    ratios.append(Ratio.beside_of("16 answers over HTTP", slowest, "tokens/s", BASE, base, 0.95))
    return Report({"rows": rows, "at_once": AT_ONCE, "n_tokens": N_TOKENS}, ratios)


def first_tokens(
    ways: Sequence[InProcess | OverHttp], repeats: int, *, pictures: bool
) -> dict[str, list[float]]:
    """Milliseconds to the first text, one request at a time, each way in turn."""
    rng = random.Random(pictures)

    async def first(way: InProcess | OverHttp) -> float:
        picture = noisy_picture(rng.randrange(2**31)) if pictures else None
        await asyncio.sleep(REST_S)
        seconds, _ = await way.ask(Asked(question(rng), picture, n_tokens=4))
        return 1e3 * seconds

    asked = {way.name: lambda way=way: asyncio.run(first(way)) for way in ways}
    return turns(asked, repeats, warm=2, rng=rng)


def rates(ways: Sequence[InProcess | OverHttp], repeats: int) -> dict[str, list[float]]:
    """Tokens/s of answers at once, each way in turn: in a round all get the same questions."""

    def rate(way: InProcess | OverHttp, number: Iterator[int]) -> float:
        rng = random.Random(next(number))
        seconds, tokens = together(way, [Asked(question(rng)) for _ in range(AT_ONCE)])
        time.sleep(0.05)
        return tokens / seconds

    asked = {way.name: partial(rate, way, count(1)) for way in ways}
    return turns(asked, repeats, rng=random.Random(1))


def together(way: InProcess | OverHttp, questions: Sequence[Asked]) -> tuple[float, int]:
    """Ask all at once: seconds until all answers were there, and their tokens."""

    async def all_of_them() -> tuple[float, int]:
        start = time.perf_counter()
        answers = await asyncio.gather(*map(way.ask, questions))
        return time.perf_counter() - start, sum(tokens for _, tokens in answers)

    return asyncio.run(all_of_them())


def question(rng: random.Random) -> str:
    """No two begin alike; the mini's answer is one of its longest."""
    return f"{rng.getrandbits(32):x}: explain how a computer works, step by step."

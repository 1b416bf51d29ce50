"""The systems that are raced: this project's engines, and what one would write without them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from mico_chat.assistant import Assistant, decode_media
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message


@dataclass(frozen=True)
class Question:
    """Media (kind, file) and a text; exactly ``n_tokens`` are generated."""

    text: str
    media: tuple[tuple[str, Path], ...] = ()
    n_tokens: int = 32

    @property
    def messages(self) -> list[Message]:
        """As a conversation."""
        parts = [MediaFile(kind, path) for kind, path in self.media]  # type: ignore[arg-type]
        return [Message.user(*parts, self.text)]


class System(Protocol):
    """Something that answers; it yields once for each token."""

    name: str
    takes_media: bool

    def answer(self, question: Question) -> AsyncIterator[None]: ...


class Continues(Protocol):
    """Something that continues token ids; it yields once for each of the ``n`` tokens."""

    name: str

    def tokens(self, ids: Sequence[int], n: int) -> AsyncIterator[None]: ...


class Ours:
    """An assistant over one of the engines, made so that it does not stop at an end token."""

    takes_media = True

    def __init__(self, engine: Engine, chat: Any, processor: Any, decoder: Any) -> None:
        self.name = engine.name
        self.decoder = decoder
        self.engine = engine
        self.assistant = Assistant(
            engine, MediaEncoder(chat, processor, decoder), processor, name="mini"
        )

    async def tokens(self, ids: Sequence[int], n: int) -> AsyncGenerator[None, None]:
        """Continue token ids by ``n`` tokens, none of which are computed already."""
        prompt = Prompt((tuple(ids),), str(time.time_ns()))
        options = GenerationOptions(max_tokens=n)
        async with aclosing(self.engine.generate(prompt, options)) as deltas:
            async for _ in deltas:
                yield

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
        options = GenerationOptions(max_tokens=question.n_tokens)
        async with aclosing(self.assistant.stream(question.messages, options)) as deltas:
            async for delta in deltas:
                if isinstance(delta, Delta):
                    yield

    def close(self) -> None:
        """End engine and encoder."""
        self.assistant.close()

    def settle(self) -> None:
        """Wait until nothing runs."""
        while (stats := self.assistant.engine.stats()).running or stats.waiting:
            time.sleep(0.01)

    def counts(self) -> dict[str, int]:
        """Slots, sequences and bytes that are taken."""
        stats, cache = self.assistant.engine.stats(), self.assistant.context_cache
        return {
            "running": stats.running,
            "waiting": stats.waiting,
            "cached media": cache.entries,
            "cached bytes": cache.bytes,
        }


class PlainTransformers:
    """Hugging Face's ``generate``, one request after the other, every medium encoded anew."""

    name = "transformers generate"
    takes_media = True

    def __init__(self, chat: Any, processor: Any, decoder: MediaDecoder) -> None:
        self._chat, self._processor, self._decoder = chat, processor, decoder
        self.llm = chat.llm
        self._lock = threading.Lock()

    async def answer(self, question: Question) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[bool] = asyncio.Queue()

        class Streamer:
            """Told of every token."""

            def put(self, value: Any) -> None:
                if value.numel():  # the prompt comes first, and as vectors it has no ids
                    loop.call_soon_threadsafe(steps.put_nowait, True)

            def end(self) -> None:
                loop.call_soon_threadsafe(steps.put_nowait, False)

        work = asyncio.create_task(asyncio.to_thread(self._generate, question, Streamer()))
        for _ in range(question.n_tokens):
            await steps.get()
            yield
        await work

    def _generate(self, question: Question, streamer: Any) -> None:
        import torch

        with self._lock, torch.inference_mode():
            conversation = decode_media(question.messages, self._decoder)
            inputs = self._processor([conversation])
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self._chat.dtype)
            n = question.n_tokens
            self._chat.generate(
                **inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=streamer
            )


class LlamaCppServer:
    """llama-cpp-python's own server on the same GGUF file, over HTTP; text alone."""

    name = "llama-cpp-python server"
    takes_media = False

    def __init__(self, url: str) -> None:
        import httpx

        self._client = httpx.AsyncClient(base_url=url, timeout=600, trust_env=False)

    async def answer(self, question: Question) -> AsyncIterator[None]:
        body = {
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": question.n_tokens,
            "temperature": 0,
            "stream": True,
        }
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"content"' in line:
                    yield


@contextmanager
def llama_cpp_server(file: Path, port: int, threads: int) -> Iterator[str]:
    """Starts llama-cpp-python's server; its URL."""
    import httpx

    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "2048"]
    command += ["--port", str(port), "--n_threads", str(threads), "--flash_attn", "true"]
    command += ["--interrupt_requests", "false"]  # else a new request ends the one before it
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                httpx.get(f"{url}/v1/models", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Timing:
    """Seconds to the first token, between tokens, and altogether."""

    first: float
    steps: tuple[float, ...]

    @property
    def total(self) -> float:
        """From the question to the last token."""
        return self.first + sum(self.steps)


async def timed(system: System, question: Question) -> Timing:
    """Ask one question."""
    times = [time.perf_counter()]
    async for _ in system.answer(question):
        times.append(time.perf_counter())
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(gaps[0], tuple(gaps[1:]))


async def together(system: System, questions: list[Question]) -> tuple[list[Timing], float]:
    """Ask questions at once; their timings, and the seconds until all are answered."""
    start = time.perf_counter()
    timings = await asyncio.gather(*(timed(system, question) for question in questions))
    return list(timings), time.perf_counter() - start

"""The systems that are raced, the questions they are asked, and the media shown to them."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import av
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.assistant import Assistant, decode_media
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt
from mico_chat.engine.cpu import processor, usable_cores
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message

END_S = 60.0
"""Seconds that vLLM's process may take to end before it is killed."""


def machine(*packages: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    python = platform.python_version()
    return f"{processor()[0]}, {usable_cores()} cores; Python {python}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@dataclass(frozen=True)
class Question:
    """Media (kind, file) and a text; exactly ``n_tokens`` are generated."""

    text: str
    media: tuple[tuple[str, Path], ...] = ()
    n_tokens: int = 32

    @property
    def messages(self) -> list[Message]:
        parts = [MediaFile(kind, path) for kind, path in self.media]  # type: ignore[arg-type]
        return [Message.user(*parts, self.text)]


def draw(kind: str, folder: Path, seed: int) -> tuple[str, Path]:
    """A new medium for a question: media of two seeds have different bytes."""
    path = folder / f"{kind}-{seed}{SUFFIXES[kind]}"
    if kind == "video":
        clip(path, seed)
    elif kind == "audio":
        from scipy.io import wavfile

        rng = np.random.default_rng(seed)
        at = np.arange(3 * 16_000) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * rng.uniform(200, 2000) * at)
        wave += 0.02 * rng.standard_normal(len(at))
        wavfile.write(path, 16_000, (wave * 32_767).astype(np.int16))
    else:
        Image.fromarray(_scene(seed, 0.0)).save(path, quality=90)
    return kind, path


SUFFIXES = {"image": ".jpg", "video": ".mp4", "audio": ".wav"}


def clip(path: Path, seed: int, seconds: float = 4.0, rate: int = 10) -> Path:
    """An MP4 of 640 x 480 in which a disc wanders to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for frame in range(int(seconds * rate)):
            pixels = _scene(seed, frame / (seconds * rate))
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def _scene(seed: int, shift: float) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.7)
    ground, disc = rng.integers(0, 256, (2, 3))
    rows, columns = np.mgrid[0:480, 0:640]
    inside = (columns / 640 - x - 0.4 * shift) ** 2 + (rows / 480 - y) ** 2 < 0.02
    shade = 0.6 + 0.4 * rows[..., None] / 480
    pixels: NDArray[np.uint8] = np.where(inside[..., None], disc, ground * shade).astype(np.uint8)
    return pixels


async def timed(system: System, question: Question) -> list[float]:
    """Seconds to the first token, and from each token to the next."""
    times = [time.perf_counter()]
    async for _ in system.answer(question):
        times.append(time.perf_counter())
    return [after - before for before, after in pairwise(times)]


class System(Protocol):
    """A system that answers questions; it yields once for each token."""

    name: str
    takes_media: bool

    def answer(self, question: Question) -> AsyncIterator[None]: ...


class Ours:
    """An assistant over one of this project's engines, which no end token stops."""

    takes_media = True

    def __init__(self, engine: Engine, chat: Any, processor: Any, decoder: MediaDecoder) -> None:
        from mico_chat.encode import MediaEncoder

        self.name, self.engine, self.decoder = engine.name, engine, decoder
        encoder = MediaEncoder(chat, processor, decoder)
        self.assistant = Assistant(engine, encoder, processor, name="mini")

    async def tokens(self, ids: Sequence[int], n: int) -> AsyncGenerator[None, None]:
        """Continue token ids, none of which are computed already, by ``n`` tokens."""
        prompt = Prompt((tuple(ids),), str(time.time_ns()))
        async with aclosing(self.engine.generate(prompt, GenerationOptions(max_tokens=n))) as items:
            async for _ in items:
                yield

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
        options = GenerationOptions(max_tokens=question.n_tokens)
        async with aclosing(self.assistant.stream(question.messages, options)) as items:
            async for item in items:
                if isinstance(item, Delta):
                    yield

    def close(self) -> None:
        self.assistant.close()


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
            inputs = self._processor([decode_media(question.messages, self._decoder)])
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
        self._client = httpx.AsyncClient(base_url=url, timeout=600, trust_env=False)

    @classmethod
    @contextmanager
    def started(cls, file: Path, port: int, threads: int) -> Iterator[LlamaCppServer]:
        options = {"model": file, "n_ctx": 2048, "port": port, "n_threads": threads}
        # Without the last of these a new request ends the one before it.
        options |= {"flash_attn": "true", "interrupt_requests": "false"}
        command = [sys.executable, "-m", "llama_cpp.server"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                try:
                    httpx.get(f"{url}/v1/models", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield cls(url)
        finally:
            process.terminate()
            process.wait()

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


def service(stack: ExitStack, *flags: str) -> str:
    """The URL of a ``mico-chat serve`` in llama.cpp, with data of its own, until the stack ends."""
    from mico_ui.local_server import local_server

    data = stack.enter_context(TemporaryDirectory())
    server = local_server(["--engine", "llamacpp", "--data-dir", data, *flags])
    address, _ = stack.enter_context(server)
    return address


class InVllm:
    """vLLM in a process of another Python, where it is installed.

    Between requests the process is stopped (SIGSTOP): vLLM's processes look for work all the time,
    and would be measured beside the other systems.
    """

    name = "vllm"
    takes_media = True

    def __init__(self, python: Path, model: str, arguments: str = "{}") -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        self._process = subprocess.Popen(
            [str(python), "-m", __name__, "--model", model, "--arguments", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # By itself vLLM leaves one core to its other processes; on two that is half of them.
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores},
            text=True,
            start_new_session=True,
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("vLLM's process has no pipes")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._numbers = itertools.count()
        self._asking: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[bool]]] = {}
        if not any(line == "ready\n" for line in self._stdout):
            raise RuntimeError(f"vLLM did not start; it ended with {self._process.wait()}")
        threading.Thread(target=self._read, daemon=True).start()
        self._signal(signal.SIGSTOP)

    def answer(self, question: Question) -> AsyncIterator[None]:
        media = [(kind, str(path.absolute())) for kind, path in question.media]
        return self._ask({"text": question.text, "media": media, "n": question.n_tokens})

    def tokens(self, ids: Sequence[int], n: int) -> AsyncIterator[None]:
        return self._ask({"ids": list(ids), "n": n})

    async def _ask(self, request: dict[str, Any]) -> AsyncGenerator[None, None]:
        number = next(self._numbers)
        steps: asyncio.Queue[bool] = asyncio.Queue()
        if not self._asking:
            self._signal(signal.SIGCONT)
        self._asking[number] = (asyncio.get_running_loop(), steps)
        try:
            self._stdin.write(json.dumps({**request, "id": number}) + "\n")
            self._stdin.flush()
            while await steps.get():
                yield
        finally:
            del self._asking[number]
            if not self._asking:
                self._signal(signal.SIGSTOP)

    def _read(self) -> None:
        for line in self._stdout:
            if not line.startswith("{"):
                continue
            item = json.loads(line)
            if (asking := self._asking.get(item["id"])) is not None:
                loop, steps = asking
                loop.call_soon_threadsafe(steps.put_nowait, item["more"])

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()


def main() -> None:
    """vLLM's process: answers the JSON lines of its standard input with a line for each token."""
    from mico_chat.checkpoints.load import load_encoder
    from mico_chat.checkpoints.pretrained import plain_llm
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_start import engine_arguments

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mini")
    parser.add_argument("--arguments", type=json.loads, default={}, help="vLLM's, as JSON")
    options = parser.parse_args()
    encoder, processor = load_encoder(options.model)
    given = {"max_model_len": 2048, **options.arguments}
    arguments = engine_arguments(plain_llm(options.model), given)

    def no_table(dtype: Any) -> Any:
        raise RuntimeError("the token table is for repetition penalties alone")

    with MediaDecoder(workers=2) as decoder:
        engine = VllmEngine(arguments, processor.tokenizer, (), table=no_table)
        with closing(Ours(engine, encoder, processor, decoder)) as system:
            print("ready", flush=True)
            asyncio.run(_serve(system))


async def _serve(system: Ours) -> None:
    async def one(request: dict[str, Any]) -> None:
        number, n = request["id"], request["n"]
        if "ids" in request:
            steps = system.tokens(request["ids"], n)
        else:
            media = tuple((kind, Path(path)) for kind, path in request["media"])
            steps = system.answer(Question(request["text"], media, n))
        async with aclosing(steps):
            async for _ in steps:
                print(json.dumps({"id": number, "more": True}), flush=True)
        print(json.dumps({"id": number, "more": False}), flush=True)

    async with asyncio.TaskGroup() as group:
        while line := await asyncio.to_thread(sys.stdin.readline):
            group.create_task(one(json.loads(line)))


if __name__ == "__main__":
    main()

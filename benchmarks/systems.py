"""The systems that are raced, the questions they are asked, and the media shown to them."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import httpx
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from scipy.io import wavfile

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant, decode_media
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt
from mico_chat.engine.cpu import processor, usable_cores
from mico_chat.errors import ConfigError
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message
from mico_ui.local_server import local_server

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where torch's systems compute; their loaders choose it too."""

END_S = 60.0
"""Seconds that vLLM's process may take to end before it is killed."""

STAMPS = "stamps "
"""The beginning of each line with which vLLM's process answers."""


def machine(*packages: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    python = platform.python_version()
    card = f", {torch.cuda.get_device_name()}" if DEVICE == "cuda" else ""
    return f"{processor()[0]}, {usable_cores()} cores{card}; Python {python}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def publish(text: str, name: str, folder: Path | None) -> None:
    """Print a report, and write it into a folder if there is one."""
    print(text, end="")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Question:
    """A text and media (kind, file), or token ids; ``n_tokens`` are generated, whatever they are.

    A system that stands behind HTTP takes texts alone.
    """

    text: str = ""
    media: Sequence[tuple[Kind, str]] = ()
    n_tokens: int = 32
    ids: Sequence[int] = ()
    seed: int | None = None

    @property
    def messages(self) -> list[Message]:
        parts = [MediaFile(kind, Path(path)) for kind, path in self.media]
        return [Message.user(*parts, self.text)]


def draw(kind: Kind, folder: Path, seed: int) -> tuple[Kind, str]:
    """A new medium for a question: media of two seeds have different bytes."""
    path = folder / f"{kind}-{seed}{SUFFIXES[kind]}"
    if kind == "video":
        clip(path, seed)
    elif kind == "audio":
        rng = np.random.default_rng(seed)
        at = np.arange(3 * 16_000) / 16_000
        wave = 0.4 * np.sin(2 * np.pi * rng.uniform(200, 2000) * at)
        wave += 0.02 * rng.standard_normal(len(at))
        wavfile.write(path, 16_000, (wave * 32_767).astype(np.int16))
    else:
        Image.fromarray(_scene(seed, 0.0)).save(path, quality=90)
    return kind, str(path.absolute())


SUFFIXES: dict[Kind, str] = {"image": ".jpg", "video": ".mp4", "audio": ".wav"}


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


Stamps = list[float]
"""When each token of an answer came, in seconds since the question."""


class System:
    """A system that answers questions."""

    name: str
    takes_media = True

    def answer(self, question: Question) -> AsyncGenerator[None, None]:
        """Yield once for each token."""
        raise NotImplementedError

    async def stamps(self, question: Question) -> Stamps:
        start = time.perf_counter()
        async with aclosing(self.answer(question)) as tokens:
            return [time.perf_counter() - start async for _ in tokens]

    def race(self, questions: Sequence[Question]) -> list[Stamps]:
        """Ask all questions at once."""

        async def all_of_them() -> list[Stamps]:
            return await asyncio.gather(*map(self.stamps, questions))

        return asyncio.run(all_of_them())


class Ours(System):
    """An assistant over one of this project's engines, which no end token stops."""

    def __init__(self, engine: Engine, chat: Any, processor: Any, decoder: MediaDecoder) -> None:
        self.name, self.engine, self.decoder = engine.name, engine, decoder
        encoder = MediaEncoder(MicoAdapter(chat, processor), decoder)
        self.assistant = Assistant(engine, encoder, name="mini")

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
        options = GenerationOptions(max_tokens=question.n_tokens, seed=question.seed)
        if question.ids:  # a salt of its own: no part of the prompt is computed already
            prompt = Prompt((tuple(question.ids),), str(time.time_ns()))
            items: AsyncGenerator[Any, None] = self.engine.generate(prompt, options)
        else:
            items = self.assistant.stream(question.messages, options)
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Delta):
                    yield


class PlainTransformers(System):
    """Hugging Face's ``generate``, one request after the other, every medium encoded anew."""

    name = "transformers generate"

    def __init__(self, chat: Any, processor: Any, decoder: MediaDecoder) -> None:
        self._chat, self._processor, self._decoder = chat, processor, decoder
        self.llm = chat.llm
        self._lock = threading.Lock()

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
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
        with self._lock, torch.inference_mode():
            inputs = self._processor([decode_media(question.messages, self._decoder)])
            inputs = inputs.to(self._chat.device)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self._chat.dtype)
            n = question.n_tokens
            self._chat.generate(
                **inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=streamer
            )


class LlamaCppServer(System):
    """llama-cpp-python's own server on the same GGUF file, over HTTP; text alone."""

    name = "llama-cpp-python server"
    takes_media = False

    def __init__(self, url: str) -> None:
        self._url = url

    @classmethod
    @contextmanager
    def started(cls, file: Path, port: int, threads: int) -> Iterator[LlamaCppServer]:
        options = {"model": file, "n_ctx": 2048, "port": port, "n_threads": threads}
        # Without interrupt_requests=false a new request ends the request before it.
        options |= {"flash_attn": "true", "interrupt_requests": "false"}
        command = [sys.executable, "-m", "llama_cpp.server"]
        command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    httpx.get(f"{url}/v1/models", trust_env=False).raise_for_status()
                    break
                except httpx.HTTPError:
                    if process.poll() is not None:
                        said = f"llama-cpp-python's server ended at once: {' '.join(command)}"
                        raise ConfigError(f"{said}; install llama-cpp-python[server]") from None
                    time.sleep(0.2)
            yield cls(url)
        finally:
            process.terminate()
            process.wait()

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
        body = {
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": question.n_tokens,
            "temperature": 0,
            "stream": True,
        }
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=600, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"content"' in line:
                    yield


def service(stack: ExitStack, *flags: str, engine: str = "llamacpp") -> str:
    """The URL of a ``mico-chat serve`` with data of its own, until the stack ends."""
    data = stack.enter_context(TemporaryDirectory())
    server = local_server(["--engine", engine, "--data-dir", data, *flags])
    address, _ = stack.enter_context(server)
    return address


class InVllm(System):
    """vLLM in a process of another Python, where it is installed.

    The process takes a line of questions as JSON and writes a line with their stamps. Between races
    it is stopped (SIGSTOP): vLLM's processes look for work all the time, which would slow the other
    systems down.
    """

    name = "vllm"

    def __init__(self, python: Path, model: str, arguments: str) -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        self._process = subprocess.Popen(
            [str(python), "-m", __name__, model, arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # vLLM leaves one core to its other processes: half of a machine with two cores.
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores},
            text=True,
            start_new_session=True,
        )
        self.version: str = self._next()  # once the model is loaded
        self._signal(signal.SIGSTOP)

    def race(self, questions: Sequence[Question]) -> list[Stamps]:
        self._signal(signal.SIGCONT)
        print(json.dumps([asdict(one) for one in questions]), file=self._process.stdin, flush=True)
        found: list[Stamps] = self._next()
        self._signal(signal.SIGSTOP)
        return found

    def _next(self) -> Any:
        """What the next line of ours says: libraries print other lines."""
        for line in self._process.stdout or ():
            if line.startswith(STAMPS):
                return json.loads(line.removeprefix(STAMPS))
        raise RuntimeError(f"vLLM's process ended with status {self._process.wait()}")

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        try:
            self._process.communicate(timeout=END_S)  # closes its standard input: it ends
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()


def main(model: str, arguments: str) -> None:
    """vLLM's process: races the questions of each line of its standard input."""
    import vllm

    from mico_chat.checkpoints.load import load_encoder
    from mico_chat.checkpoints.pretrained import plain_llm
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_start import engine_arguments

    encoder, processor = load_encoder(model)
    given = {"max_model_len": 2048, **json.loads(arguments)}
    vllm_arguments = engine_arguments(plain_llm(model), given)

    def no_table(dtype: Any) -> Any:
        raise RuntimeError("the token table is for repetition penalties alone")

    with MediaDecoder(workers=2) as decoder:
        engine = VllmEngine(vllm_arguments, processor.tokenizer, (), table=no_table)
        system = Ours(engine, encoder, processor, decoder)
        with closing(system.assistant):
            print(f"{STAMPS}{json.dumps(f'vllm {vllm.__version__}')}", flush=True)
            for line in sys.stdin:
                questions = [Question(**one) for one in json.loads(line)]
                print(f"{STAMPS}{json.dumps(system.race(questions))}", flush=True)


if __name__ == "__main__":
    typer.run(main)

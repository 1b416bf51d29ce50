"""The systems that are raced, and the questions they are asked."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.processes import program
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant, decode_media
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt
from mico_chat.late import late
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message

# What only vLLM's process needs.
with late():
    from mico_chat.checkpoints import load as loading
    from mico_chat.checkpoints import pretrained
    from mico_chat.engine import vllm as vllm_engine
    from mico_chat.engine import vllm_start

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where torch's systems compute; their loaders choose it too."""

END_S = 60.0
"""Seconds that vLLM's process may take to end before it is killed."""

STAMPS = "stamps "
"""The beginning of each line with which vLLM's process answers."""


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
        if question.ids:  # a tenant of its own: no part of the prompt is computed already
            prompt = Prompt((tuple(question.ids),), str(time.time_ns()))
            items: AsyncGenerator[Any, None] = self.engine.generate(prompt, options)
        else:
            items = self.assistant.stream(Ask(question.messages, options))
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
        words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        with program("-m", "llama_cpp.server", *words, ready=r"running on (http\S+)") as (_, url):
            yield cls(url)

    async def answer(self, question: Question) -> AsyncGenerator[None, None]:
        body = {"messages": [{"role": "user", "content": question.text}], "temperature": 0}
        body |= {"max_tokens": question.n_tokens, "stream": True}
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=600, trust_env=False) as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                if '"content"' in line:
                    yield


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


def run_vllm(model: str, arguments: str) -> None:
    """vLLM's process: it races the questions of each line of its standard input."""
    import vllm

    encoder, processor = loading.load_encoder(model)
    given = {"max_model_len": 4096 + 64, **json.loads(arguments)}
    vllm_arguments = vllm_start.engine_arguments(pretrained.plain_llm(model), given)

    def no_table(dtype: Any) -> Any:
        raise RuntimeError("the token table is for repetition penalties alone")

    with MediaDecoder(workers=2) as decoder:
        engine = vllm_engine.VllmEngine(vllm_arguments, processor.tokenizer, (), table=no_table)
        system = Ours(engine, encoder, processor, decoder)
        with closing(system.assistant):
            print(f"{STAMPS}{json.dumps(f'vllm {vllm.__version__}')}", flush=True)
            for line in sys.stdin:
                questions = [Question(**one) for one in json.loads(line)]
                print(f"{STAMPS}{json.dumps(system.race(questions))}", flush=True)


if __name__ == "__main__":
    run_vllm(*sys.argv[1:])

"""vLLM in a process of another Python, where it is installed; a system to race like the others.

    python -m benchmarks.vllm_process --model mini

is that process: it answers requests of its standard input, JSON lines, with a line for each token.
:class:`InVllm` starts it and asks it. Between requests it is stopped (SIGSTOP): vLLM's processes
look for work all the time, which the other systems would be measured beside.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

from benchmarks.systems import Ours, Question

END_S = 60.0
"""Seconds that the process may take to end before it is killed."""


class InVllm:
    """The process, from the asking side; :class:`benchmarks.systems.System`."""

    name = "vllm"
    takes_media = True

    def __init__(self, python: Path, model: str, arguments: str = "{}") -> None:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        # By itself vLLM leaves one core to its other processes; on two that is half of them.
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores}
        self._process = subprocess.Popen(
            [str(python), "-m", __name__, "--model", model, "--arguments", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._numbers = itertools.count()
        self._asking: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[bool]]] = {}
        assert self._process.stdout is not None
        if not any(line == "ready\n" for line in self._process.stdout):
            raise RuntimeError(f"vLLM did not start; it ended with {self._process.wait()}")
        threading.Thread(target=self._read, daemon=True).start()
        self._signal(signal.SIGSTOP)

    def answer(self, question: Question) -> AsyncIterator[None]:
        """See :class:`benchmarks.systems.System`."""
        media = [(kind, str(path.absolute())) for kind, path in question.media]
        return self._ask({"text": question.text, "media": media, "n": question.n_tokens})

    def tokens(self, ids: Sequence[int], n: int) -> AsyncIterator[None]:
        """Continue token ids by ``n`` tokens; yields once for each."""
        return self._ask({"ids": list(ids), "n": n})

    async def _ask(self, request: dict[str, Any]) -> AsyncGenerator[None, None]:
        number = next(self._numbers)
        steps: asyncio.Queue[bool] = asyncio.Queue()
        if not self._asking:
            self._signal(signal.SIGCONT)
        self._asking[number] = (asyncio.get_running_loop(), steps)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**request, "id": number}) + "\n")
            self._process.stdin.flush()
            while await steps.get():
                yield
        finally:
            del self._asking[number]
            if not self._asking:
                self._signal(signal.SIGSTOP)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                continue
            item = json.loads(line)
            if (asking := self._asking.get(item["id"])) is not None:
                loop, steps = asking
                loop.call_soon_threadsafe(steps.put_nowait, item["more"])

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End the process."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()


# --- the process itself -------------------------------------------------------------------------


def main() -> None:
    """Load the model in vLLM, and answer until the standard input ends."""
    from mico_chat.checkpoints.load import load_encoder
    from mico_chat.checkpoints.merge import plain_llm
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_arguments import engine_arguments
    from mico_chat.media import MediaDecoder

    parser = argparse.ArgumentParser(description=(main.__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--arguments", type=json.loads, default={}, help="vLLM's, as JSON")
    options = parser.parse_args()
    encoder, processor = load_encoder(options.model)
    arguments = engine_arguments(
        plain_llm(options.model), {"max_model_len": 2048, **options.arguments}
    )

    def no_table(dtype: Any) -> Any:
        raise AssertionError("nothing here is penalized for repeating")

    with MediaDecoder(workers=2) as decoder:
        engine = VllmEngine(arguments, processor.tokenizer, (), table=no_table)
        with closing(Ours(engine, encoder, processor, decoder)) as system:
            print("ready", flush=True)
            asyncio.run(_serve(system))


async def _serve(system: Ours) -> None:
    async with asyncio.TaskGroup() as group:
        while line := await asyncio.to_thread(sys.stdin.readline):
            group.create_task(_answer(system, json.loads(line)))


async def _answer(system: Ours, request: dict[str, Any]) -> None:
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


if __name__ == "__main__":
    main()

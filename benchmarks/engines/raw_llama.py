"""llama.cpp alone: the shortest loops that its library allows, as the mark to reach."""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.llamacpp import Weights

BATCH = 512


class Loop:
    """A context for ``n_seq`` sequences of at most ``length`` tokens. Nothing is ever freed."""

    def __init__(
        self,
        file: Path,
        threads: int,
        n_seq: int,
        length: int,
        *,
        unified: bool,
        batch: int = BATCH,
    ) -> None:
        self._weights = Weights(file)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = length * n_seq, n_seq, unified
        params.n_batch, params.n_ubatch = BATCH, batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._weights.pointer, params)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def step(self, rows: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> list[int]:
        """Compute rows of (token, position, stream); the next tokens after the asked rows."""
        token, pos, stream = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        one, logits = np.ones(len(rows), np.int32), np.zeros(len(rows), np.int8)
        logits[list(asked)] = 1
        sequences = (stream.ctypes.data + stream.itemsize * np.arange(len(rows))).astype(np.uintp)
        addresses = (array.ctypes.data for array in (pos, one, sequences, logits))
        batch = llama_cpp.llama_batch(len(rows), token.ctypes.data, None, *addresses)
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        sample = partial(llama_cpp.llama_sampler_sample, self._sampler, self._context)
        return [int(sample(row)) for row in asked]

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)


def run_raw(
    file: Path, threads: int, prompts: list[list[int]], n_tokens: int, unified: bool
) -> tuple[float, float]:
    """Prefill prompts, then decode ``n_tokens`` of each together.

    A short run before warms up. The process must end afterwards: nothing is freed.

    Returns:
        seconds to the first tokens, and seconds of the decoding after them.
    """
    length = max(BATCH, max(map(len, prompts)) + n_tokens)
    loop = Loop(file, threads, len(prompts), length, unified=unified)

    def run(n: int) -> tuple[float, float]:
        loop.clear()
        start = time.perf_counter()
        rows = [(t, p, s) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        last = {sum(len(p) for p in prompts[: s + 1]) - 1 for s in range(len(prompts))}
        tokens = []
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            tokens += loop.step(part, [row for row in range(len(part)) if begin + row in last])
        first = time.perf_counter()
        ends = [len(prompt) for prompt in prompts]
        streams = range(len(prompts))
        for number in range(n - 1):
            tokens = loop.step([(tokens[s], ends[s] + number, s) for s in streams], streams)
        return first - start, time.perf_counter() - first

    run(4)
    return run(n_tokens)


def run_steps(
    file: Path, threads: int, rows: Sequence[int], chunks: Sequence[int], length: int
) -> tuple[list[float], list[float]]:
    """Seconds of a step that gives each of so many answers a token; and seconds of a prompt of
    ``length`` tokens, computed in chunks of so many. Medians; nothing is freed.
    """
    decoding, prompts = [], []
    loop = Loop(file, threads, max(rows), 256, unified=True)
    for n in rows:
        loop.clear()
        steps = ([(1000 + place, place, stream) for stream in range(n)] for place in range(40))
        decoding.append(statistics.median(_seconds(loop, step, range(n)) for step in steps))
    for n in chunks:
        loop = Loop(file, threads, 1, length, unified=True, batch=n)
        whole = [(1000 + at % 500, at, 0) for at in range(length)]
        parts = [whole[begin : begin + n] for begin in range(0, length, n)]
        seconds = []
        for _ in range(3):
            loop.clear()
            seconds.append(sum(_seconds(loop, part, ()) for part in parts))
        prompts.append(statistics.median(seconds))
    return decoding, prompts


def _seconds(loop: Loop, rows: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> float:
    start = time.perf_counter()
    loop.step(rows, asked)
    return time.perf_counter() - start


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that this process reads from memory, all threads together."""
    blocks = [np.ones(1 << 25, np.float64) for _ in range(threads)]  # 256 MiB each
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, blocks))
            seconds.append(time.perf_counter() - start)
    return sum(block.nbytes for block in blocks) / min(seconds)

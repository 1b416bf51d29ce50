"""llama.cpp alone: the shortest loops that its library allows, as the mark to reach."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 512


class RawLlama:
    """A GGUF file and a context of ``n_streams`` sequences of up to ``n_ctx`` tokens each."""

    def __init__(
        self, file: Path, n_streams: int, n_ctx: int, threads: int, *, unified: bool
    ) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(file), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx * n_streams
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = n_streams
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = unified
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        chain = llama_cpp.llama_sampler_chain_default_params()
        self._sampler = llama_cpp.llama_sampler_chain_init(chain)
        llama_cpp.llama_sampler_chain_add(self._sampler, llama_cpp.llama_sampler_init_greedy())

    def run(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> tuple[float, float]:
        """Prefill all prompts, then decode ``n_tokens`` of each together.

        Returns:
            seconds to the first tokens, and seconds of the decoding after them.
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        start = time.perf_counter()
        rows = [(t, p, s) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        last = {sum(len(p) for p in prompts[: s + 1]) - 1 for s in range(len(prompts))}
        tokens = []
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            tokens += self._step(part, [row for row in range(len(part)) if begin + row in last])
        first = time.perf_counter()
        ends = [len(prompt) for prompt in prompts]
        streams = range(len(prompts))
        for step in range(n_tokens - 1):
            tokens = self._step([(tokens[s], ends[s] + step, s) for s in streams], streams)
        return first - start, time.perf_counter() - first

    def _step(self, rows: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> list[int]:
        """Compute rows of (token, position, stream); the next tokens after the asked rows."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, stream) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = stream
            batch.logits[row] = 0
        for row in asked:
            batch.logits[row] = 1
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        sample = llama_cpp.llama_sampler_sample
        return [int(sample(self._sampler, self._context, row)) for row in asked]

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._sampler)
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)


def run_raw(
    file: Path, threads: int, prompts: list[list[int]], n_tokens: int, unified: bool
) -> tuple[float, float]:
    """Prefill and decode prompts after a short warm-up; see :meth:`RawLlama.run`."""
    raw = RawLlama(file, len(prompts), 512, threads, unified=unified)
    raw.run(prompts, 4)
    seconds = raw.run(prompts, n_tokens)
    raw.close()
    return seconds


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that this process reads from memory, all threads together."""
    blocks = [np.ones(1 << 25, np.float64) for _ in range(threads)]  # 256 MiB each
    with ThreadPoolExecutor(threads) as pool:
        seconds = _shortest(5, lambda: list(pool.map(np.sum, blocks)))
    return sum(block.nbytes for block in blocks) / seconds


def matmul_flops(dtype: Any) -> float:
    import torch

    a, b = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 512 * 2048 * 2048 / _shortest(8, lambda: a @ b)


def _shortest(times: int, work: Callable[[], object]) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)

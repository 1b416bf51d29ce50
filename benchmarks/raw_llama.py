"""llama.cpp alone: the shortest loops that its library allows, as the mark to reach."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


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
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = n_streams
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = unified
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._batch = llama_cpp.llama_batch_init(512, 0, 1)
        self._sampler = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        llama_cpp.llama_sampler_chain_add(self._sampler, llama_cpp.llama_sampler_init_greedy())

    def run(self, prompts: Sequence[Sequence[int]], n_tokens: int) -> tuple[float, float]:
        """Prefill all prompts, then decode ``n_tokens`` of each together.

        Returns:
            seconds to the first tokens, and seconds of the decoding after them.
        """
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, True)
        start = time.perf_counter()
        tokens = self._prefill(prompts)
        first = time.perf_counter()
        positions = [len(prompt) for prompt in prompts]
        for step in range(n_tokens - 1):
            self._fill(
                [(t, p + step, s) for s, (t, p) in enumerate(zip(tokens, positions, strict=True))]
            )
            for row in range(len(tokens)):
                self._batch.logits[row] = 1
            self._decode()
            tokens = [self._sample(row) for row in range(len(tokens))]
        return first - start, time.perf_counter() - first

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        rows = [(t, p, s) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        last = {sum(len(p) for p in prompts[: s + 1]) - 1 for s in range(len(prompts))}
        tokens = []
        for begin in range(0, len(rows), 512):
            part = rows[begin : begin + 512]
            self._fill(part)
            asked = [row for row in range(len(part)) if begin + row in last]
            for row in asked:
                self._batch.logits[row] = 1
            self._decode()
            tokens += [self._sample(row) for row in asked]
        return tokens

    def _fill(self, rows: Sequence[tuple[int, int, int]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, stream) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = stream
            batch.logits[row] = 0

    def _decode(self) -> None:
        if llama_cpp.llama_decode(self._context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _sample(self, row: int) -> int:
        return int(llama_cpp.llama_sampler_sample(self._sampler, self._context, row))

    def close(self) -> None:
        """Free everything."""
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
    from concurrent.futures import ThreadPoolExecutor

    blocks = [np.ones(1 << 25, np.float64) for _ in range(threads)]  # 256 MiB each
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, blocks))
            best = max(best, sum(b.nbytes for b in blocks) / (time.perf_counter() - start))
    return best


def matmul_flops(dtype: Any) -> float:
    """Floating point operations a second of torch's matrix product in a dtype."""
    import torch

    a, b = torch.randn(512, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 512 * 2048 * 2048 / (time.perf_counter() - start))
    return best

"""llama.cpp alone: the shortest loops that its library allows, as the mark to reach."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llama_cpp
import numpy as np

BATCH = 512


def run_raw(
    file: Path, threads: int, prompts: list[list[int]], n_tokens: int, unified: bool
) -> tuple[float, float]:
    """Prefill prompts of at most 512 tokens, then decode ``n_tokens`` of each together.

    A short run before warms up. The process must end afterwards: nothing is freed.

    Returns:
        seconds to the first tokens, and seconds of the decoding after them.
    """
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(file), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = 512 * len(prompts)
    params.n_batch = params.n_ubatch = BATCH
    params.n_seq_max = len(prompts)
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.kv_unified = unified
    params.no_perf = True
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
    sampler = llama_cpp.llama_sampler_init_greedy()

    def step(rows: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> list[int]:
        """Compute rows of (token, position, stream); the next tokens after the asked rows."""
        batch.n_tokens = len(rows)
        for row, (token, position, stream) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = stream
            batch.logits[row] = 0
        for row in asked:
            batch.logits[row] = 1
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [int(llama_cpp.llama_sampler_sample(sampler, context, row)) for row in asked]

    def run(n: int) -> tuple[float, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        rows = [(t, p, s) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)]
        last = {sum(len(p) for p in prompts[: s + 1]) - 1 for s in range(len(prompts))}
        tokens = []
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            tokens += step(part, [row for row in range(len(part)) if begin + row in last])
        first = time.perf_counter()
        ends = [len(prompt) for prompt in prompts]
        streams = range(len(prompts))
        for number in range(n - 1):
            tokens = step([(tokens[s], ends[s] + number, s) for s in streams], streams)
        return first - start, time.perf_counter() - first

    run(4)
    return run(n_tokens)


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

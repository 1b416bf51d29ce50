"""llama.cpp's own loop over a prompt with media, as its ``llama-mtmd-cli`` has it."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from mico_chat.adapters.mtmd import _bitmap
from mico_chat.engine import llamacpp_library as llama_cpp
from tests.support.replicas.gguf_pairs import Pair


def reference(pair: Pair, text: str, media: Sequence[np.ndarray[Any, Any]], n: int) -> list[int]:
    """Greedy tokens; the text has libmtmd's marker ``<__media__>`` for each medium."""
    tokenize = signed("mtmd_tokenize", "int32_t", "void *, void *, void *, void *, size_t")
    evaluate = signed(
        "mtmd_helper_eval_chunks",
        "int32_t",
        "void *, void *, void *, int32_t, int32_t, int32_t, bool, void *",
    )
    load = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(pair.model), load)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 4096, 1, 1
    params.n_batch = params.n_ubatch = 512
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, params)
    settings = llama_cpp.mtmd_context_params_default()
    settings.print_timings = settings.warmup = False
    settings.n_threads = 1
    projector = llama_cpp.mtmd_init_from_file(os.fsencode(pair.mmproj), model, settings)
    bitmaps = [_bitmap(array) for array in media]
    for bitmap in bitmaps:
        llama_cpp.mtmd_bitmap_set_mergeable(bitmap, True)
    chunks = llama_cpp.mtmd_input_chunks_init()
    raw = text.encode()
    given = llama_cpp.mtmd_input_text(raw, len(raw), True, True)
    shown = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    assert not tokenize(projector, chunks, ctypes.byref(given), shown, len(bitmaps))
    at = ctypes.c_int32(0)
    assert not evaluate(projector, context, chunks, 0, 0, 512, True, ctypes.byref(at))
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens: list[int] = []
    for position in range(at.value, at.value + n):
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        values = np.ctypeslib.as_array(logits, (llama_cpp.llama_vocab_n_tokens(vocab),))
        tokens.append(int(values.argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, tokens[-1]):
            break
        decode(context, tokens[-1:], position)
    llama_cpp.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        llama_cpp.mtmd_bitmap_free(bitmap)
    llama_cpp.mtmd_free(projector)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return tokens


def decode(context: int, ids: Sequence[int], start: int) -> None:
    """Compute tokens of one sequence, all with logits."""
    n = len(ids)
    token, pos = np.array(ids, np.int32), np.arange(start, start + n, dtype=np.int32)
    logits, one, zero = np.ones(n, np.int8), np.ones(n, np.int32), np.zeros(1, np.int32)
    sequences = np.full(n, zero.ctypes.data, np.uintp)
    addresses = (array.ctypes.data for array in (pos, one, sequences, logits))
    assert not llama_cpp.llama_decode(
        context, llama_cpp.llama_batch(n, token.ctypes.data, None, *addresses)
    )


def signed(name: str, result: str, taken: str) -> Any:
    """A function of llama.cpp that the product does not call."""
    llama_cpp._SIGNATURES[name] = (result, taken)
    return getattr(llama_cpp, name)

"""llama.cpp's own loop over a prompt with media, as its ``llama-mtmd-cli`` has it."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from tests.support.replicas.gguf_pairs import Pair


def reference(pair: Pair, text: str, media: Sequence[np.ndarray[Any, Any]], n: int) -> list[int]:
    """Greedy tokens; the text has libmtmd's marker ``<__media__>`` for each medium."""
    from llama_cpp import mtmd_cpp as mtmd

    from mico_chat.adapters.mtmd import _bitmap, _library

    _library()  # silences the log
    load = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(pair.model), load)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 4096, 1, 1
    params.n_batch = params.n_ubatch = 512
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, params)
    settings = mtmd.mtmd_context_params_default()
    settings.print_timings = settings.warmup = False
    settings.n_threads = 1
    projector = mtmd.mtmd_init_from_file(os.fsencode(pair.mmproj), model, settings)
    bitmaps = [_bitmap(mtmd, array) for array in media]
    for bitmap in bitmaps:
        mtmd.mtmd_bitmap_set_mergeable(bitmap, True)
    chunks = mtmd.mtmd_input_chunks_init()
    raw = text.encode()
    given = mtmd.mtmd_input_text(raw, len(raw), True, True)
    shown = (ctypes.c_void_p * len(bitmaps))(*bitmaps)
    assert not mtmd.mtmd_tokenize(projector, chunks, ctypes.byref(given), shown, len(bitmaps))
    at = ctypes.c_int32(0)
    assert not mtmd.mtmd_helper_eval_chunks(
        projector, context, chunks, 0, 0, 512, True, ctypes.byref(at)
    )
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens: list[int] = []
    for position in range(at.value, at.value + n):
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        values = np.ctypeslib.as_array(logits, (llama_cpp.llama_vocab_n_tokens(vocab),))
        tokens.append(int(values.argmax()))
        if llama_cpp.llama_vocab_is_eog(vocab, tokens[-1]):
            break
        _decode(context, tokens[-1], position)
    mtmd.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(projector)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return tokens


def _decode(context: int, token: int, position: int) -> None:
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens = 1
    batch.token[0], batch.pos[0], batch.logits[0] = token, position, 1
    batch.n_seq_id[0], batch.seq_id[0][0] = 1, 0
    assert not llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)

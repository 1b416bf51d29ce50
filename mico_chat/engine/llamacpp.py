"""The language model in llama.cpp: quantized weights, the fastest engine on a CPU.

A batch of llama.cpp has either token ids or vectors. For a chat model of ours one ``llama_decode``
computes a step of the scheduler: in a step with context tokens, text tokens are vectors too, rows
of the file's own table, which give exactly the same logits as ids.

That does not hold for every model: some scale the vectors of text, or look up ids in each layer.
For a file with a projector (``mmproj``) a step is several calls: text is given as ids, media as
vectors, as llama.cpp's own libmtmd does. With M-RoPE the tokens of a picture share a position, and
llama.cpp counts positions where the scheduler counts tokens: :class:`_Places` knows both.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mico_chat.checkpoints.lora import Lora
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.cpu import Alarm, Threads
from mico_chat.engine.llamacpp_export import DEFAULT_CACHE_BYTES, export_lora
from mico_chat.engine.scheduler import Chunk, Sampled, Sequence
from mico_chat.errors import ModelError
from mico_chat.model.splice import PLACEHOLDER, splice

LARGEST_CACHE_BYTES = 4 << 30
"""By default a model's longest context takes at most these: contexts of 262,144 tokens exist, which
would take 36 GB."""

IDLE_SHARE = 32
"""One cell in 32 may be kept for reuse. Attention reads all cells up to the last used cell: 3,000
cells cost one stream of the mini 6 % of its speed, and 8 streams 10 %."""

LEAST_SLOTS, MOST_SLOTS = 8, 64

_GIVEN_UP = 2
"""``llama_decode`` returns this if the abort callback has ended the step (``llama.h``)."""


class Weights:
    """The weights of a GGUF file: they are freed with this object, and ``pointer`` is theirs."""

    def __init__(self, file: Path) -> None:
        llama_cpp.llama_backend_init()
        with llama_cpp.errors() as errors:
            self.pointer = llama_cpp.llama_model_load_from_file(
                os.fsencode(file), llama_cpp.llama_model_default_params()
            )
        if not self.pointer:
            raise ModelError(f"{file}: llama.cpp cannot load it: {'; '.join(errors) or 'unknown'}")
        # Not as the process ends: threads may still compute then.
        weakref.finalize(self, llama_cpp.llama_model_free, self.pointer).atexit = False
        stateful = (llama_cpp.llama_model_is_recurrent, llama_cpp.llama_model_is_hybrid)
        self.recurrent = any(has_state(self.pointer) for has_state in stateful)
        """Whether layers keep a state that a token changes, and that cannot go back."""


class LlamaCppModel:
    """A GGUF file with ``n_slots`` places for keys and values; see :class:`scheduler.Model`.

    All slots together hold ``n_cells`` tokens: by default those that ``DEFAULT_CACHE_BYTES`` hold,
    but at least ``max_position``, up to ``LARGEST_CACHE_BYTES``. Without ``threads``, each step
    chooses the number of threads. ``mixed``: text and media may be computed in one call.

    Slots with a recurrent state have memory from the start: by default they are as many as
    ``DEFAULT_CACHE_BYTES`` hold, but at least ``LEAST_SLOTS``.
    """

    reuses_starts = True
    scores = True
    one_lora = True

    def __init__(
        self,
        file: Path,
        *,
        n_slots: int | None = None,
        max_batch: int = 512,
        n_cells: int | None = None,
        threads: int | None = None,
        mixed: bool = True,
    ) -> None:
        self.weights = Weights(file)
        self._model = model = self.weights.pointer
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self._vocab)
        is_end = partial(llama_cpp.llama_vocab_is_eog, self._vocab)
        self.ends = frozenset(filter(is_end, range(self.n_vocab)))
        """Tokens that end an answer, according to the file."""
        self.max_position = llama_cpp.llama_model_n_ctx_train(model)
        self._threads = Threads(threads)
        self._n_threads = 1
        self.n_slots, self.max_batch = 1, 1
        cell_bytes, self.state_bytes = self._measured(file)
        room = DEFAULT_CACHE_BYTES // (self.state_bytes or 1)
        self.n_slots = n_slots or min(MOST_SLOTS, max(LEAST_SLOTS, room))
        self.max_batch = max_batch
        # llama.cpp computes sequences with one new token, and the rest of longer ones, apart.
        self.decodes_apart = self.weights.recurrent
        most, usual = (n // cell_bytes for n in (LARGEST_CACHE_BYTES, DEFAULT_CACHE_BYTES))
        wanted = n_cells or max(min(self.max_position, most), usual)
        self._context = self._open(file, wanted)
        self.n_cells = llama_cpp.llama_n_ctx(self._context)
        self.max_idle_cells = self.n_cells // IDLE_SHARE
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.loras = _Loras(model, self._context)
        self._table = _token_table(file) if mixed else None
        of_axes = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)
        axes = 4 if llama_cpp.llama_model_rope_type(model) in of_axes else 1
        width = llama_cpp.llama_model_n_embd_inp(model)
        self._batch = _Batch(max_batch, self.n_slots, width, axes)
        self._places = _Places(self.n_slots) if axes > 1 else None
        self._alarm = Alarm()
        function, argument = self._alarm.callback
        llama_cpp.llama_set_abort_callback(self._context, function, argument)
        # Compute a token with one thread, to measure how long a step takes.
        self._batch.fill([Chunk(0, 0, [0], 0)], self._table)
        self._decode(1, 1)
        self.truncate(0, 0)

    def _measured(self, file: Path) -> tuple[int, int]:
        """The bytes of a token's keys and values, and of a slot's recurrent state."""
        model = self._model
        if not self.weights.recurrent:
            width = llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)
            heads = llama_cpp.llama_model_n_head_kv(model)
            return int(4 * llama_cpp.llama_model_n_layer(model) * heads * width), 0
        # Its layers differ, so one slot is measured with one token in it.
        batch = _Batch(1, 1, 1, 1)
        batch.fill([Chunk(0, 0, [0], 0)], None)
        context = self._open(file, 1)
        try:
            if (result := llama_cpp.llama_decode(context, batch.struct)) != 0:
                raise ModelError(f"{file}: llama_decode gave {result} for its first token")
            whole, state = (
                llama_cpp.llama_state_seq_get_size_ext(context, 0, flag)
                for flag in (0, llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
            )
        finally:
            llama_cpp.llama_free(context)
        return max(1, whole - state), state

    def _open(self, file: Path, n_cells: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_cells
        # llama.cpp aborts the process if a batch has no room for a token of each sequence.
        params.n_batch = params.n_ubatch = max(self.max_batch, self.n_slots)
        params.n_seq_max = self.n_slots
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True  # slots share the cells of a common start
        params.no_perf = True
        with llama_cpp.errors() as errors:
            context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ModelError(f"{file}: no context of {n_cells} tokens: {'; '.join(errors)}")
        return context

    def run(self, batch: Many[Chunk]) -> list[int]:
        """Compute chunks; returns the places of the wanted logits."""
        self.loras.wear(batch[0].lora)
        places: list[int] = []
        for chunks in [batch] if self._table is not None else _calls(batch):
            places += self._call(chunks)
        if self._places is not None:
            for chunk in batch:
                self._places.add(chunk)
        return places

    def _call(self, chunks: Many[Chunk]) -> list[int]:
        places = self._batch.fill(chunks, self._table)
        tokens = self._batch.struct.n_tokens
        causal = all(chunk.causal for chunk in chunks)
        llama_cpp.llama_set_causal_attn(self._context, causal)
        threads = self._threads.number(tokens)
        while (result := self._decode(tokens, threads)) == _GIVEN_UP:
            threads = self._threads.number(tokens)
        if result != 0:
            raise ModelError(f"llama_decode gave {result} for {tokens} tokens")
        return places

    def _decode(self, tokens: int, threads: int) -> int:
        """llama.cpp's return code. A step that is given up leaves the slots unchanged."""
        if threads != self._n_threads:
            llama_cpp.llama_set_n_threads(self._context, threads, threads)
            self._n_threads = threads
        started = time.monotonic()
        # A step that is given up has changed recurrent states.
        limit = None if self.state_bytes else self._threads.limit(tokens, threads)
        with self._alarm.after(limit):
            result = int(llama_cpp.llama_decode(self._context, self._batch.struct))
        seconds = time.monotonic() - started
        self._threads.observe(tokens, threads, seconds, given_up=result == _GIVEN_UP)
        return result

    def copy(self, source: int, target: int, length: int) -> None:
        end = length if self._places is None else self._places.copy(source, target, length)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def truncate(self, slot: int, length: int) -> None:
        end = length if self._places is None else self._places.copy(slot, slot, length)
        if not llama_cpp.llama_memory_seq_rm(self._memory, slot, end, -1):
            raise ModelError(
                f"the recurrent state of slot {slot} cannot go back to {length} tokens"
            )

    def sampler(self, sequence: Sequence) -> LlamaCppSampler:
        return LlamaCppSampler(self._context, self.n_vocab, sequence)

    def close(self) -> None:
        self._alarm.close()
        llama_cpp.llama_free(self._context)
        del self.weights


class _Loras:
    """Adapters in llama.cpp, which computes all of a step with one of them."""

    def __init__(self, model: int, context: int) -> None:
        self._model, self._context = model, context
        self._pointers: dict[Lora, int] = {}
        self._worn: Lora | None = None

    def load(self, lora: Lora) -> None:
        with tempfile.TemporaryDirectory() as folder, llama_cpp.errors() as errors:
            file = Path(folder) / "lora.gguf"
            export_lora(lora, self._model, file)
            pointer = llama_cpp.llama_adapter_lora_init(self._model, os.fsencode(file))
        if not pointer:
            raise lora.misfit(f"{lora.base} does not take it: {'; '.join(errors)}")
        self._pointers[lora] = pointer

    def wear(self, lora: Lora | None) -> None:
        if lora is not self._worn:
            worn = [] if lora is None else [self._pointers[lora]]
            pointers, ones = (ctypes.c_void_p * 1)(*worn), (ctypes.c_float * 1)(1.0)
            llama_cpp.llama_set_adapters_lora(self._context, pointers, len(worn), ones)
            self._worn = lora

    def unload(self, lora: Lora) -> None:
        if lora is self._worn:
            self.wear(None)
        llama_cpp.llama_adapter_lora_free(self._pointers.pop(lora))


class LlamaCppSampler:
    """A chain of llama.cpp's samplers; see :class:`scheduler.Sampler`."""

    def __init__(self, context: int, n_vocab: int, sequence: Sequence) -> None:
        self._context, self._n_vocab = context, n_vocab
        options, self._grammar = sequence.options, sequence.grammar
        self._bias = sequence.bias
        self._n_likeliest = options.logprobs or 0
        stages = []
        counts = (options.frequency_penalty, options.presence_penalty)
        penalties = (options.max_tokens, options.repetition_penalty, *counts)
        penalized = penalties[1:] != (1.0, 0.0, 0.0)
        # llama.cpp's greedy sampler copies all logits first: 0.3 ms a token instead of 0.05.
        self._greedy = options.temperature == 0 and not penalized
        self._every: NDArray[Any] | None = None
        if options.temperature == 0 and self._grammar is not None:
            self._every = _candidates(np.arange(n_vocab))
        if penalized:
            stages.append(llama_cpp.llama_sampler_init_penalties(n_vocab, *penalties))
        if options.temperature == 0:
            stages.append(llama_cpp.llama_sampler_init_greedy())
        else:
            seed = secrets.randbits(32) if options.seed is None else options.seed + sequence.index
            # 32 bits, but not LLAMA_DEFAULT_SEED, for which llama.cpp picks a random seed.
            seed = (seed ^ seed >> 32) % llama_cpp.LLAMA_DEFAULT_SEED
            stages += [
                llama_cpp.llama_sampler_init_temp(options.temperature),
                llama_cpp.llama_sampler_init_top_k(options.top_k),
                llama_cpp.llama_sampler_init_top_p(options.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(options.min_p, 1),
                llama_cpp.llama_sampler_init_dist(seed),
            ]
        params = llama_cpp.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = llama_cpp.llama_sampler_chain_init(params)
        for stage in stages:
            llama_cpp.llama_sampler_chain_add(self._chain, stage)

    def sample(self, logits: int) -> Sampled:
        plain = values = self._values(logits)
        if bias := self._bias(self._n_vocab):
            plain = values.copy()
            values[list(bias)] += list(bias.values())  # in llama.cpp's memory
        if self._grammar is not None:
            token = self._constrained(values)
        elif self._greedy:
            token = int(values.argmax())
        else:
            token = llama_cpp.llama_sampler_sample(self._chain, self._context, logits)
        return _sampled(plain, token, self._n_likeliest)

    def score(self, logits: int, token: int) -> Sampled:
        return _sampled(self._values(logits), token, self._n_likeliest)

    def _values(self, logits: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_logits_ith(self._context, logits)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def _constrained(self, logits: NDArray[np.float32]) -> int:
        """Sample a token that the grammar allows.

        The likeliest of all tokens is taken if it is allowed: to find out takes 0.05 ms, and to
        find all that are allowed takes up to 1 ms.
        """
        assert self._grammar is not None
        token = None if self._every is None else self._pick(self._every, logits)
        if token is None or not self._grammar.allows(token):
            ids = np.flatnonzero(self._grammar.allowed(self._n_vocab))
            token = self._pick(_candidates(ids), logits[ids])
        llama_cpp.llama_sampler_accept(self._chain, token)
        self._grammar.accept(token)
        return token

    def _pick(self, candidates: NDArray[Any], logits: NDArray[np.float32]) -> int:
        if self._greedy:
            return int(candidates["id"][logits.argmax()])
        candidates["logit"] = logits
        data, size = candidates.ctypes.data, len(candidates)
        array = llama_cpp.llama_token_data_array(data, size=size, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        at = array.data + array.selected * _CANDIDATE.itemsize  # its id is first
        return ctypes.c_int32.from_address(at).value

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""This is ``llama_token_data`` of ``llama.h``."""


def _candidates(ids: NDArray[np.int64]) -> NDArray[Any]:
    found = np.zeros(len(ids), _CANDIDATE)
    found["id"] = ids
    return found


def _sampled(logits: NDArray[np.float32], token: int, n: int) -> Sampled:
    # 0.05 ms for 49,152 tokens; np.logaddexp.reduce takes 50 times as long.
    values = logits - logits.max()
    values -= np.log(np.exp(values).sum())
    likeliest = np.argsort(-values, kind="stable")[:n] if n else ()
    top = tuple((int(i), float(values[i])) for i in likeliest)
    return Sampled(token, float(values[token]), top)


class _Places:
    """The position on the first axis of each token that a slot holds."""

    def __init__(self, n_slots: int) -> None:
        self._held: list[list[int]] = [[] for _ in range(n_slots)]

    def add(self, chunk: Chunk) -> None:
        own = range(chunk.start, chunk.start + chunk.length)
        self._held[chunk.slot] += own if chunk.positions is None else chunk.positions[0].tolist()

    def copy(self, source: int, target: int, length: int) -> int:
        """Give ``target`` a slot's first tokens; returns the position that they end before."""
        held = self._held[source]
        end = 0 if length == 0 else held[length] if length < len(held) else held[-1] + 1
        self._held[target] = held[:length]
        return end


def _calls(batch: Many[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks of text alone or of media alone for one call each; the last call has the logits.

    The parts of a chunk stay in order. Media that attend in both directions have own calls.
    """
    waiting = [_parts(chunk) for chunk in batch]
    while True:
        before = [parts for parts in waiting if len(parts) > 1 and not parts[0].context]
        media = [parts for parts in waiting if parts and parts[0].context]
        if before:
            yield [parts.pop(0) for parts in before]
        elif whole := [parts for parts in media if not parts[0].causal]:
            yield [whole[0].pop(0)]
        elif media:
            yield [parts.pop(0) for parts in media]
        else:
            break
    if last := [parts.pop() for parts in waiting if parts]:
        yield last


def _parts(chunk: Chunk) -> list[Chunk]:
    """A chunk as its runs of text and of media."""
    rows = torch.cat(list(chunk.context)) if chunk.context else None
    parts, at, row = [], 0, 0
    for is_media, ids in groupby(chunk.ids, PLACEHOLDER.__eq__):
        n = len(list(ids))
        context: tuple[Tensor, ...] = ()
        if is_media:
            assert rows is not None
            context = (rows[row : row + n],)
            row += n
        positions = None if chunk.positions is None else chunk.positions[:, at : at + n]
        wanted = max(0, min(n, at + n - (chunk.length - chunk.wanted)))
        part = replace(chunk, start=chunk.start + at, ids=chunk.ids[at : at + n], wanted=wanted)
        parts.append(replace(part, context=context, positions=positions))
        at += n
    return parts


class _Batch:
    def __init__(self, size: int, n_slots: int, width: int, axes: int) -> None:
        self._token = np.zeros(size, np.int32)
        self._embd = np.zeros((size, width), np.float32)
        self._pos = np.zeros(size * axes, np.int32)
        self._one = np.ones(size, np.int32)
        self._logits = np.zeros(size, np.int8)
        # llama.cpp takes a pointer to the number of each token's sequence.
        self._numbers = np.arange(n_slots, dtype=np.int32)
        self._sequences = np.zeros(size, np.uintp)
        self._axes = axes
        self.struct = llama_cpp.llama_batch()
        self.struct.pos, self.struct.n_seq_id = self._pos.ctypes.data, self._one.ctypes.data
        self.struct.seq_id, self.struct.logits = (
            self._sequences.ctypes.data,
            self._logits.ctypes.data,
        )

    def fill(self, chunks: Many[Chunk], table: Callable[[Tensor], Tensor] | None) -> list[int]:
        """Put chunks in, of text or of media alone without ``table``; the wanted logits' places."""
        context = [tokens for chunk in chunks for tokens in chunk.context]
        total = sum(chunk.length for chunk in chunks)
        # A token of text has one position. (A, n): all of the first axis, then of the second, ..
        axes = self._axes if context else 1
        positions = self._pos[: axes * total].reshape(axes, total)
        at = 0
        places: list[int] = []
        base, size = self._numbers.ctypes.data, self._numbers.itemsize
        for chunk in chunks:
            end = at + chunk.length
            self._token[at:end] = chunk.ids
            if chunk.positions is None:
                positions[:, at:end] = np.arange(chunk.start, chunk.start + chunk.length)
            else:  # of llama.cpp's four axes the last is not used
                positions[:3, at:end] = chunk.positions[:axes]
                positions[3:, at:end] = 0
            self._sequences[at:end] = base + size * chunk.slot
            self._logits[at:end] = 0
            self._logits[end - chunk.wanted : end] = 1
            places += range(end - chunk.wanted, end)
            at = end
        self.struct.n_tokens = total
        if context and table is not None:
            self._embd[:at] = splice(table, torch.from_numpy(self._token[:at]), context)
        elif context:
            self._embd[:at] = torch.cat(context)
        # llama.cpp uses ids or vectors: one of the two pointers must be null.
        self.struct.token = None if context else self._token.ctypes.data
        self.struct.embd = self._embd.ctypes.data if context else None
        return places


def _token_table(file: Path) -> Callable[[Tensor], Tensor]:
    """The token vectors of ids, from a GGUF file that llama.cpp's library reads in place.

    The gguf package's reader takes 1.6 s to open the mini's file.
    """
    context = llama_cpp.gguf_init_from_file(
        os.fsencode(file), llama_cpp.gguf_init_params(True, None)
    )
    if not context:
        raise ModelError(f"{file}: not a GGUF file")
    try:
        number = llama_cpp.gguf_find_tensor(context, b"token_embd.weight")
        if number < 0:
            raise ModelError(f"{file}: no tensor token_embd.weight")
        rows = llama_cpp.gguf_get_tensor_ne(context, number)[1]
        stored = gguf.GGMLQuantizationType(llama_cpp.gguf_get_tensor_type(context, number))
        offset = llama_cpp.gguf_get_data_offset(context) + llama_cpp.gguf_get_tensor_offset(
            context, number
        )
        size = llama_cpp.gguf_get_tensor_size(context, number)
    finally:
        llama_cpp.gguf_free(context)
    data = np.memmap(file, np.uint8, "r", offset, (rows, size // rows))
    return lambda ids: torch.from_numpy(gguf.quants.dequantize(data[ids.numpy()], stored))

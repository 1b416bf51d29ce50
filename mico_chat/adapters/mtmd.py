"""llama.cpp's libmtmd: pictures, frames and sounds to parts of a prompt, and to context tokens.

libmtmd preprocesses media and adds the markup around them that the model has learned (``mtmd.h``).
Media reach it as arrays: its own functions that open files or start ffmpeg are not called.
"""

import ctypes
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.cpu import usable_cores
from mico_chat.engine.llamacpp import Weights
from mico_chat.errors import MediaError, ModelError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import SAMPLE_RATE

Part = str | NDArray[np.uint8] | NDArray[np.float32]
"""It is markup, the RGB pixels (H, W, 3) of a picture or frame, or the samples (n,) of a sound."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The places of context tokens, with the positions of a :class:`ContextBlock`."""

    n: int
    positions: Tensor | None
    n_positions: int
    causal: bool

    def __len__(self) -> int:
        return self.n


class Chunks:
    """Preprocessed media. ``pieces`` are the ids of markup and the places of context tokens."""

    pieces: tuple[tuple[int, ...] | Rows, ...] = ()

    def __init__(self) -> None:
        self.pointer = llama_cpp.mtmd_input_chunks_init()
        weakref.finalize(self, llama_cpp.mtmd_input_chunks_free, self.pointer).atexit = False

    def __iter__(self) -> Iterator[Any]:
        for number in range(llama_cpp.mtmd_input_chunks_size(self.pointer)):
            yield llama_cpp.mtmd_input_chunks_get(self.pointer, number)


class Projector:
    """A GGUF file that makes vectors of a language model from media (``--mmproj``).

    ``llm`` is the language model's; ``bounds`` are ``image_min_tokens`` and ``image_max_tokens``,
    where its own are not to hold. Sounds of another rate than ours are not supported.
    """

    def __init__(self, file: Path, llm: Weights, threads: int | None = None, **bounds: int) -> None:
        self._llm = llm  # whose vocabulary libmtmd uses
        self._width = llama_cpp.llama_model_n_embd_inp(llm.pointer)
        params = llama_cpp.mtmd_context_params_default()
        params.print_timings = False
        params.warmup = False  # it takes a second, and memory for the largest picture
        params.n_threads = threads or usable_cores()
        for name, value in bounds.items():
            setattr(params, name, value)
        with llama_cpp.errors() as errors:
            self._context = llama_cpp.mtmd_init_from_file(os.fsencode(file), llm.pointer, params)
        if not self._context:
            reason = "; ".join(errors[-4:]) or "unknown"
            raise ModelError(f"{file}: llama.cpp cannot load it beside the model: {reason}")
        weakref.finalize(self, llama_cpp.mtmd_free, self._context).atexit = False
        sees = bool(llama_cpp.mtmd_support_vision(self._context))
        hears = llama_cpp.mtmd_get_audio_sample_rate(self._context) == SAMPLE_RATE
        self.kinds = _kinds(sees=sees, hears=hears)
        self._axes = bool(llama_cpp.mtmd_decode_use_mrope(self._context))

    def chunks(self, name: str, parts: Sequence[Part]) -> Chunks:
        """Preprocess a medium. Frames of a clip, which follow text, may share context tokens."""
        given, texts, bitmaps = [], [], []
        for part in parts:
            if isinstance(part, str):
                raw = part.encode()
                texts.append(llama_cpp.mtmd_input_text(raw, len(raw), False, True))
                given.append(llama_cpp.mtmd_input_part(ctypes.addressof(texts[-1]), None))
            else:
                bitmaps.append(_bitmap(part))
                llama_cpp.mtmd_bitmap_set_mergeable(bitmaps[-1], True)
                given.append(llama_cpp.mtmd_input_part(None, bitmaps[-1]))
        of_part = ctypes.POINTER(llama_cpp.mtmd_input_part)
        pointers = (of_part * len(given))(*map(ctypes.pointer, given))
        chunks = Chunks()
        failed = llama_cpp.mtmd_tokenize_from_parts(
            self._context, chunks.pointer, pointers, len(parts), False
        )
        for bitmap in bitmaps:
            llama_cpp.mtmd_bitmap_free(bitmap)
        if failed:
            reason = "libmtmd cannot prepare it for the model: one side may be too short"
            raise MediaError(name, reason)
        chunks.pieces = tuple(map(self._piece, chunks))
        return chunks

    def encode(self, chunks: Chunks) -> Tensor:
        """Context tokens (n, W) of a medium. One thread at a time calls it."""
        rows = []
        for chunk, piece in zip(chunks, chunks.pieces, strict=True):
            if isinstance(piece, Rows):
                with llama_cpp.errors() as errors:
                    failed = llama_cpp.mtmd_encode_chunk(self._context, chunk)
                if failed:
                    reason = "; ".join(errors[-4:]) or "unknown"
                    raise ModelError(f"llama.cpp could not encode a medium: {reason}")
                found = llama_cpp.mtmd_get_output_embd(self._context)
                values = np.ctypeslib.as_array(found, (piece.n, self._width))
                rows.append(torch.from_numpy(values.copy()))
        return torch.cat(rows)

    def _piece(self, chunk: Any) -> tuple[int, ...] | Rows:
        n = int(llama_cpp.mtmd_input_chunk_get_n_tokens(chunk))
        kind = llama_cpp.mtmd_input_chunk_get_type(chunk)
        if kind == llama_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
            given = llama_cpp.mtmd_input_chunk_get_tokens_text(
                chunk, ctypes.byref(ctypes.c_size_t())
            )
            return tuple(given[:n])
        positions = None
        if self._axes and kind == llama_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            positions, moved = (self._positions(chunk, n, start) for start in (0, 1))
            if not torch.equal(positions + 1, moved):
                raise ModelError("this model's positions do not count from a picture's start")
        causal = not llama_cpp.mtmd_decode_use_non_causal(self._context, chunk)
        return Rows(n, positions, int(llama_cpp.mtmd_input_chunk_get_n_pos(chunk)), causal)

    def _positions(self, chunk: Any, n: int, start: int) -> Tensor:
        """Time, row and column (3, n) of a picture's tokens."""
        image = llama_cpp.mtmd_input_chunk_get_tokens_image(chunk)
        axes = np.zeros((n, 4), np.uint32)  # mtmd_decoder_pos of mtmd.h
        llama_cpp.mtmd_helper_image_get_decoder_pos(image, start, axes.ctypes.data)
        return torch.from_numpy(axes[:, [0, 2, 1]].T.astype(np.int64))


def _bitmap(array: NDArray[np.uint8] | NDArray[np.float32]) -> Any:
    if array.dtype == np.float32:
        # libmtmd ends the process at a single sample.
        samples = np.ascontiguousarray(np.pad(array, (0, max(0, 2 - len(array)))))
        return llama_cpp.mtmd_bitmap_init_from_audio(len(samples), samples.ctypes.data)
    pixels = np.ascontiguousarray(array)
    height, width = pixels.shape[:2]
    return llama_cpp.mtmd_bitmap_init(width, height, pixels.ctypes.data)


def reads(file: Path) -> tuple[Kind, ...]:
    """The kinds of media that a projector reads, by its file's head."""
    caps = llama_cpp.mtmd_get_cap_from_file(os.fsencode(file))
    return _kinds(sees=caps.inp_vision, hears=caps.inp_audio)


def _kinds(*, sees: bool, hears: bool) -> tuple[Kind, ...]:
    seen: tuple[Kind, ...] = ("image", "video") if sees else ()
    return (*seen, "audio") if hears else seen

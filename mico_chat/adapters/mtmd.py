"""llama.cpp's libmtmd: pictures, frames and sounds to parts of a prompt, and to context tokens.

libmtmd preprocesses media and adds the markup around them that the model has learned (``mtmd.h``).
Media reach it as arrays: its own functions that open files or start ffmpeg are not called.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mico_chat.engine.cpu import usable_cores
from mico_chat.engine.llamacpp import Weights, pointer
from mico_chat.errors import ConfigError, MediaError, ModelError
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

    def __init__(self, mtmd: Any) -> None:
        self._mtmd = mtmd
        self.pointer = mtmd.mtmd_input_chunks_init()
        weakref.finalize(self, mtmd.mtmd_input_chunks_free, self.pointer).atexit = False

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._mtmd.mtmd_input_chunks_size(self.pointer)):
            yield self._mtmd.mtmd_input_chunks_get(self.pointer, number)


class Projector:
    """A GGUF file that makes vectors of a language model from media (``--mmproj``).

    ``llm`` is the language model's. Sounds of another rate than ours are not supported.
    """

    def __init__(self, file: Path, llm: Weights, threads: int | None = None) -> None:
        mtmd = self._mtmd = _library()[0]
        self._llm = llm  # whose vocabulary libmtmd uses
        self._width = llama_cpp.llama_model_n_embd_inp(llm.pointer)
        params = mtmd.mtmd_context_params_default()
        params.print_timings = False
        params.warmup = False  # it takes a second, and memory for the largest picture
        params.n_threads = threads or usable_cores()
        _errors.lines = []
        self._context = mtmd.mtmd_init_from_file(os.fsencode(file), llm.pointer, params)
        if not self._context:
            raise ModelError(f"{file}: llama.cpp cannot load it beside the model: {_reason()}")
        weakref.finalize(self, mtmd.mtmd_free, self._context).atexit = False
        sees = bool(mtmd.mtmd_support_vision(self._context))
        hears = mtmd.mtmd_get_audio_sample_rate(self._context) == SAMPLE_RATE
        self.kinds = _kinds(sees=sees, hears=hears)
        self._axes = bool(mtmd.mtmd_decode_use_mrope(self._context))

    def chunks(self, name: str, parts: Sequence[Part]) -> Chunks:
        """Preprocess a medium. Frames of a clip, which follow text, may share context tokens."""
        mtmd = self._mtmd
        given, bitmaps = [], []
        for part in parts:
            if isinstance(part, str):
                raw = part.encode()
                text = mtmd.mtmd_input_text(raw, len(raw), False, True)
                given.append(mtmd.mtmd_input_part(ctypes.pointer(text), None))
            else:
                bitmaps.append(_bitmap(mtmd, part))
                mtmd.mtmd_bitmap_set_mergeable(bitmaps[-1], True)
                given.append(mtmd.mtmd_input_part(None, bitmaps[-1]))
        of_part = ctypes.POINTER(mtmd.mtmd_input_part)
        pointers = (of_part * len(given))(*map(ctypes.pointer, given))
        chunks = Chunks(mtmd)
        failed = mtmd.mtmd_tokenize_from_parts(
            self._context, chunks.pointer, pointers, len(parts), False
        )
        for bitmap in bitmaps:
            mtmd.mtmd_bitmap_free(bitmap)
        if failed:
            reason = "libmtmd cannot prepare it for the model: one side may be too short"
            raise MediaError(name, reason)
        chunks.pieces = tuple(map(self._piece, chunks))
        return chunks

    def encode(self, chunks: Chunks) -> Tensor:
        """Context tokens (n, W) of a medium. One thread at a time calls it."""
        mtmd = self._mtmd
        rows = []
        for chunk, piece in zip(chunks, chunks.pieces, strict=True):
            if isinstance(piece, Rows):
                _errors.lines = []
                if mtmd.mtmd_encode_chunk(self._context, chunk):
                    raise ModelError(f"llama.cpp could not encode a medium: {_reason()}")
                found = mtmd.mtmd_get_output_embd(self._context)
                values = np.ctypeslib.as_array(found, (piece.n, self._width))
                rows.append(torch.from_numpy(values.copy()))
        return torch.cat(rows)

    def _piece(self, chunk: Any) -> tuple[int, ...] | Rows:
        mtmd = self._mtmd
        n = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        kind = mtmd.mtmd_input_chunk_get_type(chunk)
        if kind == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
            return tuple(mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.c_size_t())[:n])
        positions = None
        if self._axes and kind == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            positions, moved = (self._positions(chunk, n, start) for start in (0, 1))
            if not torch.equal(positions + 1, moved):
                raise ModelError("this model's positions do not count from a picture's start")
        causal = not mtmd.mtmd_decode_use_non_causal(self._context, chunk)
        return Rows(n, positions, int(mtmd.mtmd_input_chunk_get_n_pos(chunk)), causal)

    def _positions(self, chunk: Any, n: int, start: int) -> Tensor:
        """Time, row and column (3, n) of a picture's tokens."""
        image = self._mtmd.mtmd_input_chunk_get_tokens_image(chunk)
        found = (self._mtmd.mtmd_decoder_pos * n)()
        self._mtmd.mtmd_helper_image_get_decoder_pos(image, start, found)
        axes = np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_uint32)), (n, 4))
        return torch.from_numpy(axes[:, [0, 2, 1]].T.astype(np.int64))


def _bitmap(mtmd: Any, array: NDArray[np.uint8] | NDArray[np.float32]) -> Any:
    if array.dtype == np.float32:
        # libmtmd ends the process at a single sample.
        samples = np.ascontiguousarray(np.pad(array, (0, max(0, 2 - len(array)))))
        return mtmd.mtmd_bitmap_init_from_audio(len(samples), pointer(samples, ctypes.c_float))
    pixels = np.ascontiguousarray(array)
    height, width = pixels.shape[:2]
    return mtmd.mtmd_bitmap_init(width, height, pointer(pixels, ctypes.c_uint8))


def reads(file: Path) -> tuple[Kind, ...]:
    """The kinds of media that a projector reads, by its file's head."""
    caps = _library()[0].mtmd_get_cap_from_file(os.fsencode(file))
    return _kinds(sees=caps.inp_vision, hears=caps.inp_audio)


def _kinds(*, sees: bool, hears: bool) -> tuple[Kind, ...]:
    seen: tuple[Kind, ...] = ("image", "video") if sees else ()
    return (*seen, "audio") if hears else seen


_errors = threading.local()
"""The messages of the running call: libmtmd logs in the thread that calls it."""


def _reason() -> str:
    return "; ".join(getattr(_errors, "lines", ())) or "unknown"


@functools.cache
def _library() -> tuple[Any, Any]:
    """``llama_cpp.mtmd_cpp``, and the function that collects its log."""
    try:
        from llama_cpp import mtmd_cpp as mtmd
    except (FileNotFoundError, OSError, RuntimeError) as error:
        reason = "this build of llama-cpp-python lacks libmtmd, which --mmproj needs"
        raise ConfigError(f"{reason}: make setup builds it") from error

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: object) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR of ggml.h
            lines = getattr(_errors, "lines", [])
            lines.append(text.decode(errors="replace").strip())
            _errors.lines = lines[-4:]

    mtmd.mtmd_helper_log_set(collect, ctypes.c_void_p())
    return mtmd, collect  # which libmtmd calls as long as the process runs

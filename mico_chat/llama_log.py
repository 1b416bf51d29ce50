"""What llama.cpp says goes to its log; of an operation only the errors matter."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR`` of ``ggml.h``."""


@contextmanager
def llama_cpp_errors() -> Iterator[list[str]]:
    """The error messages of llama.cpp; what else it says, a line for each tensor, is not shown."""
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: object) -> None:
        if level == _LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    llama_cpp.llama_log_set(collect, None)
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(callback, data)

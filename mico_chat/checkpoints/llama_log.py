"""The errors of an operation of llama.cpp, out of its log."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL_ERROR = 4
"""``GGML_LOG_LEVEL_ERROR`` of ``ggml.h``."""

_log = threading.Lock()
"""llama.cpp has one log function for the process: of two threads that set it and set it back, one
would leave the other's function behind, and llama.cpp would call freed memory."""


@contextmanager
def llama_cpp_errors() -> Iterator[list[str]]:
    """The error messages of llama.cpp. Its other messages, a line for each tensor, are dropped.

    One thread at a time: others wait.
    """
    import llama_cpp

    errors: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(level: int, text: bytes, _: object) -> None:
        if level == _LEVEL_ERROR:
            errors.append(text.decode(errors="replace").strip())

    with _log:
        callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        llama_cpp.llama_log_set(collect, None)
        try:
            yield errors
        finally:
            llama_cpp.llama_log_set(callback, data)

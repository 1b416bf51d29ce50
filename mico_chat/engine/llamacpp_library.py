"""The C functions of llama.cpp that this project calls, in a ready-made or a compiled library.

llama-cpp-py-sync brings the library ready-made, llama-cpp-python compiles it; that one is taken
where both are there. Their own Python code takes up to a second to import, and is not used. What is
declared in ``llamacpp_library.h`` fits the releases in ``RELEASES`` alone.
"""

import ctypes
import functools
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_void_p
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mico_chat.engine.cpu import processor
from mico_chat.errors import ConfigError, MissingExtraError, ModelError

RELEASES = {
    "llama_cpp": "llama-cpp-python==0.3.36",
    "llama_cpp_py_sync": "llama-cpp-py-sync==0.11739",
}
"""The tested releases by module; the second is llama.cpp b11739."""

PACKAGE = next((name for name in RELEASES if find_spec(name)), "llama_cpp_py_sync")
READY_MADE = PACKAGE == "llama_cpp_py_sync"

COMPILE = "pip install 'mico-chat[compiled]'"
"""This command compiles llama.cpp for this machine's processor."""

LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
LLAMA_ROPE_TYPE_NORM, LLAMA_ROPE_TYPE_MROPE, LLAMA_ROPE_TYPE_IMROPE = 0, 8, 40
LLAMA_TOKEN_ATTR_CONTROL, LLAMA_TOKEN_ATTR_USER_DEFINED = 8, 16
LLAMA_DEFAULT_SEED = 0xFFFFFFFF
LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY = 1
MTMD_INPUT_CHUNK_TYPE_TEXT, MTMD_INPUT_CHUNK_TYPE_IMAGE = 0, 1

_TYPES: dict[str, Any] = {
    **{"void": None, "bool": c_bool, "int32_t": c_int32, "int64_t": c_int64, "float": c_float},
    **{"uint32_t": ctypes.c_uint32, "size_t": ctypes.c_size_t, "void *": c_void_p},
    **{"float *": POINTER(c_float), "int32_t *": POINTER(c_int32), "int64_t *": POINTER(c_int64)},
    "const char *": c_char_p,
}

_HEADER = Path(__file__).with_suffix(".h").read_text(encoding="utf-8")
if not READY_MADE:
    _HEADER = _HEADER.replace("    size_t moe_cache_size;\n", "")
for _name, _body in re.findall(r"struct (\w+) \{(.*?)\};", _HEADER, re.S):
    _fields = [
        (name.strip(" *"), _TYPES[kind.strip()])
        for kind, names in re.findall(r"(\w.*?[ *])(\w+(?:, \*?\w+)*);", _body)
        for name in names.split(",")
    ]
    _TYPES[_name] = type(_name, (ctypes.Structure,), {"_fields_": _fields})
_SIGNATURES = {
    name: (result, taken)
    for result, name, taken in re.findall(r"^(\w.*?[ *])(\w+)\((.*)\);$", _HEADER, re.M)
}


def __getattr__(name: str) -> Any:
    """A struct or a function of the header; the first function loads the library."""
    if name in _SIGNATURES:
        stem = {"mtmd": "mtmd", "gguf": "ggml-base"}.get(name.partition("_")[0], "llama")
        found = getattr(_library(stem), name)
        result, taken = _SIGNATURES[name]
        found.restype = _TYPES[result.strip()]
        found.argtypes = [_TYPES[kind] for kind in taken.split(", ") if kind != "void"]
    elif name in _TYPES:
        found = _TYPES[name]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, found)


def unfit() -> str | None:
    """Why the library does not run on this machine, if it is ready-made or missing; else None."""
    if not READY_MADE:
        return None
    if find_spec(PACKAGE) is None:
        return f"there is no ready-made llama.cpp here: {COMPILE} compiles it"
    if sys.platform != "linux":
        return None
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "another C library"
    if not libc.startswith("glibc ") or [*map(int, libc[6:].split("."))] < [2, 38]:
        return (
            f"the ready-made llama.cpp needs glibc 2.38, and here is {libc}: {COMPILE} compiles it"
        )
    if lacks := {"avx2", "bmi2", "f16c", "fma"} - processor()[1]:
        names = ", ".join(sorted(lacks))
        return f"the ready-made llama.cpp needs a processor with {names}: {COMPILE} compiles it"
    return None


@functools.cache
def _library(stem: str) -> ctypes.CDLL:
    import torch  # noqa: F401  # first: llama.cpp then shares its OpenMP

    if (spec := find_spec(PACKAGE)) is None or spec.origin is None:
        raise MissingExtraError("llama.cpp", "llamacpp")
    tested = RELEASES[PACKAGE]
    if (found := version(tested.partition("=")[0])) != tested.rpartition("=")[2]:
        raise ConfigError(f"{tested} is the tested release, and {found} is installed: install it")
    if reason := unfit():
        raise ModelError(reason)
    folder = Path(spec.origin).parent / ("" if READY_MADE else "lib")
    if not (files := sorted(folder.glob(f"*{stem}.[sd][oyl]*"))):
        raise ConfigError(f"{folder} has no library {stem}: install {tested} again")
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise ModelError(f"llama.cpp does not load ({error}): {COMPILE} compiles it") from error
    if stem != "ggml-base":
        set_log = getattr(library, {"llama": "llama_log_set", "mtmd": "mtmd_helper_log_set"}[stem])
        set_log(_collect, None)
    return library


_running = threading.local()
"""The messages of this thread's call, which llama.cpp logs in the thread that calls it."""


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)  # type: ignore[untyped-decorator]
def _collect(level: int, text: bytes, _: object) -> None:
    if level == 4 and hasattr(_running, "errors"):  # GGML_LOG_LEVEL_ERROR of ggml.h
        _running.errors.append(text.decode(errors="replace").strip())


@contextmanager
def errors() -> Iterator[list[str]]:
    """The error messages of this thread's calls; all others are dropped."""
    _running.errors = []
    try:
        yield _running.errors
    finally:
        del _running.errors

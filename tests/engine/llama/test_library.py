"""The header declares what the library's own package declares; what cannot run is named."""

import ctypes
import importlib
from pathlib import Path
from typing import Any

import pytest

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.source import Source
from mico_chat.engines.table import ENGINES, candidates
from mico_chat.errors import ConfigError, MissingExtraError, ModelError

STRUCTS = [name for name in llama_cpp._TYPES if name.startswith(("llama_", "mtmd_"))]
FUNCTIONS = [name for name in llama_cpp._SIGNATURES if name.startswith(("llama_", "mtmd_"))]


def kind(of: Any) -> str:
    """A C type of ctypes or of cffi as it is passed: its size and whether it is a whole number."""
    if of is None or getattr(of, "kind", "") == "void":
        return "none"
    if hasattr(of, "kind"):
        ffi = importlib.import_module("llama_cpp_py_sync._cffi_bindings").ffi
        if of.kind in ("pointer", "function"):
            return "pointer"
        size, real = ffi.sizeof(of), of.cname in ("float", "double")
        return f"{'struct' if of.kind == 'struct' else 'real' if real else 'whole'} {size}"
    if issubclass(of, ctypes.Structure):
        return f"struct {ctypes.sizeof(of)}"
    pointers = (ctypes.c_void_p, ctypes.c_char_p, ctypes._Pointer, ctypes._CFuncPtr)  # type: ignore[attr-defined]
    if issubclass(of, pointers):
        return "pointer"
    return f"{'real' if of is ctypes.c_float else 'whole'} {ctypes.sizeof(of)}"


def own(name: str) -> Any:
    """The package's own declaration of a struct (offsets by field) or of a function (types)."""
    if llama_cpp.READY_MADE:
        bindings = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
        if name in FUNCTIONS:
            library = bindings.get_mtmd_lib() if name.startswith("mtmd") else bindings.get_lib()
            found = bindings.ffi.typeof(getattr(library, name))
            return [found.result, *found.args]
        try:
            found = bindings.ffi.typeof(f"struct {name}")
        except bindings.ffi.error:
            found = bindings.ffi.typeof(name)
        return [field.offset for _, field in found.fields]
    module = importlib.import_module("llama_cpp.mtmd_cpp" if name[:4] == "mtmd" else "llama_cpp")
    found = getattr(module, name)
    if name in FUNCTIONS:
        return [found.restype, *found.argtypes]
    return [getattr(found, field[0]).offset for field in found._fields_]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if not ENGINES["llamacpp"].installed():
        pytest.skip("llama.cpp is not installed")


@pytest.mark.parametrize("name", STRUCTS)
def test_structs_are_the_librarys(name: str) -> None:
    ours = getattr(llama_cpp, name)
    assert [getattr(ours, field).offset for field, _ in ours._fields_] == own(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_the_librarys(name: str) -> None:
    ours = getattr(llama_cpp, name)
    assert list(map(kind, [ours.restype, *ours.argtypes])) == list(map(kind, own(name)))


@pytest.mark.parametrize(
    ("libc", "flags", "said"),
    [
        ("glibc 2.36", "avx2 bmi2 f16c fma", "needs glibc 2.38, and here is glibc 2.36"),
        ("", "avx2 bmi2 f16c fma", "and here is another C library"),
        ("glibc 2.38", "avx f16c", "needs a processor with avx2, bmi2, fma"),
        ("glibc 2.41", "avx2 bmi2 f16c fma", None),
    ],
)
def test_a_library_that_cannot_run_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, libc: str, flags: str, said: str | None
) -> None:
    monkeypatch.setattr(llama_cpp, "READY_MADE", True)
    monkeypatch.setattr("os.confstr", lambda _: libc or None)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(llama_cpp, "processor", lambda: ("", frozenset(flags.split())))
    reason = llama_cpp.unfit()
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)
    assert said is None or "pip install 'mico-chat[compiled]'" in str(reason)
    source = Source.of("mini")
    chosen = [row.name for row, _ in candidates(EngineOptions(device="cpu"), source)]
    assert chosen[0] == ("llamacpp" if said is None else "transformers")


def test_another_release_and_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = llama_cpp._library.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "version", lambda name: "0.1")
        with pytest.raises(ConfigError, match=r"==0\.\d+(\.\d+)? is the tested release, and 0\.1"):
            load("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda *_: iter(()))
        with pytest.raises(ConfigError, match="has no library mtmd"):
            load("mtmd")
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", broken)
        with pytest.raises(ModelError, match=r"does not load \(libgomp.*mico-chat\[compiled\]"):
            load("llama")
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mico-chat\[llamacpp\]"):
        load("llama")


def broken(path: str) -> Any:
    raise OSError("libgomp.so.1: cannot open shared object file")

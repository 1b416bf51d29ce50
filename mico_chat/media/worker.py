"""Decodes one medium in this process; and the worker process, which does nothing else.

:class:`~mico_chat.media.decoder.MediaDecoder` starts :func:`main` in a new interpreter, which has
no state, files or secrets of the server, and isolates itself (:mod:`mico_chat.media.sandbox`). The
pipes carry JSON headers and raw bytes, not pickle: even if a hostile file takes over the worker,
the server reads only reports and arrays of numbers. A frame is a length, 8 bytes little-endian, and
as many bytes. A file comes open, through a socket: the worker cannot open it.
"""

import dataclasses
import faulthandler
import gc
import json
import logging
import mmap
import os
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO, cast, get_args

import numpy as np

from mico_chat import system
from mico_chat.errors import LimitError, MediaError, MissingFileError
from mico_chat.media.file import MediaFile, MediaLimits, OpenFile, Remote, TarMember
from mico_chat.media.kinds import KINDS, TABLE, Kind
from mico_chat.media.medium import (
    Audio,
    Depth,
    Image,
    MediaReport,
    Medium,
    Pages,
    Video,
)
from mico_chat.media.sandbox import isolate
from mico_chat.media.view import View


@cache
def _decoder(kind: Kind) -> Callable[[MediaFile, MediaLimits], Medium]:
    """A kind's decoder, imported when it is first used: a process that decodes nothing has none."""
    name = TABLE[kind].decoder
    module, sign, function = name.partition(":")
    if not sign:
        module, _, function = f".{name}".rpartition(".")
    found = getattr(import_module(module, __package__), function)
    return cast("Callable[[MediaFile, MediaLimits], Medium]", found)


_END_GRACE_S = 5.0
"""Seconds after the time limit before the process ends itself, if its parent has not killed it."""

_FILE_FIELDS = ("kind", "name", "depth_scale", "sampling", "seed", "view")
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 16 << 20  # a million characters of a document, each escaped
_DTYPES = {"uint8": np.uint8, "float32": np.float32, "float64": np.float64}
_ERRORS: dict[str, type[MediaError]] = {
    error.__name__: error for error in (MediaError, LimitError, MissingFileError)
}


def decode(file: MediaFile, limits: MediaLimits | None = None) -> Medium:
    """Decode one medium in this process: for trusted media, and in the worker.

    ``timeout_s`` and ``memory_mb`` only have an effect in a worker.
    """
    limits = limits or MediaLimits()
    if isinstance(file.source, TarMember | Remote):
        file = dataclasses.replace(file, source=file.read())
    file.check(limits)
    if file.kind not in TABLE:
        raise MediaError(
            file.name,
            f"unknown kind '{file.kind}'; the kinds are {', '.join(KINDS)}",
            "unsupported",
        )
    started = time.perf_counter()
    medium = _decoder(file.kind)(file, limits)
    decode_ms = round((time.perf_counter() - started) * 1000, 1)
    report = medium.report.model_copy(update={"decode_ms": decode_ms})
    return dataclasses.replace(medium, report=report)


# --- the process ----------------------------------------------------------------------------------


_IMPORTED_LATE = (
    "av.subtitles.stream",
    "encodings.cp437",
    "encodings.utf_16_le",
    "encodings.utf_8_sig",
    "pillow_heif.as_plugin",
    "pypdfium2",
)
"""Modules that some files need, and that are imported at their first use. Then it is too late."""

_KEPT_BYTES = 64 * 1024 * 1024
"""Memory that an idle worker may keep, beside the 90 MiB or so that it has from the start."""


class _Memory:
    """This process's memory, by a file that is opened before no file can be."""

    def __init__(self) -> None:
        pages = Path("/proc/self/statm")  # Linux's
        self._pages = pages.open("rb", buffering=0) if pages.exists() else None
        self._usual = self._resident() + _KEPT_BYTES

    def stays_large(self, n_bytes: int) -> bool:
        """Whether more is in use than usual and ``n_bytes``, after free memory is given back."""
        if self._resident() <= self._usual + n_bytes:
            return False
        gc.collect()
        system.give_back_memory()
        return self._resident() > self._usual + n_bytes

    def _resident(self) -> int:
        if self._pages is None:
            return 0
        self._pages.seek(0)
        return int(self._pages.read(100).split()[1]) * mmap.PAGESIZE


def main(channel: int | None = None) -> None:
    """Answer requests; files come through the socket ``channel``, if there is one."""
    # The answers' pipe gets a new file descriptor, so that no library prints into it.
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    files = None if channel is None else socket.socket(fileno=channel)
    limits = MediaLimits.model_validate(read_header(requests))
    # Imported here: it takes a tenth of a second, and this process alone needs it.
    from charset_normalizer.constant import IANA_SUPPORTED

    for module in (*_IMPORTED_LATE, *(f"encodings.{name}" for name in IANA_SUPPORTED)):
        import_module(module)
    for kind in TABLE:  # a worker that is isolated can open no file, not even a module's
        _decoder(kind)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # to print one, Python reads the source that warns
    _limit_memory(limits.memory_mb)
    memory = _Memory()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # libraries print warnings on hostile files
    write_header(answers, {"ready": True, "exposed": isolate()})
    answers.flush()
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    while True:
        try:
            _serve_one(requests, answers, files, limits, memory)
        except EOFError:
            return


def _serve_one(
    requests: BinaryIO,
    answers: BinaryIO,
    files: socket.socket | None,
    limits: MediaLimits,
    memory: _Memory,
) -> None:
    answer = _answer(_read_file(requests, answers, files, limits.max_bytes), limits)
    if isinstance(answer, dict):
        write_header(answers, answer | {"large": memory.stays_large(0)})
    else:
        n_bytes = sum(array.nbytes for array in answer.all_arrays)
        write_medium(answers, answer, large=memory.stays_large(n_bytes))
    answers.flush()


def _answer(file: MediaFile, limits: MediaLimits) -> Medium | dict[str, Any]:
    """The medium, or the fields of a MediaError: the error itself would keep the file's bytes."""
    try:
        with _time_limit(limits, file.name):
            return decode(file, limits)
    except MediaError as error:
        return _fields(error)
    except MemoryError:
        return _fields(limits.exceeded(file.name, "memory_mb", "decoding needs more memory"))
    finally:
        if isinstance(file.source, OpenFile):
            os.close(file.source.descriptor)


def _limit_memory(memory_mb: int) -> None:
    if sys.platform == "linux":  # macOS has RLIMIT_AS and ignores it
        system.limit("RLIMIT_AS", memory_mb * 1024 * 1024)
        system.limit("RLIMIT_CORE", 0)


@contextmanager
def _time_limit(limits: MediaLimits, name: str) -> Iterator[None]:
    """Stop decoding when the time is over and a library next returns to Python.

    If no library returns, the parent soon kills this process. If the parent is gone, the process
    ends itself.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise limits.out_of_time(name)

    faulthandler.dump_traceback_later(limits.timeout_s + _END_GRACE_S, exit=True)
    try:
        with system.alarm(limits.timeout_s, stop):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# --- the pipes ------------------------------------------------------------------------------------


def write_frame(stream: IO[bytes], data: bytes | memoryview) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)


def read_frame(stream: IO[bytes], max_bytes: int) -> bytes:
    (n,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if n > max_bytes:
        raise ValueError(f"a frame of {n} bytes, more than {max_bytes}")
    return _exactly(stream, n)


def _exactly(stream: IO[bytes], n: int) -> bytes:
    data = stream.read(n)
    if len(data) < n:
        raise EOFError(f"{len(data)} of {n} bytes")
    return data


def write_header(stream: IO[bytes], header: dict[str, Any]) -> None:
    write_frame(stream, json.dumps(header).encode())


def read_header(stream: IO[bytes]) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(read_frame(stream, _MAX_HEADER)))


def write_file(stream: IO[bytes], file: MediaFile, files: socket.socket | None = None) -> None:
    """Ask for a medium: with its open file through the socket ``files``, or with its bytes."""
    view = dataclasses.asdict(dataclasses.replace(file.view, processor={}, sampler=None))
    view["sampler"] = file.view.sampler is not None
    header = {name: getattr(file, name) for name in _FILE_FIELDS} | {"view": view}
    if files is None or file.path is None:
        data = file.read()
        write_header(stream, header | {"size": None})
        write_frame(stream, data)
        stream.flush()
        return
    with file.open() as opened:
        write_header(stream, header | {"size": os.fstat(opened.fileno()).st_size})
        stream.flush()
        socket.send_fds(files, [b"f"], [opened.fileno()])


def _read_file(
    stream: IO[bytes], answers: IO[bytes], files: socket.socket | None, max_bytes: int
) -> MediaFile:
    header = read_header(stream)
    view = header["view"] | {"pages": tuple(header["view"]["pages"])}

    def sampler(n_frames: int, seconds: float) -> list[int]:
        write_header(answers, {"clip": [n_frames, seconds]})
        answers.flush()
        return cast("list[int]", read_header(stream)["frames"])

    header["view"] = View(**view | {"sampler": sampler if view["sampler"] else None})
    size = header.pop("size")
    if size is None:
        return MediaFile(source=read_frame(stream, max_bytes), **header)
    assert files is not None
    _, descriptors, _, _ = socket.recv_fds(files, 1, 1)
    if not descriptors:
        raise EOFError("no file came")
    return MediaFile(source=OpenFile(descriptors[0], size), **header)


def write_medium(stream: IO[bytes], medium: Medium, *, large: bool) -> None:
    write_header(stream, described(medium) | {"large": large})
    for array in medium.all_arrays:
        write_frame(stream, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def described(medium: Medium) -> dict[str, Any]:
    return {
        "type": type(medium).__name__,
        "report": medium.report.model_dump(),
        "metric": isinstance(medium, Depth) and medium.metric,
        "arrays": [[array.dtype.name, *array.shape] for array in medium.own_arrays],
        "inner": [described(one) for one in medium.inner],
    }


def _fields(error: MediaError) -> dict[str, Any]:
    fields = {"name": error.name, "reason": error.reason, "fault": error.fault}
    return {"error": type(error).__name__, **fields}


def read_medium(stream: IO[bytes], header: dict[str, Any], max_bytes: int) -> Medium:
    """Receive the medium of a header, or raise the MediaError sent in its place."""
    if "error" in header:
        raise _ERRORS[header["error"]](header["name"], header["reason"], header["fault"])
    classes = [one for own in get_args(Medium) for one in (own, *own.__subclasses__())]
    (kind,) = (one for one in classes if one.__name__ == header["type"])
    report = MediaReport.model_validate(header["report"])
    values: dict[str, Any] = {"metric": bool(header["metric"])} if issubclass(kind, Depth) else {}
    for name, (dtype, *shape) in zip(kind.arrays, header["arrays"], strict=True):
        data = bytearray(read_frame(stream, max_bytes))
        values[name] = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
        max_bytes -= len(data)
    inner: list[Medium] = []
    for one in header["inner"]:
        inner.append(read_medium(stream, one, max_bytes))
        max_bytes -= sum(array.nbytes for array in inner[-1].all_arrays)
    if kind is Pages and all(isinstance(one, Image) for one in inner):
        values |= {"kind": report.kind, "pages": tuple(inner)}
    elif kind is Video and len(inner) == 1 and isinstance(inner[0], Audio):
        values["audio"] = inner[0]
    elif inner or kind is Pages:
        raise ValueError(f"{kind.__name__} with {len(inner)} media in it")
    medium: Medium = kind(report=report, **values)
    return medium

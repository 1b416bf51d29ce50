"""Decodes one medium in this process; and the worker process, which does nothing else.

:class:`~mico_chat.media.decoder.MediaDecoder` starts :func:`main` in a new interpreter, which has
no state, files or secrets of the server. The pipes carry JSON headers and raw bytes, not pickle:
even if a hostile file takes over the worker, the server reads only reports and arrays of numbers.
A frame is a length, 8 bytes little-endian, and as many bytes.
"""

import dataclasses
import faulthandler
import json
import logging
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, BinaryIO, cast

import numpy as np

from mico_chat.errors import LimitError, MediaError, MissingFileError
from mico_chat.media.audio import decode_audio
from mico_chat.media.file import MediaFile, MediaLimits, Remote, TarMember
from mico_chat.media.image import decode_image
from mico_chat.media.kinds import KINDS
from mico_chat.media.maps import decode_depth, decode_normal
from mico_chat.media.medium import (
    Audio,
    Depth,
    Image,
    MediaReport,
    Medium,
    Normal,
    Video,
    with_track,
)
from mico_chat.media.video import decode_video

_DECODERS: dict[str, Callable[[MediaFile, MediaLimits], Medium]] = {
    "image": decode_image,
    "audio": decode_audio,
    "video": decode_video,
    "depth": decode_depth,
    "normal": decode_normal,
}

_END_GRACE_S = 5.0
"""Seconds after the time limit before the process ends itself, if its parent has not killed it."""

_FILE_FIELDS = ("kind", "name", "depth_scale", "sampling", "seed")
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 1 << 20
_ARRAYS: dict[type[Medium], tuple[str, ...]] = {
    Image: ("pixels",),
    Normal: ("pixels",),
    Audio: ("samples",),
    Depth: ("values",),
    Video: ("frames", "times"),
}
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
    if file.kind not in _DECODERS:
        raise MediaError(
            file.name,
            f"unknown kind '{file.kind}'; the kinds are {', '.join(KINDS)}",
            "unsupported",
        )
    started = time.perf_counter()
    medium = _DECODERS[file.kind](file, limits)
    decode_ms = round((time.perf_counter() - started) * 1000, 1)
    report = medium.report.model_copy(update={"decode_ms": decode_ms})
    return dataclasses.replace(medium, report=report)


# --- the process ----------------------------------------------------------------------------------


def main() -> None:
    # The answers' pipe gets a new file descriptor, so that no library prints into it.
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits = MediaLimits.model_validate(read_header(requests))
    logging.disable(logging.CRITICAL)
    _limit_memory(limits.memory_mb)
    write_header(answers, {"ready": True})
    answers.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)  # libraries print warnings on hostile files
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    while True:
        try:
            _serve_one(requests, answers, limits)
        except EOFError:
            return


def _serve_one(requests: BinaryIO, answers: BinaryIO, limits: MediaLimits) -> None:
    file = _read_file(requests, limits.max_bytes)
    try:
        with _time_limit(limits, file.name):
            medium = decode(file, limits)
    except MediaError as error:
        _write_error(answers, error)
    except MemoryError:
        _write_error(answers, limits.exceeded(file.name, "memory_mb", "decoding needs more memory"))
    else:
        _write_medium(answers, medium)


def _limit_memory(memory_mb: int) -> None:
    if sys.platform == "linux":  # macOS has RLIMIT_AS and ignores it
        import resource

        n_bytes = memory_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _time_limit(limits: MediaLimits, name: str) -> Iterator[None]:
    """Stop decoding when the time is over and a library next returns to Python.

    If no library returns, the parent soon kills this process. If the parent is gone, the process
    ends itself.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise limits.out_of_time(name)

    faulthandler.dump_traceback_later(limits.timeout_s + _END_GRACE_S, exit=True)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
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


def write_file(stream: IO[bytes], file: MediaFile) -> None:
    """Ask for a medium, by the path of its file or with its bytes."""
    path = None if file.path is None else str(file.path.absolute())
    data = file.read() if path is None else None
    header = {name: getattr(file, name) for name in _FILE_FIELDS}
    write_header(stream, header | {"path": path})
    if data is not None:
        write_frame(stream, data)
    stream.flush()


def _read_file(stream: IO[bytes], max_bytes: int) -> MediaFile:
    header = read_header(stream)
    source = header.pop("path")
    if source is None:
        source = read_frame(stream, max_bytes)
    return MediaFile(source=source, **header)


def _write_medium(stream: IO[bytes], medium: Medium) -> None:
    media = with_track(medium)
    arrays = [[getattr(part, name) for name in _ARRAYS[type(part)]] for part in media]
    parts = [
        {
            "kind": part.kind,
            "report": part.report.model_dump(),
            "metric": isinstance(part, Depth) and part.metric,
            "arrays": [[array.dtype.name, *array.shape] for array in own],
        }
        for part, own in zip(media, arrays, strict=True)
    ]
    write_header(stream, {"parts": parts})
    for array in (array for own in arrays for array in own):
        write_frame(stream, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def _write_error(stream: IO[bytes], error: MediaError) -> None:
    fields = {"name": error.name, "reason": error.reason, "fault": error.fault}
    write_header(stream, {"error": type(error).__name__, **fields})
    stream.flush()


def read_medium(stream: IO[bytes], max_bytes: int) -> Medium:
    """Receive a medium, or raise the MediaError sent in its place."""
    header = read_header(stream)
    if "error" in header:
        raise _ERRORS[header["error"]](header["name"], header["reason"], header["fault"])
    match [_read_part(stream, part, max_bytes) for part in header["parts"]]:
        case [medium]:
            return medium
        case [Video() as video, Audio() as track]:
            return dataclasses.replace(video, audio=track)
    raise ValueError("neither one medium nor a video and its sound track")


def _read_part(stream: IO[bytes], part: dict[str, Any], max_bytes: int) -> Medium:
    (kind,) = (kind for kind in _ARRAYS if kind.kind == part["kind"])
    values: dict[str, Any] = {"metric": bool(part["metric"])} if kind is Depth else {}
    for name, (dtype, *shape) in zip(_ARRAYS[kind], part["arrays"], strict=True):
        data = bytearray(read_frame(stream, max_bytes))
        values[name] = np.frombuffer(data, _DTYPES[dtype]).reshape(shape)
    return kind(report=MediaReport.model_validate(part["report"]), **values)

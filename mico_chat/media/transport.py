"""What goes over the pipes to and from a decoder process: JSON headers and raw bytes.

No pickle: should a hostile file take over the decoder, its answers still can be nothing but
arrays of the agreed types. A frame is an 8-byte little-endian length and that many bytes.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import LimitError, MediaError, MissingFileError
from mico_chat.media.medium import Audio, Depth, Image, MediaReport, Medium, Normal, Video

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 1 << 20
_DTYPES = {"uint8": np.uint8, "float32": np.float32, "float64": np.float64}
_ERRORS: dict[str, type[MediaError]] = {
    error.__name__: error for error in (MediaError, LimitError, MissingFileError)
}


def write_frame(stream: IO[bytes], data: bytes | memoryview) -> None:
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)


def read_frame(stream: IO[bytes], max_bytes: int) -> bytes:
    """One frame.

    Raises:
        EOFError: the other side is gone.
        ValueError: a frame longer than ``max_bytes``.
    """
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


def write_medium(stream: IO[bytes], medium: Medium) -> None:
    """Send a medium: its reports and the shapes of its arrays, then the arrays."""
    arrays: list[NDArray[Any]]
    reports = [medium.report]
    match medium:
        case Image() | Normal():
            arrays = [medium.pixels]
        case Audio():
            arrays = [medium.samples]
        case Depth():
            arrays = [medium.values]
        case Video():
            arrays = [medium.frames, medium.times]
            if medium.audio is not None:
                arrays.append(medium.audio.samples)
                reports.append(medium.audio.report)
    write_header(
        stream,
        {
            "kind": medium.kind,
            "metric": medium.metric if isinstance(medium, Depth) else None,
            "reports": [report.model_dump() for report in reports],
            "arrays": [[array.dtype.name, *array.shape] for array in arrays],
        },
    )
    for array in arrays:
        write_frame(stream, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def write_error(stream: IO[bytes], error: MediaError) -> None:
    told = {"name": error.name, "reason": error.reason, "fault": error.fault}
    write_header(stream, {"error": type(error).__name__, **told})
    stream.flush()


def read_medium(stream: IO[bytes], max_bytes: int) -> Medium:
    """Receive a medium, or raise the MediaError sent in its place.

    Raises:
        MediaError: the decoder's verdict.
        EOFError: the other side is gone.
        ValueError, KeyError, TypeError: not a medium.
    """
    header = read_header(stream)
    if "error" in header:
        raise _ERRORS[header["error"]](header["name"], header["reason"], header["fault"])
    reports = [MediaReport.model_validate(report) for report in header["reports"]]
    arrays: list[NDArray[Any]] = []
    for dtype, *shape in header["arrays"]:
        data = read_frame(stream, max_bytes)
        arrays.append(np.frombuffer(bytearray(data), _DTYPES[dtype]).reshape(shape))
    match header["kind"]:
        case "image":
            return Image(arrays[0], reports[0])
        case "normal":
            return Normal(arrays[0], reports[0])
        case "audio":
            return Audio(arrays[0], report=reports[0])
        case "depth":
            return Depth(arrays[0], bool(header["metric"]), reports[0])
        case "video":
            sound = Audio(arrays[2], report=reports[1]) if len(arrays) > 2 else None
            return Video(arrays[0], arrays[1], sound, reports[0])
    raise ValueError(f"no medium of kind {header['kind']}")

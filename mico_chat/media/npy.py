"""One array out of an untrusted .npy or .npz: the header is checked before any data is read.

``numpy.load`` reads whole members and trusts the header's shape; here no more is read than a
map of an allowed size takes, so that neither a huge shape nor a zip bomb costs memory.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media.limits import MediaLimits
from mico_chat.media.source import Source

_MAX_HEADER = 10_000
"""Bytes; numpy's own limit on a header it parses as a literal."""

_MAX_SIDE = 2**63 - 1


def read_array(source: Source, fmt: str, limits: MediaLimits) -> NDArray[Any]:
    """Read a map (H, W) of real numbers; (H, W, 1) and (1, H, W) are flattened to it.

    An .npz must hold one array, or one named ``depth``.

    Raises:
        MediaError: no such array, objects inside (pickle), wrong shape or type, truncated.
        LimitError: more values than ``limits.max_pixels``.
    """
    with source.open() as stream:
        if fmt == "NPY":
            return _read(source.name, stream, limits)
        try:
            archive = zipfile.ZipFile(stream)
        except zipfile.BadZipFile as error:
            raise MediaError(source.name, "damaged or truncated NPZ archive", "damaged") from error
        with archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            member = "depth.npy" if "depth.npy" in members else None
            if member is None and len(members) == 1:
                member = members[0]
            if member is None:
                raise MediaError(
                    source.name,
                    f"the archive holds {len(members)} arrays and none is named 'depth'; "
                    "a depth map needs one array, or one of that name",
                )
            if archive.getinfo(member).flag_bits & 1:
                raise MediaError(
                    source.name, "the archive is encrypted; save it without a password"
                )
            with archive.open(member) as opened:
                return _read(source.name, opened, limits)


def _read(name: str, stream: IO[bytes], limits: MediaLimits) -> NDArray[Any]:
    shape, fortran, dtype = _header(name, stream)
    if dtype.hasobject:
        raise MediaError(name, "holds Python objects, which are never loaded; save plain numbers")
    if dtype.kind not in "fiu":
        held = "records" if dtype.kind == "V" else f"values of type {dtype}"
        raise MediaError(name, f"holds {held}; a depth map needs real numbers")
    sides = tuple(side for side in shape if side != 1) if len(shape) == 3 else shape
    if len(shape) == 3 and len(sides) < 2:
        sides = shape[:2] if shape[2] == 1 else shape[1:]
    if len(sides) != 2:
        found = f"shape {shape}" if len(shape) < 6 else f"{len(shape)} dimensions"
        raise MediaError(name, f"has {found}; a depth map has shape (height, width)")
    limits.check_pixels(name, sides[1], sides[0])
    n_bytes = math.prod(sides) * dtype.itemsize
    data = stream.read(n_bytes)
    if len(data) < n_bytes:
        raise MediaError(
            name,
            f"truncated array (its header says {n_bytes} bytes, it holds {len(data)})",
            "damaged",
        )
    flat = np.frombuffer(data, dtype)
    return flat.reshape(sides, order="F" if fortran else "C")


def _header(name: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type; numpy parses it once its length is sane."""
    start = stream.read(8)
    wide = start[6:7] in (b"\x02", b"\x03")
    length = stream.read(4 if wide else 2)
    n = int.from_bytes(length, "little")
    if len(start) < 8 or start[:6] != b"\x93NUMPY" or n > _MAX_HEADER:
        raise MediaError(name, "damaged NPY (its header cannot be read)", "damaged")
    header = io.BytesIO(length + stream.read(n))
    parse = np.lib.format.read_array_header_2_0 if wide else np.lib.format.read_array_header_1_0
    try:
        shape, fortran, dtype = parse(header, max_header_size=_MAX_HEADER)
        if any(abs(side) > _MAX_SIDE for side in shape):
            raise ValueError("a side that no array has")
    except (ValueError, MemoryError) as error:  # Python's parser has a stack of its own
        raise MediaError(name, "damaged NPY (its header cannot be read)", "damaged") from error
    return shape, fortran, dtype

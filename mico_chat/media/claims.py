"""What a raster file's header claims that costs its decoder memory or time, read before it does."""

from __future__ import annotations

import re
import struct
from typing import BinaryIO

from mico_chat.errors import MediaError
from mico_chat.media.limits import MediaLimits
from mico_chat.media.source import Source

MAX_SCANS = 100
"""Scans of a progressive JPEG: encoders write about ten, and each is a pass over all pixels."""

MAX_SEGMENTS = 10_000
"""Of a JPEG's header; a colour profile of 16 MiB takes 256."""

_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those are tables
_SCAN, _END = 0xDA, 0xD9
# In image data, 0xff is followed by 0 or a restart marker; anything else ends the scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def check_claims(source: Source, fmt: str, limits: MediaLimits) -> None:
    """Refuse what Pillow's parsers would believe.

    Raises:
        LimitError: more than ``max_pixels`` in a PNG or WebP.
        MediaError: more scans or segments in a JPEG than any encoder writes.
    """
    if fmt == "PNG" and source.head[12:16] == b"IHDR" and len(source.head) >= 24:
        # Pillow reads on to the image data first, and a bomb need not have any.
        limits.check_pixels(source.name, *struct.unpack(">II", source.head[16:24]))
    elif fmt == "WebP" and (size := _webp_size(source.head)) is not None:
        # Pillow has libwebp set up its canvas before it tells the size.
        limits.check_pixels(source.name, *size)
    elif fmt == "JPEG":
        with source.open() as stream:
            if not _is_progressive(source.name, stream):
                return
            scans = _scans(stream)
        if scans > MAX_SCANS:
            raise MediaError(
                source.name,
                f"{scans} scans in a progressive JPEG, more than the {MAX_SCANS} that are read; "
                "save it anew",
            )


def _webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height by the first chunk of a WebP file (RFC 9649, 2.5 to 2.7)."""
    if len(head) < 30:
        return None
    chunk = head[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _is_progressive(name: str, stream: BinaryIO) -> bool:
    """Walk a JPEG's header up to its frame; False where it has none."""
    stream.seek(2)
    for _ in range(MAX_SEGMENTS):
        start = stream.read(4)
        if len(start) < 4 or start[0] != 0xFF or start[1] == _SCAN:
            return False
        if start[1] in _FRAMES:
            return start[1] in _PROGRESSIVE
        stream.seek(max(0, int.from_bytes(start[2:], "big") - 2), 1)
    raise MediaError(
        name, f"damaged JPEG (no picture behind {MAX_SEGMENTS:,} parts of its header)", "damaged"
    )


def _scans(stream: BinaryIO) -> int:
    """How many scans a JPEG has."""
    stream.seek(0)
    data = stream.read()
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) is not None:
        marker = data[found.start() + 1]
        if marker == _END:
            break
        scans += marker == _SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans

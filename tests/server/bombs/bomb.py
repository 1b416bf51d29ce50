"""What a hand-made hostile file is, and what several of them are made of."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from mico_chat.media.kinds import Kind


@dataclass(frozen=True)
class Bomb:
    """A file that costs a decoder far more than its size, or leads it astray.

    ``make`` gets a random generator to pick figures with. What must not fail is harmless once the
    trick is seen through; it may be refused all the same.
    """

    make: Callable[[Random], bytes]
    kind: Kind
    extension: str
    must_fail: bool = True

    @property
    def name(self) -> str:
        """What it does, in a few words."""
        return self.make.__name__


@cache
def zeros(megabytes: int) -> bytes:
    """So many zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    million = bytes(1 << 20)
    return b"".join([*(packer.compress(million) for _ in range(megabytes)), packer.flush()])


def riff(kind: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A RIFF file, as WAV, AVI and WebP are."""
    body = kind + b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def resized(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]

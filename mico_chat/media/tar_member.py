"""A file inside a tar: a shard's medium is read where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TarMember:
    """Bytes inside a tar, read with one seek and no open handle (so it crosses processes)."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

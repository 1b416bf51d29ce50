"""Where a medium's bytes come from: a path or bytes, checked before anything reads them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from mico_chat.errors import MediaError, MicoError, MissingFileError
from mico_chat.media.limits import MediaLimits
from mico_chat.media.signature import HEAD_BYTES, format_of, looks_like


@dataclass(frozen=True)
class Source:
    """The encoded bytes of one medium: a regular file (``path``) or ``data``."""

    name: str
    size: int
    path: Path | None
    data: bytes | None

    def open(self) -> BinaryIO:
        """A new seekable stream at the start of the bytes."""
        if self.path is None:
            return io.BytesIO(self.data or b"")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise unreadable(self.name, error) from error

    @cached_property
    def head(self) -> bytes:
        """The first bytes, enough for ``format_of``."""
        with self.open() as stream:
            return stream.read(HEAD_BYTES)

    def tail(self, n: int) -> bytes:
        """The last ``n`` bytes, or all when there are fewer."""
        with self.open() as stream:
            stream.seek(max(0, self.size - n))
            return stream.read(n)

    def format_among(self, formats: frozenset[str], what: str) -> str:
        """The format, which must be one of ``formats``.

        Raises:
            MediaError: ``"x.png: not an image: the bytes look like text"``.
        """
        fmt = format_of(self.head)
        if fmt is None or fmt not in formats:
            raise MediaError(
                self.name,
                f"not {what}: the bytes {looks_like(fmt, self.head)}; "
                f"use one of {', '.join(sorted(formats))}",
                "unsupported",
            )
        return fmt


def source_of(source: str | os.PathLike[str] | bytes, name: str, limits: MediaLimits) -> Source:
    """Check that the bytes exist and are within ``max_bytes``, reading none of them.

    ``name`` is what errors and the report call the medium; a path's default is its file name.

    Raises:
        MissingFileError: no such file.
        MediaError: a folder, a device, unreadable, or empty.
        LimitError: more than ``max_bytes``.
    """
    if isinstance(source, bytes):
        checked = Source(name or "upload", len(source), None, source)
    else:
        path = Path(source)
        checked = Source(name or path.name, file_size(path, name or str(path)), path, None)
    if checked.size == 0:
        raise MediaError(checked.name, "file is empty (0 bytes)", "empty")
    if checked.size > limits.max_bytes:
        raise limits.exceeded(checked.name, "max_bytes", f"{checked.size} bytes")
    return checked


def file_size(path: Path, name: str) -> int:
    """Bytes of a regular file.

    Raises:
        MissingFileError: no such file.
        MediaError: a folder, a device, or unreadable.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise MissingFileError(name) from error
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(name, "is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(name, "is not a regular file")
    return status.st_size


def unreadable(name: str, error: OSError | ValueError) -> MediaError:
    """The error to raise for a file that the system does not give."""
    if isinstance(error, FileNotFoundError):
        return MissingFileError(name)
    if isinstance(error, PermissionError):
        return MediaError(name, "may not be read (permission denied)")
    return MediaError(name, "cannot be read from disk")


@contextmanager
def decoder_errors(source: Source, limits: MediaLimits, reason: str) -> Iterator[None]:
    """Turn whatever a decoder raises on hostile bytes into one MediaError that says ``reason``.

    Decoders raise nearly every built-in exception on damaged files, so all are caught here, at
    the one border to them; the original stays chained for debugging.
    """
    try:
        yield
    except MicoError:
        raise
    except MemoryError as error:
        raise limits.exceeded(source.name, "memory_mb", "decoding needs more memory") from error
    except Exception as error:
        raise MediaError(source.name, reason, "damaged") from error

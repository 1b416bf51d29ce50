"""Opening audio and video containers: one demuxer, chosen by the bytes, over a plain stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Stream

from mico_chat.errors import MediaError
from mico_chat.media.source import Source

# FFmpeg's demuxer for each format. Naming it keeps FFmpeg from probing the bytes itself, which
# would let a playlist (HLS, concat) through and with it other files and addresses.
_DEMUXERS = {
    "MP4": "mov",
    "MOV": "mov",
    "M4A": "mov",
    "WebM": "matroska",
    "AVI": "avi",
    "WAV": "wav",
    "FLAC": "flac",
    "MP3": "mp3",
    "OGG": "ogg",
    "AAC": "aac",
    "AIFF": "aiff",
}


class _Reader:
    """A stream read by Python code, which sees a time limit's signal while FFmpeg reads on."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, n: int) -> bytes:
        return self._stream.read(n)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


_TELLS_INDEX = hasattr(Stream, "index_entries")
"""PyAV before 17 does not: a clip's frames are then found by reading its packets."""


def index_of(stream: Stream) -> Sequence[Any]:
    """The container's index of a stream's frames, PyAV's ``IndexEntry``s; empty where untold."""
    return list(stream.index_entries) if _TELLS_INDEX else ()


@contextmanager
def opened(source: Source, fmt: str) -> Iterator[InputContainer]:
    """A container over the source's bytes, closed at the end.

    Raises:
        MediaError: the header or index cannot be read, or lists more than the file can hold.
    """
    with source.open() as stream:
        try:
            container = av.open(
                _Reader(stream), "r", format=_DEMUXERS[fmt], metadata_errors="ignore"
            )
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError, OSError) as error:
            raise MediaError(
                source.name,
                f"damaged {fmt} (its header or index cannot be read; the file may be cut off)",
                "damaged",
            ) from error
        with container:
            for listed in (len(index_of(stream)) for stream in container.streams):
                if listed > source.size:
                    raise MediaError(
                        source.name,
                        f"damaged {fmt} (its index lists {listed:,} pieces of data in a file of "
                        f"{source.size:,} bytes)",
                        "damaged",
                    )
            yield container

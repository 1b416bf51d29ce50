"""Opening audio and video containers: one demuxer, chosen by the bytes, over a plain stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import av
from av.container import InputContainer

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


@contextmanager
def opened(source: Source, fmt: str) -> Iterator[InputContainer]:
    """A container over the source's bytes, closed at the end.

    Raises:
        MediaError: the header or index cannot be read.
    """
    with source.open() as stream:
        try:
            container = av.open(stream, "r", format=_DEMUXERS[fmt], metadata_errors="ignore")
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError, OSError) as error:
            raise MediaError(
                source.name,
                f"damaged {fmt} (its header or index cannot be read; the file may be cut off)",
            ) from error
        with container:
            yield container

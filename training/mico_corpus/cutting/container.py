"""A row's bytes as something that FFmpeg opens.

A file in a folder is opened as it is, a member of a tar as a range of the tar. What lies at an
address is copied first; each process keeps the last copies, and removes them at its end. Times are
seconds of the file: 0 is where a player starts, the earliest time stamp of any stream.
"""

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.video.stream import VideoStream

from mico_chat.errors import MediaError, MicoError, MissingFileError
from mico_chat.media import MediaFile
from mico_chat.media.addresses import located
from mico_chat.media.addresses import opened as bytes_of
from mico_chat.media.video import picture_stream
from mico_corpus.rows import Row

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,wav,flac,mp3,aac,aiff"
"""FFmpeg's demuxers that may open a file. Those of playlists would open other files, too."""
KEPT_COPIES = 4


@dataclass(frozen=True)
class Stored:
    """Bytes on this machine: a file, or a range of one."""

    path: Path
    offset: int
    size: int
    whole: bool

    @property
    def url(self) -> str:
        if self.whole:
            return f"file:{self.path}"
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{self.path}"

    def open(self) -> BinaryIO:
        """The stream stands at the first byte; the caller reads ``size`` of them."""
        stream = self.path.open("rb")
        stream.seek(self.offset)
        return stream


def chunks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a stream, or those that are there, a megabyte at a time."""
    while size and (data := stream.read(min(size, 1 << 20))):
        yield data
        size -= len(data)


def name_of(row: Row) -> str:
    return "/".join(str(row[part]) for part in ("address", "member") if row[part])


def stored(row: Row) -> Stored:
    """The row's bytes; what lies at an address is copied, if it is not among the last copies.

    Raises:
        MissingFileError: there is no such file, or it cannot be read.
    """
    name, place = name_of(row), located(row["address"])
    if not isinstance(place, Path):
        place = _copies.get(row, name)
        return Stored(place, 0, place.stat().st_size, whole=True)
    try:
        file = MediaFile("video", place, name)
        size = file.size
        file.open().close()
    except MissingFileError:
        raise
    except MediaError as error:
        raise MissingFileError(name, error.reason) from error
    if not row["member"]:
        return Stored(place, 0, size, whole=True)
    end = row["offset"] + row["size"]
    if end > size:
        raise MissingFileError(name, f"its tar has {size:,} bytes; it would end at {end:,}")
    return Stored(place, row["offset"], row["size"], whole=False)


@contextmanager
def opened(row: Row) -> Iterator[InputContainer]:
    """A row's container.

    Raises:
        MediaError: it is missing, empty, or none of FFmpeg's videos and sounds.
    """
    part = stored(row)
    if not part.size:
        raise MediaError(name_of(row), "file is empty (0 bytes)", "empty")
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file,subfile"}
    try:
        container = av.open(part.url, "r", options=options, metadata_errors="ignore")
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = "no video or sound that FFmpeg can open (its header or index may be damaged)"
        raise MediaError(name_of(row), reason, "damaged") from error
    with container:
        yield container


def zero_of(container: InputContainer) -> float:
    """The time stamp, in seconds, that is second 0 of the file."""
    return (container.start_time or 0) / av.time_base


def pictures_of(row: Row, container: InputContainer) -> VideoStream:
    """The stream of the frames, ready to decode with as many threads as the environment says.

    Ray sets ``OMP_NUM_THREADS`` to the CPUs that an operator reserved.
    """
    stream = picture_stream(container)
    if stream is None and container.streams.audio:
        raise MediaError(name_of(row), "has no pictures, only sound", "no pictures")
    if stream is None:
        raise MediaError(name_of(row), "has neither pictures nor sound", "damaged")
    if stream.codec_context is None:  # decoding would crash PyAV 15
        raise MediaError(name_of(row), "its video has a codec that FFmpeg does not know", "damaged")
    stream.codec_context.thread_count = int(os.environ.get("OMP_NUM_THREADS") or 0)
    stream.thread_type = "AUTO"
    return stream


def sound_stream(container: InputContainer) -> AudioStream | None:
    return next((s for s in container.streams.audio if s.codec_context is not None), None)


@dataclass
class _Copies:
    paths: OrderedDict[tuple[str, str], Path] = field(default_factory=OrderedDict)

    def get(self, row: Row, name: str) -> Path:
        key = (row["address"], row["member"])
        if key not in self.paths:
            self.paths[key] = self._copy(row, name)
            if len(self.paths) > KEPT_COPIES:
                self.paths.popitem(last=False)[1].unlink(missing_ok=True)
        self.paths.move_to_end(key)
        return self.paths[key]

    def _copy(self, row: Row, name: str) -> Path:
        handle, path = tempfile.mkstemp(dir=_folder().name)
        try:
            with os.fdopen(handle, "wb") as copy, bytes_of(row["address"]) as source:
                if not row["member"]:
                    shutil.copyfileobj(source, copy, 1 << 20)
                else:
                    source.seek(row["offset"])
                    copy.writelines(chunks(source, row["size"]))
        except BaseException as error:
            Path(path).unlink()
            if isinstance(error, MicoError) or not isinstance(error, Exception):
                raise
            # Each protocol's package has errors of its own.
            lost = isinstance(error, FileNotFoundError)
            reason = "no such file" if lost else f"cannot be read: {type(error).__name__}: {error}"
            raise MissingFileError(name, reason) from error
        return Path(path)


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="mico-footage-")


_copies = _Copies()

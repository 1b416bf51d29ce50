"""A medium before it is decoded: its file or bytes, its format, and the limits it must keep."""

import codecs
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mico_chat.errors import LimitError, MediaError, MicoError, MissingFileError
from mico_chat.media.addresses import Location, file_system, read_part
from mico_chat.media.kinds import IMAGES, SOUNDS, TABLE, TEXTS, Kind, kinds_of_format
from mico_chat.media.medium import MediaReport
from mico_chat.media.sampling import Sampling
from mico_chat.media.view import MOST_FRAMES, View

LimitName = Literal[
    "max_bytes", "max_pixels", "max_seconds", "max_frames", "timeout_s", "memory_mb", "max_side"
]


NO_VIEW = View()

LEAST_FRAMES = 4
"""Of a short clip, as the processors of Qwen's models take."""


class MediaLimits(BaseSettings):
    """Limits on untrusted media; each is read from ``MICO_MEDIA_<NAME>`` when not given.

    A medium beyond ``max_seconds``, ``max_frames``, ``max_pages``, ``max_characters`` or
    ``max_side`` is cut, and its report says so. A medium beyond another limit is refused. For a
    model that takes frames and pictures of any size, its :class:`View` says how many and how large:
    then ``max_frames`` and ``max_side`` hold only if somebody set them.
    """

    model_config = SettingsConfigDict(env_prefix="MICO_MEDIA_", frozen=True, extra="forbid")

    max_bytes: int = Field(256 * 1024 * 1024, ge=1, description="encoded bytes of one medium")
    max_pixels: int = Field(
        50_000_000, ge=1, description="pixels of an image or frame, before downscaling"
    )
    max_seconds: float = Field(600.0, gt=0, description="seconds of sound kept")
    max_frames: int = Field(8, ge=1, le=1024, description="frames taken from a video")
    max_pages: int = Field(8, ge=1, le=1024, description="pages of a document shown as pictures")
    max_characters: int = Field(
        100_000, ge=0, le=1_000_000, description="characters of a document's text kept"
    )
    timeout_s: float = Field(30.0, gt=0, description="seconds one medium may take to decode")
    memory_mb: int = Field(
        1024, ge=128, description="address space of the decoder process, MiB (POSIX)"
    )
    max_side: int = Field(
        1024, ge=16, description="longest side of decoded pixels; larger is scaled down"
    )

    def exceeded(self, name: str, setting: LimitName, what: str) -> LimitError:
        allowed = getattr(self, setting)
        return LimitError(
            name,
            f"{what}, more than the limit of {allowed} "
            f"({setting}; raise it with MICO_MEDIA_{setting.upper()})",
            setting,
        )

    def out_of_time(self, name: str) -> LimitError:
        return LimitError(
            name,
            f"decoding took longer than the limit of {self.timeout_s:g} s "
            "(timeout_s; raise it with MICO_MEDIA_TIMEOUT_S)",
            "timeout_s",
        )

    def check_pixels(self, name: str, width: int, height: int) -> None:
        """Refuse an image or frame by the size in its header, before anything is decoded."""
        size = f"{width} x {height} pixels"
        if width < 1 or height < 1:
            raise MediaError(name, f"the header claims {size}; it has no area", "damaged")
        if width * height > self.max_pixels:
            raise self.exceeded(name, "max_pixels", f"{size} is {width * height} pixels")

    def fitted(self, width: int, height: int, view: View = NO_VIEW, n: int = 1) -> tuple[int, int]:
        """(width, height), scaled down in proportion until no side is longer than ``max_side``,
        and until ``n`` such pictures have no more than the view's pixels."""
        scale = min(self.side(view) / max(width, height), view.scale(n * width * height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    def side(self, view: View = NO_VIEW) -> int:
        """The longest side of a picture, which ``max_pixels`` bounds too."""
        free = view.pixels is not None and "max_side" not in self.model_fields_set
        return self.max_pixels if free else self.max_side

    def frames_of(self, name: str, view: View, seconds: float) -> int:
        """The most frames to take of a clip of some seconds."""
        free = view.pixels is not None and "max_frames" not in self.model_fields_set
        most = MOST_FRAMES if free else self.max_frames
        if (asked := view.frames(seconds)) is not None:
            if asked > most:
                raise self.exceeded(name, "max_frames", f"{asked:.0f} frames of a clip")
            return int(asked)
        usual = view.usual_frames or most
        if view.usual_fps is not None:
            usual = min(usual, max(LEAST_FRAMES, round(view.usual_fps * seconds)))
        return min(usual, most)


# --- the format -----------------------------------------------------------------------------------

HEAD_BYTES = 512  # of a file's start, for ``format_of``

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"BM", "BMP"),
    (b"\x1aE\xdf\xa3", "WebM"),
    (b"fLaC", "FLAC"),
    (b"OggS", "OGG"),
    (b"ID3", "MP3"),
    (b"\x93NUMPY", "NPY"),
    (b"PK\x03\x04", "NPZ"),
    (b"%PDF", "PDF"),
    (b"\x1f\x8b", "gzip"),
)
_RIFF = {b"WAVE": "WAV", b"AVI ": "AVI", b"WEBP": "WebP"}
_BRANDS = {b"qt  ": "MOV", b"M4A ": "M4A", b"M4B ": "M4A", b"avif": "AVIF", b"avis": "AVIF"}
_HEIC_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)
_QUICKTIME_ATOMS = frozenset({b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})


def format_of(head: bytes) -> str | None:
    """The format of a file by its first bytes; None if it is unknown.

    "gzip" is not decoded, but named in errors. "SVG", "HTML" and "text" are text.
    """
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand not in _HEIC_BRANDS:
            return _BRANDS.get(brand, "MP4")
        # "mif1" and "msf1" are files of any codec: the brands that follow name the codec.
        compatible = head[16 : int.from_bytes(head[:4], "big")]
        codec = brand in (b"mif1", b"msf1") and (b"avif" in compatible or b"avis" in compatible)
        return "AVIF" if codec else "HEIC"
    if head[4:8] in _QUICKTIME_ATOMS:
        return "MOV"
    return _text_format(head) or _mpeg_audio_format(head) or _other_text_format(head)


_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\r\f\x1b"})


def _other_text_format(head: bytes) -> str | None:
    """Text that is not UTF-8 has a byte order mark, or no control characters, or as UTF-16 none
    but zeros in every other place."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # and UTF-32's
        return "text"
    halves = sorted((head[::2], head[1::2]), key=lambda half: half.count(0))
    wide = len(head) > 3 and 2 * halves[1].count(0) > len(halves[1])
    held = halves[0] if wide else head
    return "text" if held and held == held.translate(None, _CONTROLS) else None


def _text_format(head: bytes) -> str | None:
    try:
        text = head[: len(head) - 4 if len(head) >= HEAD_BYTES else None].decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if not text or any(ord(c) < 32 and c not in "\t\n\r\f" for c in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html")):
        return "HTML"
    if start.startswith("<svg") or (start.startswith("<?xml") and "<svg" in start):
        return "SVG"
    return "text"


def _mpeg_audio_format(head: bytes) -> str | None:
    """MPEG audio has no signature: an 11-bit sync word, then fields with some values excluded."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer = (head[1] >> 1) & 3
    if layer == 0:
        return "AAC" if head[1] & 0xF0 == 0xF0 else None
    version, bitrate, rate = (head[1] >> 3) & 3, head[2] >> 4, (head[2] >> 2) & 3
    known = layer != 3 and version != 1 and bitrate not in (0, 15) and rate != 3
    return "MP3" if known else None


def looks_like(fmt: str | None, head: bytes) -> str:
    if fmt is None:
        return f"are of no known format (they begin {head[:8].hex(' ')})"
    if fmt == "NPZ":
        return "are a ZIP or NPZ archive"
    kinds = () if fmt in TEXTS else kinds_of_format(fmt)
    return f"are {TABLE[kinds[0]].words} ({fmt})" if kinds else f"look like {fmt}"


_ISO_MEDIA = frozenset({"MP4", "MOV", "M4A"})
_MIME = {"MP3": "audio/mpeg", "AVI": "video/x-msvideo", "WebM": "video/webm"}
_MIME |= {"PDF": "application/pdf"} | dict.fromkeys(TEXTS, "text/plain")  # never as HTML


def mime_type(kind: Kind, head: bytes) -> str:
    fmt = format_of(head[:HEAD_BYTES])
    if fmt in _ISO_MEDIA:
        return "audio/mp4" if kind == "audio" else "video/mp4"
    if fmt in (*IMAGES, *SOUNDS) and fmt not in _MIME:
        return f"{'image' if fmt in IMAGES else 'audio'}/{fmt.lower()}"
    return _MIME.get(fmt or "", "application/octet-stream")


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TarMember:
    """Bytes inside a tar file, which may lie at an address (``s3://...``).

    It has no open handle, so it can be sent to other processes. ``held`` are the bytes, if they
    have been read with others.
    """

    path: Location
    offset: int
    size: int
    held: bytes | None = field(default=None, repr=False, compare=False)

    def read(self) -> bytes:
        return read_part(self.path, self.offset, self.size) if self.held is None else self.held


@dataclass(frozen=True)
class Remote:
    """A whole file at an address that fsspec opens (``s3://...``)."""

    address: str

    def read(self) -> bytes:
        return read_part(self.address)


@dataclass(frozen=True)
class OpenFile:
    """A file that another process has opened and handed over. Its streams share one position."""

    descriptor: int
    size: int


@dataclass(frozen=True)
class MediaFile:
    """An encoded medium: in a file, in a tar file, at an address, or in memory.

    Errors and reports use ``name``. ``depth_scale`` is how many metres one unit of a depth map of
    16-bit integers means. ``sampling`` decides which frames of a clip are taken; with a ``seed``
    they are drawn, one of each of equal runs of frames. ``id`` is that of a stored medium of a
    service. The ``view`` says how finely it is shown. A ``pinned`` one stays where a conversation
    is shortened. No model is shown a ``heard`` sound: the text of its message has its words.
    """

    kind: Kind
    source: str | Path | TarMember | Remote | OpenFile | bytes
    name: str = ""
    depth_scale: float = 0.001
    sampling: Sampling = "uniform"
    seed: int | None = None
    id: str | None = None
    view: View = NO_VIEW
    pinned: bool = False
    heard: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.path or self.kind))

    @property
    def path(self) -> Path | None:
        """The file; None for bytes, for a part of a tar file, and for an address."""
        return Path(self.source) if isinstance(self.source, str | Path) else None

    @property
    def size(self) -> int:
        if isinstance(self.source, bytes):
            return len(self.source)
        if isinstance(self.source, TarMember | OpenFile):
            return self.source.size
        try:
            if isinstance(self.source, Remote):
                system, path = file_system(self.source.address)
                return int(system.size(path))
            status = Path(self.source).stat()
        except (OSError, ValueError) as error:
            raise self.unreadable(error) from error
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(self.name, "is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(self.name, "is not a regular file")
        return status.st_size

    def open(self) -> BinaryIO:
        """A new seekable stream."""
        if isinstance(self.source, bytes):
            return io.BytesIO(self.source)
        try:
            if isinstance(self.source, TarMember | Remote):
                return io.BytesIO(self.source.read())
            if isinstance(self.source, OpenFile):
                stream = os.fdopen(os.dup(self.source.descriptor), "rb")
                stream.seek(0)
                return stream
            return Path(self.source).open("rb")
        except (OSError, ValueError) as error:
            raise self.unreadable(error) from error

    def read(self) -> bytes:
        if isinstance(self.source, bytes):
            return self.source
        try:
            with self.open() as stream:
                return stream.read()
        except OSError as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: OSError | ValueError) -> MediaError:
        if isinstance(error, FileNotFoundError):
            return MissingFileError(self.name)
        if isinstance(error, PermissionError):
            return MediaError(self.name, "may not be read (permission denied)")
        return MediaError(self.name, "cannot be read")

    def damaged(self, reason: str) -> MediaError:
        return MediaError(self.name, reason, "damaged")

    def report(self, fmt: str, **found: Any) -> MediaReport:
        known = {"name": self.name, "kind": self.kind, "format": fmt, "bytes": self.size}
        return MediaReport.model_validate(known | found)

    def check(self, limits: MediaLimits) -> None:
        """Refuse a file that is missing, empty or too large, before it is read."""
        size = self.size
        if size == 0:
            raise MediaError(self.name, "file is empty (0 bytes)", "empty")
        if size > limits.max_bytes:
            raise limits.exceeded(self.name, "max_bytes", f"{size} bytes")

    @cached_property
    def head(self) -> bytes:
        with self.open() as stream:
            return stream.read(HEAD_BYTES)

    @property
    def format(self) -> str:
        """The file's format, if its kind is decoded from it; otherwise a :class:`MediaError`."""
        fmt, row = format_of(self.head), TABLE[self.kind]
        if fmt is None or fmt not in row.decodes:
            reason = f"not {row.words}: the bytes {looks_like(fmt, self.head)}; use one of"
            reason += f" {', '.join(sorted(row.decodes))}"
            raise MediaError(self.name, reason, "unsupported")
        return fmt


@contextmanager
def decoder_errors(file: MediaFile, limits: MediaLimits, reason: str) -> Iterator[None]:
    """Turn any error of a decoder into a MediaError with ``reason``."""
    try:
        yield
    except MicoError:
        raise
    except MemoryError as error:
        raise limits.exceeded(file.name, "memory_mb", "decoding needs more memory") from error
    except Exception as error:
        raise file.damaged(reason) from error

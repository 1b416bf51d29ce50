"""What a file is, by its first bytes (its name and extension are never trusted)."""

from __future__ import annotations

HEAD_BYTES = 512
"""How much of a file ``format_of`` wants to see."""

IMAGE_FORMATS = frozenset({"JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF", "HEIC", "AVIF"})
ARRAY_FORMATS = frozenset({"NPY", "NPZ"})
VIDEO_FORMATS = frozenset({"MP4", "MOV", "WebM", "AVI"})
AUDIO_FORMATS = frozenset({"WAV", "FLAC", "MP3", "OGG", "M4A", "AAC", "AIFF"})

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
    """Name the format of a file from its first bytes; None when nothing known begins so.

    Names: those of the ``*_FORMATS`` sets, and "PDF", "gzip", "SVG", "HTML", "text", which are
    never decoded but make a better error.
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
        # "mif1" and "msf1" are any pictures: the brands behind it tell of which codec.
        compatible = head[16 : int.from_bytes(head[:4], "big")]
        codec = brand in (b"mif1", b"msf1") and (b"avif" in compatible or b"avis" in compatible)
        return "AVIF" if codec else "HEIC"
    if head[4:8] in _QUICKTIME_ATOMS:
        return "MOV"
    return _text_format(head) or _mpeg_audio_format(head)


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
    """MPEG audio has no magic, only an 11-bit sync word and fields that must make sense."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer = (head[1] >> 1) & 3
    if layer == 0:
        return "AAC" if head[1] & 0xF0 == 0xF0 else None
    version, bitrate, rate = (head[1] >> 3) & 3, head[2] >> 4, (head[2] >> 2) & 3
    known = layer != 3 and version != 1 and bitrate not in (0, 15) and rate != 3
    return "MP3" if known else None


def looks_like(fmt: str | None, head: bytes) -> str:
    """Say in words what the bytes are, to end "not an image: the bytes ..."."""
    if fmt is None:
        return f"are of no known format (they begin {head[:8].hex(' ')})"
    if fmt == "text":
        return "look like text"
    if fmt in ("HTML", "SVG", "PDF"):
        return f"look like {fmt}"
    if fmt == "NPZ":
        return "are a ZIP or NPZ archive"
    if fmt in IMAGE_FORMATS:
        return f"are a {fmt} image"
    if fmt in VIDEO_FORMATS:
        return f"are {fmt} video"
    if fmt in AUDIO_FORMATS:
        return f"are {fmt} sound"
    return f"are {fmt} data"

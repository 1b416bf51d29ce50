"""What a dropped file can be shown as, by its first bytes."""

from __future__ import annotations

from mico_chat.media.file import (
    ARRAY_FORMATS,
    AUDIO_FORMATS,
    HEAD_BYTES,
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    format_of,
    looks_like,
)
from mico_chat.media.kinds import Kind
from mico_ui.client import ApiError

__all__ = ["HEAD_BYTES", "kinds_of"]

STILLS: tuple[Kind, ...] = ("image", "depth", "normal")
"""What a raster may be; nothing in an 8-bit file tells which."""


def kinds_of(head: bytes, name: str) -> tuple[Kind, ...]:
    """The kinds a file can be, the likeliest first; ``head`` is its first HEAD_BYTES.

    A 16-bit grey PNG and a numpy array are depth by nature. A WebM or MP4 without a picture is a
    sound, which only its decoder can tell: video comes first.

    Raises:
        ApiError: in words, for a file that is no medium.
    """
    fmt = format_of(head)
    if fmt in ARRAY_FORMATS or (fmt == "PNG" and _is_deep_grey(head)):
        return ("depth",)
    if fmt in IMAGE_FORMATS:
        return STILLS
    if fmt in VIDEO_FORMATS:
        return ("video", "audio")
    if fmt in AUDIO_FORMATS:
        return ("audio",)
    if not head:
        raise ApiError(f"{name}: the file is empty", status=415)
    raise ApiError(
        f"{name}: the bytes {looks_like(fmt, head)}. This chat takes pictures (JPEG, PNG, WebP, "
        "HEIC, AVIF, GIF, TIFF, BMP), sounds (WAV, FLAC, MP3, OGG, M4A), videos (MP4, WebM, MOV, "
        "AVI), depth maps (16-bit PNG, NPY, NPZ) and normal maps (PNG).",
        status=415,
    )


def _is_deep_grey(head: bytes) -> bool:
    """Whether a PNG's header says 16 bits of grey: bit depth at byte 24, colour type at 25."""
    return head[12:16] == b"IHDR" and head[24:26] == b"\x10\x00"

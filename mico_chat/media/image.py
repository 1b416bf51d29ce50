"""Still images: any mode and bit depth to upright 8-bit RGB, on a white background."""

import logging
import re
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as Pillow
from PIL.ExifTags import Base as Exif

from mico_chat.errors import MediaError
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.medium import Image

log = logging.getLogger(__name__)

# Each format's plugin is called directly, so that no other parser of Pillow sees the bytes. Pillow
# has a pixel limit of its own, but it is global, and Image.open checks it.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}


def decode_image(file: MediaFile, limits: MediaLimits) -> Image:
    """Decode the first frame, upright and scaled down to ``limits.max_side``."""
    fmt = file.format
    with opened_raster(file, fmt, limits) as raster:
        width, height = raster.size
        cut = []
        if getattr(raster, "is_animated", False):
            cut = ["main picture only" if fmt == "HEIC" else "first frame only"]
        orientation = _orientation(raster, cut)
        goal = limits.fitted(width, height, file.view)
        raster.draft(None, (_nearly(goal[0]), _nearly(goal[1])))  # JPEG: decode at 1/2, 1/4, 1/8
        rgb = _to_rgb(file, raster, min(goal, raster.size))
        if orientation in range(5, 9):  # a quarter turn
            width, height = height, width
        rgb.info = {}  # or Pillow would read the file's EXIF data again
        rgb.getexif()[Exif.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
        pixels = np.array(rgb)  # (H, W, 3)
    cut += scaled_words((width, height), (pixels.shape[1], pixels.shape[0]))
    return Image(pixels, report=file.report(fmt, width=width, height=height, cut=cut))


def _nearly(side: int) -> int:
    """A side that is large enough: a JPEG whose decoder scales it to nine tenths of the goal is not
    scaled again. That halves the time for a picture of 1920 x 1080, and costs it a sixteenth of
    its sides.
    """
    return -(-9 * side // 10)


def _plugin(fmt: str) -> type[ImageFile.ImageFile]:
    """The parser of a format. HEIC and AVIF are decoded in one thread, to save address space."""
    if fmt == "HEIC":
        # Imported here: few files need it, and it takes a tenth of the worker's start.
        from pillow_heif import options
        from pillow_heif.as_plugin import HeifImageFile

        options.DECODE_THREADS = 1
        # A phone's file also holds thumbnails and depth, which are not used.
        options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
        return HeifImageFile
    if fmt == "AVIF":
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return _PLUGINS[fmt]


@contextmanager
def opened_raster(file: MediaFile, fmt: str, limits: MediaLimits) -> Iterator[ImageFile.ImageFile]:
    """An image file of which the header is parsed and checked; its pixels are not decoded yet.

    Errors of Pillow in the block become MediaErrors; Pillow's own limits get errors of their own.
    """
    damage = f"damaged {fmt} (image data cannot be decoded; the file may be cut off)"
    with decoder_errors(file, limits, damage):
        try:
            _check_claims(file, fmt, limits)
            with file.open() as stream, closing(_plugin(fmt)(stream)) as raster:
                limits.check_pixels(file.name, *raster.size)
                yield raster
        except Pillow.DecompressionBombError as error:  # a frame that is larger than its screen
            raise limits.exceeded(file.name, "max_pixels", "a frame of far more pixels") from error
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            reason = "its texts or its colour profile unpack to more than 1 MiB"
            raise MediaError(file.name, f"{reason}; save it without them") from error


def scaled_words(size: tuple[int, int], kept: tuple[int, int]) -> list[str]:
    """The report's sentence on scaling (width, height) ``size`` to ``kept``; none if equal."""
    if size == kept:
        return []
    return [f"scaled down from {size[0]} x {size[1]} to {kept[0]} x {kept[1]} pixels"]


def _orientation(raster: ImageFile.ImageFile, cut: list[str]) -> int:
    """EXIF's orientation; 1 is upright. Pillow turns TIFF and HEIC while it loads them."""
    if isinstance(raster, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        return int(raster.getexif().get(Exif.Orientation, 1))
    except Exception as error:
        log.debug("unreadable EXIF: %r", error)
        cut.append("the EXIF data are damaged: a rotation in them is ignored")
        return 1


def _to_rgb(file: MediaFile, raster: ImageFile.ImageFile, size: tuple[int, int]) -> Pillow.Image:
    image: Pillow.Image = raster
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Pillow.fromarray(_to_8_bit(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif image.mode != "RGB":
        reason = f"colour mode {image.mode} is not supported; convert it to RGB"
        raise MediaError(file.name, reason, "unsupported")
    if image.size != size:
        image = image.resize(size, Pillow.Resampling.BICUBIC, reducing_gap=2.0)
    if image.mode == "RGBA":
        white = Pillow.new("RGBA", image.size, "white")
        image = Pillow.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit, 32-bit or float grey (H, W) to uint8: from its usual range, or its values' range."""
    if values.dtype in (np.dtype("<u2"), np.dtype(">u2")):
        return (values >> 8).astype(np.uint8)
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if high <= 255 else 65535.0
    return ((grey - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)


MAX_SCANS = 100
"""A progressive JPEG has at most these scans. Encoders write about ten; each costs a pass over all
pixels."""

MAX_SEGMENTS = 10_000  # in a JPEG's header; a colour profile of 16 MiB takes 256
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # those are tables
_SCAN, _END = 0xDA, 0xD9
# In a scan's data, 0xff is followed by 0 or a restart marker: another marker ends the scan.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _check_claims(file: MediaFile, fmt: str, limits: MediaLimits) -> None:
    """Refuse, by its header, a file on which Pillow's parser would spend much memory or time."""
    if fmt == "PNG" and file.head[12:16] == b"IHDR" and len(file.head) >= 24:
        # Pillow reads all chunks up to the image data before it reports the size.
        limits.check_pixels(file.name, *struct.unpack(">II", file.head[16:24]))
    elif fmt == "WebP" and (size := _webp_size(file.head)) is not None:
        # libwebp allocates its canvas before Pillow reports the size.
        limits.check_pixels(file.name, *size)
    elif fmt == "JPEG":
        with file.open() as stream:
            scans = _scans(stream) if _is_progressive(file, stream) else 0
        if scans > MAX_SCANS:
            found = f"{scans} scans in a progressive JPEG, more than the {MAX_SCANS} that are read"
            raise MediaError(file.name, f"{found}; save it again")


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
    width, height = struct.unpack("<HH", head[26:30])
    return (width & 0x3FFF, height & 0x3FFF) if chunk == b"VP8 " else None


def _is_progressive(file: MediaFile, stream: BinaryIO) -> bool:
    stream.seek(2)
    for _ in range(MAX_SEGMENTS):
        start = stream.read(4)
        if len(start) < 4 or start[0] != 0xFF or start[1] == _SCAN:
            return False
        if start[1] in _FRAMES:
            return start[1] in _PROGRESSIVE
        stream.seek(max(0, int.from_bytes(start[2:], "big") - 2), 1)
    raise file.damaged(f"damaged JPEG (no picture behind {MAX_SEGMENTS:,} parts of its header)")


def _scans(stream: BinaryIO) -> int:
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

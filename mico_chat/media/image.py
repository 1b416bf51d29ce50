"""Still images: any mode and bit depth to upright 8-bit RGB, alpha composited on white."""

from __future__ import annotations

import logging
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
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as Pillow
from PIL.ExifTags import Base as Exif

from mico_chat.errors import MediaError
from mico_chat.media.claims import check_claims
from mico_chat.media.limits import MediaLimits
from mico_chat.media.medium import Image, MediaReport
from mico_chat.media.signature import IMAGE_FORMATS
from mico_chat.media.source import Source, decoder_errors

log = logging.getLogger(__name__)

# The plugin of each format is called directly: only these parsers ever see the bytes, and
# the pixel limit is ours (Pillow's own, a global, fires in Image.open before the size is known).
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}

_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}
"""EXIF orientation (TIFF 6.0, tag 274) -> the transposition that undoes it."""

_TAIL = 4096


def decode_image(source: Source, limits: MediaLimits) -> Image:
    """Decode the first frame, upright, no side longer than ``limits.max_side``.

    Raises:
        MediaError: not an image, truncated, damaged.
        LimitError: more pixels than ``limits.max_pixels`` (by its header), or out of memory.
    """
    fmt = source.format_among(IMAGE_FORMATS, "an image")
    with raster_errors(source, fmt, limits), source.open() as stream:
        with closing(open_raster(source, fmt, stream, limits)) as raster:
            width, height = raster.size
            cut = []
            if getattr(raster, "is_animated", False):
                # A HEIC file names the one that is meant.
                cut = ["main picture only" if fmt == "HEIC" else "first frame only"]
            turn = _orientation(raster, cut)
            raster.draft(None, limits.fitted(width, height))  # JPEG: decode at 1/2, 1/4, 1/8
            rgb = _to_rgb(source, raster, limits.fitted(width, height))
        if turn is not None:
            rgb = rgb.transpose(turn)
            if turn in (
                Pillow.Transpose.TRANSPOSE,
                Pillow.Transpose.TRANSVERSE,
                Pillow.Transpose.ROTATE_90,
                Pillow.Transpose.ROTATE_270,
            ):
                width, height = height, width
        pixels = np.array(rgb)  # (H, W, 3)
    cut += scaled_words((width, height), (pixels.shape[1], pixels.shape[0]))
    report = MediaReport(
        name=source.name,
        kind="image",
        format=fmt,
        bytes=source.size,
        width=width,
        height=height,
        cut=cut,
    )
    return Image(pixels, report)


def open_raster(
    source: Source, fmt: str, stream: BinaryIO, limits: MediaLimits
) -> ImageFile.ImageFile:
    """Parse the header of a raster file and check its claimed size; no pixel is decoded."""
    check_claims(source, fmt, limits)
    raster = _plugin(fmt)(stream)
    limits.check_pixels(source.name, *raster.size)
    return raster


def _plugin(fmt: str) -> type[ImageFile.ImageFile]:
    """The parser of a format; of HEIC and AVIF it computes in one thread, as the worker does."""
    if fmt == "HEIC":
        # Here and not above: a tenth of the worker's start, for few files.
        from pillow_heif import options
        from pillow_heif.as_plugin import HeifImageFile

        options.DECODE_THREADS = 1
        # Of a phone's file nothing but the picture is read.
        options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
        return HeifImageFile
    if fmt == "AVIF":
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return _PLUGINS[fmt]


@contextmanager
def raster_errors(source: Source, fmt: str, limits: MediaLimits) -> Iterator[None]:
    """:func:`decoder_errors` in the words for a raster file; Pillow's own limits have theirs."""
    with decoder_errors(source, limits, _damage(source, fmt)):
        try:
            yield
        except Pillow.DecompressionBombError as error:  # a frame that is larger than its screen
            raise limits.exceeded(
                source.name, "max_pixels", "a frame of far more pixels"
            ) from error
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            raise MediaError(
                source.name,
                "its texts or its colour profile unpack to more than 1 MiB; save it without them",
            ) from error


def scaled_words(size: tuple[int, int], kept: tuple[int, int]) -> list[str]:
    """A report's words for scaling (width, height) ``size`` down to ``kept``; none if equal."""
    if size == kept:
        return []
    return [f"scaled down from {size[0]} x {size[1]} to {kept[0]} x {kept[1]} pixels"]


def _damage(source: Source, fmt: str) -> str:
    """The reason to give should ``fmt`` fail to decode: cut short, or damaged inside."""
    if fmt == "JPEG":
        short = b"\xff\xd9" not in source.tail(_TAIL)  # end of image
    elif fmt == "PNG":
        short = b"IEND" not in source.tail(_TAIL)
    elif fmt == "WebP":
        short = int.from_bytes(source.head[4:8], "little") + 8 > source.size
    elif fmt == "BMP":
        short = int.from_bytes(source.head[2:6], "little") > source.size
    elif fmt == "GIF":
        short = b"\x3b" not in source.tail(16)  # trailer
    elif fmt in ("HEIC", "AVIF"):
        short = _boxes_end(source) > source.size
    else:
        short = False
    if short:
        return f"truncated {fmt} (image data ends early)"
    return f"damaged {fmt} (image data cannot be decoded)"


def _boxes_end(source: Source) -> int:
    """Where the boxes of an ISO media file end by their sizes (ISO/IEC 14496-12, 4.2)."""
    at = 0
    with source.open() as stream:
        while at + 8 <= source.size:
            stream.seek(at)
            head = stream.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            if size < 8:  # 0: to the end of the file; others are no size
                return source.size
            at += size
    return at


def _orientation(raster: ImageFile.ImageFile, cut: list[str]) -> Pillow.Transpose | None:
    """The turn that makes the image upright; a TIFF and a HEIC are turned while they load."""
    if isinstance(raster, TiffImagePlugin.TiffImageFile):
        return None
    try:
        return _UPRIGHT.get(raster.getexif().get(Exif.Orientation, 1))
    except Exception as error:
        log.debug("unreadable EXIF: %r", error)
        cut.append("the EXIF data are damaged: a rotation in them is ignored")
        return None


def _to_rgb(source: Source, raster: ImageFile.ImageFile, size: tuple[int, int]) -> Pillow.Image:
    """Load, scale to ``size`` (W, H before an EXIF turn) and flatten to RGB."""
    image: Pillow.Image = raster
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Pillow.fromarray(_to_8_bit(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in ("1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif image.mode != "RGB":
        raise MediaError(
            source.name,
            f"colour mode {image.mode} is not supported; convert it to RGB",
            "unsupported",
        )
    if image.size != size:
        image = image.resize(size, Pillow.Resampling.BICUBIC, reducing_gap=2.0)
    if image.mode == "RGBA":
        white = Pillow.new("RGBA", image.size, "white")
        image = Pillow.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit, 32-bit or float grey (H, W) to uint8: by its type's range, else by its own."""
    if values.dtype in (np.dtype("<u2"), np.dtype(">u2")):
        return (values >> 8).astype(np.uint8)
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(grey.min()), float(grey.max())
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 65535:
        low, high = 0.0, 255.0 if high <= 255 else 65535.0
    return ((grey - low) * (255.0 / max(high - low, 1e-12))).round().astype(np.uint8)

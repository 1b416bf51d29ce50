"""Maps of surface normals: three-channel rasters, read as they are."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from PIL import Image as Pillow

from mico_chat.errors import MediaError
from mico_chat.media.image import open_raster, raster_errors, scaled_words
from mico_chat.media.limits import MediaLimits
from mico_chat.media.medium import MediaReport, Normal
from mico_chat.media.signature import IMAGE_FORMATS
from mico_chat.media.source import Source


def decode_normal(source: Source, limits: MediaLimits) -> Normal:
    """Decode a normal map; alpha is dropped and EXIF ignored (turning pixels turns no vectors).

    Raises:
        MediaError: not a raster, greyscale, damaged.
        LimitError: more pixels than ``limits.max_pixels``, by the header.
    """
    fmt = source.format_among(IMAGE_FORMATS, "a normal map")
    with (
        raster_errors(source, fmt, limits),
        source.open() as stream,
        closing(open_raster(source, fmt, stream, limits)) as raster,
    ):
        raster.load()
        width, height = raster.size
        channels = len(raster.getbands())
        if raster.mode not in ("RGB", "RGBA", "RGBX", "YCbCr", "P"):
            raise _grey(source, f"{channels} {'channel' if channels == 1 else 'channels'}")
        size = limits.fitted(width, height)
        pixels = np.array(
            raster.convert("RGB").resize(size, Pillow.Resampling.BOX, reducing_gap=2.0)
        )
    if (pixels == pixels[..., :1]).all():
        raise _grey(source, "R = G = B in every pixel")
    report = MediaReport(
        name=source.name,
        kind="normal",
        format=fmt,
        bytes=source.size,
        width=width,
        height=height,
        cut=scaled_words((width, height), size),
    )
    return Normal(pixels, report)


def _grey(source: Source, found: str) -> MediaError:
    return MediaError(
        source.name,
        f"a greyscale image ({found}), but a normal map has 3 channels (x, y, z as R, G, B); "
        "if it is a depth map, attach it as depth",
    )

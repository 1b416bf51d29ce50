"""Depth maps: 16-bit rasters in millimetres, numpy arrays in metres, 8-bit relative maps."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.errors import MediaError
from mico_chat.media.image import open_raster, raster_errors, scaled_words
from mico_chat.media.limits import MediaLimits
from mico_chat.media.medium import Depth, MediaReport
from mico_chat.media.npy import read_array
from mico_chat.media.signature import ARRAY_FORMATS, IMAGE_FORMATS
from mico_chat.media.source import Source, decoder_errors

_WANTED = (
    "a depth map has one channel: a 16-bit greyscale PNG (millimetres), "
    "an 8-bit greyscale PNG (relative) or a .npy in metres"
)

MAX_DISTANCE = 1e6
"""Metres. No camera measures farther; nearness, one over it, would be lost in rounding."""


def decode_depth(
    source: Source,
    limits: MediaLimits,
    *,
    depth_scale: float = 0.001,
    brighter_is_nearer: bool = True,
) -> Depth:
    """Decode a depth map; 0, negative, non-finite and absurd values are holes and become NaN.

    Args:
        depth_scale: metres per unit of an integer map of 16 bits or more.
        brighter_is_nearer: how an 8-bit map is meant; either way larger becomes farther.

    Raises:
        MediaError: neither a raster nor an array, in colour, of the wrong shape, all holes.
        LimitError: more pixels than ``limits.max_pixels``, by the header.
    """
    fmt = source.format_among(IMAGE_FORMATS | ARRAY_FORMATS, "a depth map")
    if fmt in ARRAY_FORMATS:
        with decoder_errors(source, limits, f"damaged {fmt} (its array cannot be read)"):
            raw, hidden = read_array(source, fmt, limits), None
    else:
        with raster_errors(source, fmt, limits):
            raw, hidden = _read_grey(source, fmt, limits)
    height, width = raw.shape
    kept = limits.fitted(width, height)
    raw = _nearest(raw, kept)

    with np.errstate(over="ignore"):  # becomes infinite, and so a hole
        grey = raw.astype(np.float32)
    holes = ~(np.isfinite(grey) & (grey > 0))
    if hidden is not None:
        holes |= _nearest(hidden, kept)
    metric = raw.dtype != np.uint8
    if not metric:
        values = 1.0 - grey / 255.0 if brighter_is_nearer else grey / 255.0
    elif raw.dtype.kind == "f":
        values = grey
    else:
        values = grey * np.float32(depth_scale)
    holes |= values > MAX_DISTANCE
    values = np.where(holes, np.float32(np.nan), values).astype(np.float32)
    if holes.all():
        raise MediaError(
            source.name,
            f"no depth in it: all {width} x {height} values are 0, NaN, infinite "
            "or beyond 1,000 km",
        )
    report = MediaReport(
        name=source.name,
        kind="depth",
        format=fmt,
        bytes=source.size,
        width=width,
        height=height,
        cut=scaled_words((width, height), kept),
    )
    return Depth(values, metric, report)


def _read_grey(
    source: Source, fmt: str, limits: MediaLimits
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """A raster's grey (H, W), uint8 or wider, and where alpha hides it (H, W)."""
    with source.open() as stream, closing(open_raster(source, fmt, stream, limits)) as raster:
        raster.load()
        if raster.mode.startswith("I") or raster.mode in ("F", "L"):
            return np.array(raster), None
        if raster.mode == "1":
            return np.array(raster.convert("L")), None
        colour = np.asarray(raster.convert("RGBA"))  # (H, W, 4)
    grey = colour[..., 0]
    if not ((grey == colour[..., 1]).all() and (grey == colour[..., 2]).all()):
        raise MediaError(source.name, f"a colour image (its three channels differ), but {_WANTED}")
    return grey, colour[..., 3] == 0


def _nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Scale (H, W) down to ``size`` (W, H) by picking values: depths never mix over an edge."""
    height, width = values.shape
    if (width, height) == size:
        return values
    rows = (np.arange(size[1]) * height + height // 2) // size[1]
    columns = (np.arange(size[0]) * width + width // 2) // size[0]
    picked: NDArray[Any] = values[np.ix_(rows, columns)]
    return picked

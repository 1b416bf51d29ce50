"""Depth maps and maps of surface normals, from image files and numpy arrays.

A PNG of depth may say what its numbers mean: a text chunk :data:`MARK` with a :class:`DepthMark`.
:func:`encode_depth` writes it.
"""

import io
import math
import zipfile
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageFile
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mico_chat.errors import MediaError
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.image import opened_raster, scaled_words
from mico_chat.media.kinds import ARRAYS
from mico_chat.media.medium import Depth, Normal

_WANTED = (
    "a depth map has one channel: a 16-bit greyscale PNG (millimetres), "
    "an 8-bit greyscale PNG (relative) or a .npy in metres"
)

MAX_DISTANCE = 1e6
"""The distance is in metres. No camera measures farther, and the inverse of a larger value is
rounded away."""

MARK = "mico-depth"
_MOST = 65535  # of 16 bits


class DepthMark(BaseModel):
    """What the numbers of a PNG of depth mean.

    ``unit`` "metre": number times ``scale`` is the distance. "inverse": it is an inverse distance
    in a unit that nobody knows. 0 is a hole. ``estimated`` names the model that
    saw the distances in a picture.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["metre", "inverse"]
    scale: float = Field(0.001, gt=0, le=MAX_DISTANCE, allow_inf_nan=False)
    # Short and without spaces: it stands in pages and prompts, and files come from anybody.
    estimated: str | None = Field(None, pattern=r"^[\w./:@+-]{1,96}$")


def encode_depth(
    values: NDArray[np.floating], unit: Literal["metre", "inverse"], estimated: str | None = None
) -> bytes:
    """A 16-bit PNG of distances (H, W), in millimetres while they fit, or of inverse distances.

    Values that are not finite, and distances of 0 and less, are holes. An inverse distance of 0 and
    less is the farthest.
    """
    values = values.astype(np.float64)
    known = np.isfinite(values)
    if unit == "metre":
        known &= values > 0
    largest = float(values[known].max(initial=0.0))
    scale = 0.001 if unit == "metre" else 1.0
    if (unit == "inverse" and largest > 0) or largest > _MOST * scale:
        scale = largest / _MOST
    numbers = np.where(known, (values / scale).round().clip(1, _MOST), 0).astype(np.uint16)
    said = PngInfo()
    mark = DepthMark(unit=unit, scale=scale, estimated=estimated)
    said.add_text(MARK, mark.model_dump_json(exclude_none=True))
    data = io.BytesIO()
    Pillow.fromarray(numbers).save(data, "PNG", pnginfo=said)
    return data.getvalue()


def decode_depth(file: MediaFile, limits: MediaLimits) -> Depth:
    """Decode a depth map. Values that are 0, negative, not finite or too large become NaN: holes.

    Integers of 16 bits or more are multiplied by the file's ``depth_scale``, or by the scale of
    their mark. In an 8-bit map, and in one of inverse distances, brighter is nearer. In the result
    larger is always farther.
    """
    mark = None
    fmt = file.format
    if fmt in ARRAYS:
        with decoder_errors(file, limits, f"damaged {fmt} (its array cannot be read)"):
            raw, hidden = read_array(file, fmt, limits), None
    else:
        raw, hidden, mark = _read_grey(file, fmt, limits)
    height, width = raw.shape
    kept = limits.fitted(width, height)
    raw = _nearest(raw, kept)

    with np.errstate(over="ignore"):  # a number too large for float32 becomes a hole
        grey = raw.astype(np.float32)
    holes = ~(np.isfinite(grey) & (grey > 0))
    if hidden is not None:
        holes |= _nearest(hidden, kept)
    eight_bits = raw.dtype == np.uint8
    metric = not eight_bits if mark is None else mark.unit == "metre"
    if not metric:
        values = 1.0 - grey / (255.0 if eight_bits else float(_MOST))
    elif raw.dtype.kind == "f":
        values = grey
    else:
        values = grey * np.float32(file.depth_scale if mark is None else mark.scale)
    holes |= values > MAX_DISTANCE
    values = np.where(holes, np.float32(np.nan), values).astype(np.float32)
    if holes.all():
        found = f"all {width} x {height} values are 0, NaN, infinite or beyond 1,000 km"
        raise MediaError(file.name, f"no depth in it: {found}")
    cut = scaled_words((width, height), kept)
    estimated = None if mark is None else mark.estimated
    size = {"width": width, "height": height}
    report = file.report(fmt, **size, cut=cut, estimated=estimated, metric=metric)
    return Depth(values, metric, report=report)


def _read_grey(
    file: MediaFile, fmt: str, limits: MediaLimits
) -> tuple[NDArray[Any], NDArray[np.bool_] | None, DepthMark | None]:
    """An image's grey (H, W), uint8 or wider, where it is transparent (H, W), and its mark."""
    with opened_raster(file, fmt, limits) as raster:
        raster.load()
        mark = _mark(file, raster) if fmt == "PNG" else None
        if raster.mode.startswith("I") or raster.mode in ("F", "L"):
            return np.array(raster), None, mark
        if raster.mode == "1":
            return np.array(raster.convert("L")), None, mark
        colour = np.asarray(raster.convert("RGBA"))  # (H, W, 4)
    grey = colour[..., 0]
    if not ((grey == colour[..., 1]).all() and (grey == colour[..., 2]).all()):
        raise MediaError(file.name, f"a colour image (its three channels differ), but {_WANTED}")
    return grey, colour[..., 3] == 0, mark


def _mark(file: MediaFile, raster: ImageFile.ImageFile) -> DepthMark | None:
    said = raster.info.get(MARK)
    if said is None:
        return None
    try:
        return DepthMark.model_validate_json(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its text"
        reason = f"its text chunk {MARK!r} cannot be read ({where}: {first['msg']}); write "
        reason += 'e.g. {"unit": "metre", "scale": 0.001}, or leave it out'
        raise MediaError(file.name, reason) from error


def _nearest(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Scale (H, W) down to ``size`` (W, H) by picking values: depths do not mix at edges."""
    height, width = values.shape
    if (width, height) == size:
        return values
    rows = (np.arange(size[1]) * height + height // 2) // size[1]
    columns = (np.arange(size[0]) * width + width // 2) // size[0]
    picked: NDArray[Any] = values[np.ix_(rows, columns)]
    return picked


_MAX_HEADER = 10_000  # bytes; numpy's own limit
_MAX_SIDE = 2**63 - 1


def read_array(file: MediaFile, fmt: str, limits: MediaLimits) -> NDArray[Any]:
    """Read a map (H, W) of real numbers, also from shapes (H, W, 1) and (1, H, W).

    An .npz must hold one array, or an array named ``depth``.
    """
    with file.open() as stream:
        if fmt == "NPY":
            return _read(file, stream, limits)
        try:
            archive = zipfile.ZipFile(stream)
        except zipfile.BadZipFile as error:
            raise file.damaged("damaged or truncated NPZ archive") from error
        with archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            if "depth.npy" in members:
                members = ["depth.npy"]
            if len(members) != 1:
                reason = f"the archive holds {len(members)} arrays and none is named 'depth'; "
                reason += "a depth map needs one array, or one of that name"
                raise MediaError(file.name, reason)
            if archive.getinfo(members[0]).flag_bits & 1:
                raise MediaError(file.name, "the archive is encrypted; save it without a password")
            with archive.open(members[0]) as opened:
                return _read(file, opened, limits)


def _read(file: MediaFile, stream: IO[bytes], limits: MediaLimits) -> NDArray[Any]:
    name = file.name
    shape, fortran, dtype = _header(file, stream)
    if dtype.hasobject:
        raise MediaError(name, "holds Python objects, which are never loaded; save plain numbers")
    if dtype.kind not in "fiu":
        held = "records" if dtype.kind == "V" else f"values of type {dtype}"
        raise MediaError(name, f"holds {held}; a depth map needs real numbers")
    sides = tuple(side for side in shape if side != 1) if len(shape) == 3 else shape
    if len(shape) == 3 and len(sides) < 2:
        sides = shape[:2] if shape[2] == 1 else shape[1:]
    if len(sides) != 2:
        found = f"shape {shape}" if len(shape) < 6 else f"{len(shape)} dimensions"
        raise MediaError(name, f"has {found}; a depth map has shape (height, width)")
    limits.check_pixels(name, sides[1], sides[0])
    n_bytes = math.prod(sides) * dtype.itemsize
    data = stream.read(n_bytes)
    if len(data) < n_bytes:
        found = f"its header says {n_bytes} bytes, it holds {len(data)}"
        raise file.damaged(f"truncated array ({found})")
    return np.frombuffer(data, dtype).reshape(sides, order="F" if fortran else "C")


def _header(file: MediaFile, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    known = np.lib.format
    try:
        first = known.read_magic(stream) == (1, 0)
        parse = known.read_array_header_1_0 if first else known.read_array_header_2_0
        shape, fortran, dtype = parse(stream, max_header_size=_MAX_HEADER)
        if any(abs(side) > _MAX_SIDE for side in shape):
            raise ValueError("a side that no array has")
    except (ValueError, MemoryError) as error:  # Python's parser may run out of its stack
        raise file.damaged("damaged NPY (its header cannot be read)") from error
    return shape, fortran, dtype


def decode_normal(file: MediaFile, limits: MediaLimits) -> Normal:
    """Decode a normal map. Transparency and EXIF rotation are ignored."""
    fmt = file.format
    with opened_raster(file, fmt, limits) as raster:
        raster.load()
        width, height = raster.size
        channels = len(raster.getbands())
        if raster.mode not in ("RGB", "RGBA", "RGBX", "YCbCr", "P"):
            raise _grey(file, f"{channels} {'channel' if channels == 1 else 'channels'}")
        size = limits.fitted(width, height)
        colours = raster.convert("RGB")
        pixels = np.array(colours.resize(size, Pillow.Resampling.BOX, reducing_gap=2.0))
    if (pixels == pixels[..., :1]).all():
        raise _grey(file, "R = G = B in every pixel")
    cut = scaled_words((width, height), size)
    return Normal(pixels, report=file.report(fmt, width=width, height=height, cut=cut))


def _grey(file: MediaFile, found: str) -> MediaError:
    wanted = "a normal map has 3 channels (x, y, z as R, G, B); if it is a depth map, attach it"
    return MediaError(file.name, f"a greyscale image ({found}), but {wanted} as depth")

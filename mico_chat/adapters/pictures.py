"""Pictures for models that read them: maps with a legend, stills and frames of bounded size."""

from math import sqrt

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from mico_chat.media.image import scaled_words
from mico_chat.media.medium import Audio, Depth, Image, Medium, Normal, Pages, Video

MAX_PIXELS = 1280 * 28 * 28
"""A still has at most these pixels: 1,280 tokens of Qwen2.5-VL, 980 of Qwen3-VL. Its processor
alone would take 16,384 tokens for a photograph of a telephone."""

MAX_FRAME_PIXELS = 256 * 28 * 28
"""Pixels of a clip's frame; without a bound 32 frames of a telephone's clip are 40,000 tokens."""

NEAR_TO_FAR = np.array(
    [(252, 255, 164), (249, 142, 9), (188, 55, 84), (87, 16, 110), (20, 11, 80)], np.float64
)
"""The colours run from the nearest to the farthest pixel: yellow, orange, red, purple, dark
blue."""


def shown(medium: Medium) -> tuple[Image | Video | Audio, tuple[str, ...], str]:
    """A medium as a model that lacks maps is shown it, within bounds; what was cut; a legend."""
    if isinstance(medium, Depth | Normal):
        picture, legend = as_picture(medium)
        return *smaller(picture), legend
    if isinstance(medium, Audio):
        return medium, (), ""
    if isinstance(medium, Pages):
        raise ValueError(f"{medium.name}: its pages are shown one by one")
    return *smaller(medium), ""


def as_picture(medium: Depth | Normal) -> tuple[Image, str]:
    """A map as a picture with its legend inside, and the legend in words."""
    if isinstance(medium, Normal):
        words = (
            "A map of surface normals as a picture: red is x (right), green is y (up), blue is z "
            "(to you).\n"
        )
        drawn = _with_strip(medium.pixels, None, "x: red  y: green  z: blue")
        return Image(drawn, report=medium.report), words
    values = medium.values
    near, far = float(np.nanmin(values)), float(np.nanmax(values))
    if medium.metric:  # in equal steps of times farther, as near things differ by little
        values, low, high = np.log(values), np.log(near), np.log(far)
    else:
        low, high = near, far
    places = np.nan_to_num((values - low) / max(high - low, 1e-6))
    pixels = np.where(np.isnan(values)[..., None], 0, _coloured(places)).astype(np.uint8)
    ends, (least, most), unit = ("near", "far"), ("", ""), " without a unit"
    if medium.metric:
        ends, unit = (f"{near:.2g} m", f"{far:.2g} m"), ""
        least, most = (f" ({end})" for end in ends)
    how = f", estimated by {medium.estimated}{unit}," if medium.estimated else ""
    words = f"A depth map{how} as a picture: yellow is the nearest{least}, dark blue the farthest"
    words += f"{most}, black unknown.\n"
    return Image(_with_strip(pixels, ends), report=medium.report), words


def _coloured(places: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colours (..., 3) of places from 0, the nearest, to 1."""
    steps = np.linspace(0, 1, len(NEAR_TO_FAR))
    channels = [np.interp(places, steps, NEAR_TO_FAR[:, channel]) for channel in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def _with_strip(
    pixels: NDArray[np.uint8], ends: tuple[str, str] | None, words: str = ""
) -> NDArray[np.uint8]:
    """A picture above a white strip with a bar of the colours between its two ends, or words."""
    height, width = pixels.shape[:2]
    strip = max(16, height // 12)
    board = Pillow.new("RGB", (width, height + strip), "white")
    board.paste(Pillow.fromarray(np.ascontiguousarray(pixels)), (0, 0))
    draw = ImageDraw.Draw(board)
    font = ImageFont.load_default(size=strip * 0.6)
    middle = height + strip / 2
    if ends is None:
        draw.text((4, middle), words, "black", font, anchor="lm")
        return np.asarray(board)
    first, last = (draw.textlength(text, font) + 8 for text in ends)
    room = int(width - first - last)
    if room > 8:
        bar = _coloured(np.linspace(0, 1, room))[None].repeat(strip // 2, 0)
        board.paste(Pillow.fromarray(bar), (int(first), height + strip // 4))
    draw.text((4, middle), ends[0], "black", font, anchor="lm")
    draw.text((width - 4, middle), ends[1], "black", font, anchor="rm")
    return np.asarray(board)


def smaller(medium: Image | Video) -> tuple[Image | Video, tuple[str, ...]]:
    """A still or clip of bounded size, and a sentence if it was scaled down."""
    most = MAX_PIXELS if isinstance(medium, Image) else MAX_FRAME_PIXELS
    pixels = medium.pixels[None] if isinstance(medium, Image) else medium.frames
    height, width = pixels.shape[1:3]
    if height * width <= most:
        return medium, ()
    scale = sqrt(most / (height * width))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    stills = (Pillow.fromarray(one).resize(size, Pillow.Resampling.LANCZOS) for one in pixels)
    scaled = np.stack([np.asarray(still) for still in stills])
    cut = tuple(scaled_words((width, height), size))
    if isinstance(medium, Image):
        return Image(scaled[0], report=medium.report), cut
    return Video(scaled, medium.times, medium.audio, report=medium.report), cut

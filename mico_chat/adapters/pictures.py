"""Pictures for models that read them: maps with a legend, stills and clips within their tokens."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from mico_chat.media.file import LEAST_FRAMES
from mico_chat.media.image import scaled_words
from mico_chat.media.medium import Audio, Depth, Image, Medium, Normal, Pages, Video
from mico_chat.media.view import MOST_FRAMES, View

PIXELS_PER_TOKEN, MOST_PIXELS = 4096, 1 << 24
"""A picture, or a clip's frames, are decoded to so many pixels for each of their tokens, and to so
many altogether. No known processor keeps more; the model's own scales them down."""

TOKENS_PER_FRAME, USUAL_FRAMES, USUAL_FPS = 256, 32, 2.0
"""A clip has frames for as many of its tokens; and so many, or so many a second as Qwen's authors
advise, if its processor names no number or no rate."""

TRIES = 4

R = TypeVar("R")
Shown: TypeAlias = Image | Video | Audio

NEAR_TO_FAR = np.array(
    [(252, 255, 164), (249, 142, 9), (188, 55, 84), (87, 16, 110), (20, 11, 80)], np.float64
)
"""The colours run from the nearest to the farthest pixel: yellow, orange, red, purple, dark
blue."""


def shown(medium: Medium) -> tuple[Shown, str]:
    """A medium as a model that lacks maps is shown it, and a legend."""
    if isinstance(medium, Depth | Normal):
        return as_picture(medium)
    if isinstance(medium, Pages):
        raise ValueError(f"{medium.name}: its pages are shown one by one")
    return medium, ""


def as_picture(medium: Depth | Normal) -> tuple[Image, str]:
    """A map as a picture with its legend inside, and the legend in words."""
    if isinstance(medium, Normal):
        words = (
            "A map of surface normals as a picture: red is x (right), green is y (up), blue is z "
            "(to you).\n"
        )
        drawn = _with_strip(medium.pixels, None, "x: red  y: green  z: blue")
        return Image(drawn, report=medium.report, view=medium.view), words
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
    return Image(_with_strip(pixels, ends), report=medium.report, view=medium.view), words


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


def roomy(view: View, fps: float | None = None, frames: int | None = None) -> View:
    """A view with what to decode of a medium for its tokens; ``fps`` and ``frames`` are the model's
    own rate and most frames of a clip."""
    if (tokens := view.tokens) is None:
        return view
    pixels = min(tokens * PIXELS_PER_TOKEN, MOST_PIXELS)
    most = frames or (USUAL_FRAMES if fps is None else MOST_FRAMES)
    most = min(most, max(LEAST_FRAMES, tokens // TOKENS_PER_FRAME))
    return replace(view, pixels=pixels, usual_fps=fps, usual_frames=most)


def within(
    medium: Shown, read: Callable[[Shown, float], tuple[int, R]]
) -> tuple[R, int, tuple[str, ...]]:
    """What ``read`` makes of a medium, scaled down until it takes no more tokens than its view has;
    these tokens, and a sentence if it was.

    ``read`` is told which share of the whole's tokens is wanted.
    """
    most, scale, size = medium.view.tokens, 1.0, medium.own_arrays[0].shape[-2:-4:-1]
    tokens, found = read(medium, 1.0)
    whole, kept = tokens, size
    for _ in range(TRIES):
        if isinstance(medium, Audio) or most is None or tokens <= most:
            break
        scale *= sqrt(most / tokens) * 0.98
        smaller = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        fewer, better = read(_scaled(medium, smaller), most / whole)
        if fewer >= tokens:  # it takes as many at any size
            break
        tokens, found, kept = fewer, better, smaller
    return found, tokens, tuple(scaled_words(size, kept))


def _scaled(medium: Image | Video, size: tuple[int, int]) -> Image | Video:
    pixels = medium.pixels[None] if isinstance(medium, Image) else medium.frames
    stills = (Pillow.fromarray(one).resize(size, Pillow.Resampling.LANCZOS) for one in pixels)
    scaled = np.stack([np.asarray(still) for still in stills])
    if isinstance(medium, Image):
        return replace(medium, pixels=scaled[0])
    return replace(medium, frames=scaled)

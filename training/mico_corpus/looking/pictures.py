"""Pictures of a clip's media for people: a contact sheet, the wave of a sound, depth in colours."""

import io

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from mico_chat.media import Audio, Depth, MediaFile, MediaLimits, Video
from mico_chat.media.decoder import Decoder

LIMITS = MediaLimits(max_frames=8, max_side=400)
COLUMNS = 4
GAP = 2
BAR = 26
"""A depth map's legend is so many pixels high."""
HOLE = (90, 90, 90)
BARS = 200


def sheet(decoder: Decoder, file: MediaFile) -> bytes:
    """Frames of a clip at even distances, four in a row, as JPEG."""
    clip = decoder.decode(file)
    assert isinstance(clip, Video)
    return contact_sheet(clip.frames)


def contact_sheet(frames: NDArray[np.uint8]) -> bytes:
    n, height, width, _ = frames.shape
    columns = min(COLUMNS, n)
    rows = -(-n // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    whole = Pillow.new("RGB", size, (128, 128, 128))
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        whole.paste(Pillow.fromarray(frame), (column * (width + GAP), row * (height + GAP)))
    return _encoded(whole, "JPEG")


def wave(decoder: Decoder, file: MediaFile) -> bytes:
    """The loudest sample of each of equal parts of a sound, or of a clip's sound track, as SVG.

    A dashed line: there is no sound.
    """
    sound = decoder.decode(file)
    track = sound.audio if isinstance(sound, Video) else sound
    lines, dashes = f"M0 50h{BARS}", 'stroke-dasharray="4"'
    if isinstance(track, Audio) and len(track.samples) >= BARS:
        parts = np.array_split(np.abs(track.samples), BARS)
        heights = np.maximum([float(part.max()) for part in parts], 0.01) * 96
        lines = "".join(f"M{x} {50 - h / 2:.1f}v{h:.1f}" for x, h in enumerate(heights))
        dashes = ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 0 {BARS + 1} 100" '
        f'preserveAspectRatio="none"><path d="{lines}" stroke="#2f8fc4" stroke-width=".8" '
        f"{dashes}/></svg>"
    ).encode()


def depth(decoder: Decoder, file: MediaFile) -> bytes:
    """A depth map in colours, near is red, with a legend below; holes are grey. As PNG."""
    found = decoder.decode(file)
    assert isinstance(found, Depth)
    known = found.values[np.isfinite(found.values)]
    near, far = (float(edge) for edge in np.percentile(known, (1, 99)))
    shown = np.clip((found.values - near) / max(far - near, 1e-6), 0, 1)
    colours = colormaps["turbo_r"]
    pixels = (colours(np.nan_to_num(shown))[..., :3] * 255).astype(np.uint8)
    pixels[~np.isfinite(found.values)] = HOLE
    picture = Pillow.fromarray(pixels)
    width = max(picture.width, 240)
    picture = picture.resize((width, picture.height * width // picture.width))
    whole = Pillow.new("RGB", (width, picture.height + BAR), (20, 20, 20))
    whole.paste(picture)
    scale = (colours(np.linspace(0, 1, width))[None, :, :3] * 255).astype(np.uint8)
    whole.paste(Pillow.fromarray(scale).resize((width, 7)), (0, picture.height))
    ends = (f"{near:.1f} m", f"{far:.1f} m") if found.metric else ("near", "far (relative)")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(13)
    draw.text((4, whole.height - 3), ends[0], "white", font, "ld")
    draw.text((width - 4, whole.height - 3), ends[1], "white", font, "rd")
    return _encoded(whole, "PNG")


def _encoded(picture: Pillow.Image, form: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, quality=85)
    return file.getvalue()

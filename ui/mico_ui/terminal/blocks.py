"""Media as coloured blocks: two pixels in each character cell.

Legend: H height, W width in pixels, n samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from mico_chat.media import Audio, Depth, Medium, Video
from mico_ui.pictures import Pixels, depth_pixels, distances

MAX_COLUMNS, MAX_ROWS = 60, 18  # cells of a preview, which must not fill the screen
N_FRAMES = 4  # frames of a video that are shown
_BARS = " ▁▂▃▄▅▆▇█"


class Blocks:
    """Pixels (H, W, 3) as cells of a terminal: the upper half block over a background."""

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = self.pixels.tolist()
        for upper, lower in zip(rows[::2], rows[1::2], strict=True):
            for top, bottom in zip(upper, lower, strict=True):
                style = Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom))
                yield Segment("▀", style)
            yield Segment.line()


def preview(medium: Medium, columns: int) -> list[Blocks | Text]:
    """A medium to look at, at most ``columns`` cells wide."""
    width = min(columns, MAX_COLUMNS)
    if isinstance(medium, Audio):
        return [waveform(medium.samples, width)]
    if isinstance(medium, Depth):
        words = Text(f"{distances(medium)}; bright is near", style="dim")
        return [Blocks(fitted(depth_pixels(medium.values), width)), words]
    if isinstance(medium, Video):
        n_frames = min(N_FRAMES, len(medium.frames))
        picked = np.linspace(0, len(medium.frames) - 1, n_frames).round().astype(int)
        each = (columns - N_FRAMES) // N_FRAMES
        frames = [fitted(medium.frames[n], max(1, min(each, width))) for n in picked]
        shown: list[Blocks | Text] = [Blocks(_side_by_side(frames))]
        if medium.audio is not None:
            shown.append(waveform(medium.audio.samples, frames[0].shape[1] * len(frames)))
        return shown
    return [Blocks(fitted(medium.pixels, width))]


def fitted(pixels: Pixels, columns: int) -> Pixels:
    """Scaled to at most ``columns`` wide and MAX_ROWS cells high; an even number of rows."""
    height, width = pixels.shape[:2]
    scale = min(columns / width, 2 * MAX_ROWS / height)
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    return np.asarray(Pillow.fromarray(pixels).resize(size, Pillow.Resampling.BOX), np.uint8)


def waveform(samples: NDArray[np.float32], columns: int) -> Text:
    """A line of bars for samples (n,), each as high as the loudest sample of its part."""
    parts = np.array_split(np.abs(samples), columns)
    peaks = np.array([part.max() if len(part) else 0.0 for part in parts])
    loudest = peaks.max(initial=0.0)
    heights = np.ceil(peaks / loudest * (len(_BARS) - 1)) if loudest > 0 else peaks
    return Text("".join(_BARS[int(height)] for height in heights), style="cyan")


def _side_by_side(frames: list[Pixels]) -> Pixels:
    gap = np.zeros((len(frames[0]), 1, 3), np.uint8)
    strip = [piece for frame in frames for piece in (frame, gap)]
    return np.concatenate(strip[:-1], axis=1)

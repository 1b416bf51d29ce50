"""Media as blocks: what can be recognized in them, and that odd ones do no harm."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
from rich.console import Console

from mico_chat.media import Audio, Depth, Image, Medium, Normal, Video
from mico_ui.pictures import depth_pixels
from mico_ui.terminal.blocks import MAX_ROWS, fitted, preview, waveform


def drawn(
    medium: Medium, columns: int = 60, system: Literal["256", "truecolor"] = "truecolor"
) -> list[str]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system=system, width=columns, legacy_windows=False
    )
    for part in preview(medium, columns):
        console.print(part)
    return out.getvalue().splitlines()


def halves(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = pixels[height // 2 :, :, 2] = 255
    return pixels


def test_colours_and_proportions_stay() -> None:
    lines = drawn(Image(halves(100, 400)), 40)
    assert len(lines) == 5  # two pixels in each
    assert "38;2;255;0;0;48;2;255;0;0" in lines[0]
    assert "38;2;0;0;255;48;2;0;0;255" in lines[-1]
    assert lines[0].count("▀") == 40


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (3, 5), (1024, 1024)])
def test_odd_sizes_fit(shape: tuple[int, int]) -> None:
    for columns in (1, 5, 60):
        pixels = fitted(np.zeros((*shape, 3), np.uint8), columns)
        assert pixels.shape[0] % 2 == 0
        assert pixels.shape[0] <= 2 * MAX_ROWS
        assert pixels.shape[1] <= columns


def test_near_is_bright_and_holes_are_grey() -> None:
    values = np.linspace(1, 5, 100, dtype=np.float32).reshape(1, 100)
    values[0, 50] = np.nan
    colours = depth_pixels(values).astype(int).sum(-1)[0]
    assert colours[0] > colours[49] > colours[99] > 0
    assert colours[50] == 3 * 128
    assert "nearest 1.00 m, farthest 5.00 m" in drawn(Depth(values))[-1]
    relative = Depth(values * np.float32(0.2), metric=False)
    assert "farthest 1.00 (relative)" in drawn(relative, 100)[-1]
    assert "nothing was measured" in drawn(Depth(np.full((4, 4), np.nan, np.float32)))[-1]
    assert drawn(Depth(np.ones((4, 4), np.float32)))  # one distance alone


def test_a_waveform_is_high_where_it_is_loud() -> None:
    samples = np.concatenate([np.zeros(800), np.full(800, -0.5), np.full(800, 1.0)])
    assert waveform(samples.astype(np.float32), 6).plain == "  ▄▄██"
    assert waveform(np.zeros(100, np.float32), 5).plain == "     "
    assert waveform(np.zeros(0, np.float32), 5).plain == "     "
    assert waveform(np.ones(2, np.float32), 4).plain == "██  "  # fewer samples than columns


def test_a_clip_is_four_frames_and_its_sound() -> None:
    frames = np.stack([np.full((32, 32, 3), n * 30, np.uint8) for n in range(8)])
    sound = Audio(np.ones(1600, np.float32))
    lines = drawn(Video(frames, np.arange(8.0), audio=sound), 80)
    shown = [f"38;2;{v};{v};{v};" for v in (0, 60, 150, 210)]
    assert all(colour in lines[0] for colour in shown)
    assert "█" in lines[-1]
    assert "█" not in drawn(Video(frames[:1], np.zeros(1)), 80)[-1]
    for columns in (4, 6, 20):
        assert drawn(Video(frames, np.arange(8.0)), columns)
        assert drawn(Normal(halves(4, 9)), columns)

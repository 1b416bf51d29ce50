"""A contact sheet: what is in a shard, as one PNG to look at.

Pictures as they are, depth colour-mapped, video as a film strip, sound as waveform over
spectrogram; beside each a caption and two questions with answers.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mico_training.world.sample import Sample, kind_of
from mico_training.world.shards import read_shard

TILE = 160
TEXT_WIDTH = 330
_FILM = 5  # frames of a video that are shown


def main(shard: str | Path, output: str | Path, n: int = 24, columns: int = 2) -> None:
    """Write the first ``n`` samples of ``shard`` to the PNG ``output``."""
    contact_sheet(islice(read_shard(shard), n), columns=columns).save(output)


def contact_sheet(samples: Iterable[Sample], columns: int = 2) -> Image.Image:
    """All samples on one picture."""
    cells = [_cell(sample) for sample in samples]
    width = max(cell.width for cell in cells)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (columns * width, sum(heights)), (238, 238, 238))
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            sheet.paste(cell, (i * width, top))
        top += height
    return sheet


def _cell(sample: Sample) -> Image.Image:
    media = [_thumbnail(member, data) for member, data in sample.files.items()]
    text = _text(sample)
    lines = [line for part in text for line in textwrap.wrap(part, 54) or [""]]
    height = max(TILE + 8, 14 * len(lines) + 10)
    width = sum(m.width + 4 for m in media) + TEXT_WIDTH + 8
    cell = Image.new("RGB", (width, height), "white")
    left = 4
    for picture in media:
        cell.paste(picture, (left, 4))
        left += picture.width + 4
    draw = ImageDraw.Draw(cell)
    draw.multiline_text(
        (left + 4, 4), "\n".join(lines), "black", ImageFont.load_default(11), spacing=2
    )
    draw.rectangle((0, 0, width - 1, height - 1), outline=(190, 190, 190))
    return cell


def _text(sample: Sample) -> list[str]:
    caption = next((c[0] for c in sample.captions.values() if c), "")
    lines = [f"{sample.id}  {caption}"]
    for turn in sample.turns[:3]:
        media = "+".join(kind_of(m) for m in turn.media)
        lines.append(f"[{media}] {turn.question}")
        lines.append(f"   -> {turn.answer}")
    return lines


def _thumbnail(member: str, data: bytes) -> Image.Image:
    kind = kind_of(member)
    if kind == "video":
        return _film(data)
    if kind == "audio":
        return _sound(data)
    picture: Image.Image = Image.open(io.BytesIO(data))
    if kind == "depth":
        picture = _coloured_depth(np.asarray(picture).astype(np.float32))
    picture = picture.convert("RGB")
    picture.thumbnail((TILE, TILE))
    return picture


def _coloured_depth(depth: NDArray[np.float32]) -> Image.Image:
    """Near red, far blue, holes black."""
    seen = depth > 0
    low, high = np.percentile(depth[seen], [1, 99]) if seen.any() else (0.0, 1.0)
    t = np.clip((depth - low) / max(float(high - low), 1e-6), 0, 1)
    rgb = np.stack([1 - t, 1 - np.abs(2 * t - 1), t], axis=-1) * seen[..., None]
    return Image.fromarray((rgb * 255).astype(np.uint8))


def _film(data: bytes) -> Image.Image:
    with av.open(io.BytesIO(data), "r") as container:
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    frames = [Image.fromarray(np.asarray(pixels, dtype=np.uint8)) for pixels in decoded]
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(_FILM, len(frames)))]
    for frame in chosen:
        frame.thumbnail((TILE * 3 // 5, TILE))
    strip = Image.new("RGB", (sum(f.width + 2 for f in chosen), chosen[0].height), "black")
    left = 0
    for frame in chosen:
        strip.paste(frame, (left, 0))
        left += frame.width + 2
    return strip


def _sound(data: bytes) -> Image.Image:
    """Waveform over a log spectrogram (0-8 kHz)."""
    with av.open(io.BytesIO(data), "r") as container:
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=16000)
        parts = [
            r.to_ndarray()[0] for f in container.decode(audio=0) for r in resampler.resample(f)
        ]
        parts += [r.to_ndarray()[0] for r in resampler.resample(None)]
    samples = np.concatenate(parts) if parts else np.zeros(16000, np.float32)
    half = TILE // 2
    picture = Image.new("RGB", (TILE, TILE), "white")
    draw = ImageDraw.Draw(picture)
    for x, part in enumerate(np.array_split(samples, TILE)):
        peak = float(np.abs(part).max(initial=0.0))
        draw.line((x, half / 2 * (1 - peak), x, half / 2 * (1 + peak)), (40, 90, 160))
    size = 512
    padded = np.pad(samples, (0, max(0, size - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::160] * np.hanning(size)
    power = np.log10(np.abs(np.fft.rfft(frames, axis=1)) ** 2 + 1e-6).T[::-1]
    scaled = np.clip((power - power.max() + 6) / 6, 0, 1)
    spectrogram = Image.fromarray((scaled * 255).astype(np.uint8)).resize((TILE, half))
    picture.paste(spectrogram.convert("RGB"), (0, half))
    return picture

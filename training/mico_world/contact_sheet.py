"""A contact sheet of training data: ``python -m mico_world.contact_sheet PATH SHEET.png``."""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mico_chat.errors import MicoError
from mico_chat.media import Audio, Depth, MediaFile, Pages, Video, decode
from mico_chat.media.medium import SAMPLE_RATE
from mico_training.data.sources.contents import contents
from mico_training.data.sources.sample import TrainingSample

SAMPLES = 24
FRAMES = 4
"""So many frames of a clip are shown."""


def contact_sheet(samples: Sequence[TrainingSample], path: Path, columns: int = 2) -> None:
    most = max(1, *(len(sample.media) for sample in samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(columns * (1.6 * most + 3.2), 1.6 * rows), dpi=90)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns * (most + 2), wspace=0.05, hspace=0.1)
    for number, sample in enumerate(samples):
        row, left = number // columns, number % columns * (most + 2)
        for place, file in enumerate(sample.media.values()):
            axes = figure.add_subplot(grid[row, left + place])
            axes.set_axis_off()
            try:
                _draw(axes, file)
            except (MicoError, OSError) as error:
                axes.text(0, 1, textwrap.fill(str(error), 24), va="top", fontsize=6)
        axes = figure.add_subplot(grid[row, left + len(sample.media) : left + most + 2])
        axes.set_axis_off()
        axes.text(0, 1, _text(sample), va="top", fontsize=6, transform=axes.transAxes)
    figure.savefig(path, bbox_inches="tight")


def _draw(axes: Axes, file: MediaFile) -> None:
    medium = decode(file)
    match medium:
        case Audio():
            axes.specgram(medium.samples + 1e-6, NFFT=512, Fs=SAMPLE_RATE, noverlap=352)
        case Depth():
            distances = np.where(medium.values > 0, medium.values, np.nan)
            axes.imshow(distances, cmap="turbo_r")
        case Video():
            shown = np.linspace(0, len(medium.frames) - 1, FRAMES).round().astype(int)
            axes.imshow(np.concatenate(list(medium.frames[shown]), axis=1))
        case Pages():
            axes.imshow(medium.pages[0].pixels)
        case _:
            axes.imshow(medium.pixels)


def _text(sample: TrainingSample) -> str:
    caption = next((texts[0] for texts in sample.captions.values() if texts), "")
    lines = [f"{sample.id}  {caption}"]
    lines += [f"{turn.question} -> {turn.answer}" for turn in sample.turns[:3]]
    lines += [f"{message.role}: {message.text}" for message in sample.conversation[:4]]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 60))


if __name__ == "__main__":
    found = contents(sys.argv[1])
    contact_sheet([*map(found.sample, found.numbers[:SAMPLES].tolist())], Path(sys.argv[2]))

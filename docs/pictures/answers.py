"""Draws docs/pictures/answers.png: media, a question about each, and what the model answers.

    python docs/pictures/answers.py ITEMS.jsonl [ITEMS.jsonl ...] --ids ID [ID ...]

The items are evaluation items, which training never saw (``make mini`` writes them).
"""

import argparse
import textwrap
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from mico_chat.assistant import decode_media
from mico_chat.engine.base import GenerationOptions
from mico_chat.evaluation.task import Item, read_items
from mico_chat.load import load_assistant
from mico_chat.media import Audio, Depth, MediaDecoder, MediaFile, Medium, Video
from mico_chat.model.preprocessing import fbank


def picture_of(medium: Medium) -> np.ndarray:
    """A picture of the medium for people: pixels, a film strip, a spectrogram, coloured depth."""
    match medium:
        case Video():
            return np.concatenate(list(medium.frames[:: max(1, len(medium.frames) // 4)]), 1)
        case Audio():
            return fbank(torch.from_numpy(medium.samples[: 16000 * 5]), 96).T.flip(0).numpy()
        case Depth():
            return -np.log(medium.values)
        case _:
            return medium.pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("items", type=Path, nargs="+")
    parser.add_argument("--ids", nargs="+", required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "answers.png")
    options = parser.parse_args()
    found = {item.id: item for path in options.items for item in read_items(path)}
    items: list[Item] = [found[i] for i in options.ids]
    columns = 4
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), layout="constrained")
    with MediaDecoder() as decoder, closing(load_assistant(options.model, decoder)) as assistant:
        for number, item in enumerate(items):
            asked = decode_media(item.messages(), decoder)
            (answer,) = assistant.answer_all([asked], GenerationOptions(max_tokens=40))
            axes = figure.add_subplot(rows, columns, number + 1)
            media = [part for message in asked for part in message.media]
            for place, part in enumerate(media):
                n = len(media)
                inset = axes.inset_axes((place / n, 0.0, 1 / n - 0.02, 1.0))
                assert not isinstance(part, MediaFile)
                aspect: Literal["auto", "equal"] = "auto" if isinstance(part, Audio) else "equal"
                inset.imshow(picture_of(part), cmap="magma", aspect=aspect)
                inset.set_axis_off()
            axes.set_axis_off()
            question = textwrap.fill(item.question, 34)
            said = textwrap.fill(answer.text, 34)
            axes.set_title(question, fontsize=10, color="0.35")
            axes.text(0.5, -0.03, said, transform=axes.transAxes, ha="center", va="top",
                      fontsize=11, weight="bold")  # fmt: skip
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()

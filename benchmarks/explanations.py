"""Is an explanation right? Questions with two media, of which one decides, and with none that does.

``python -m benchmarks.explanations data/mini/items/items.jsonl --output benchmarks/results`` asks
the mini about a picture, a sound or a clip with another medium beside it, in both orders. The
medium that the question is about should have the largest share. Then it asks general questions with
a picture and a sound beside them: no medium should have a share.
"""

import asyncio
import json
import random
import statistics
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from benchmarks.summary import Ratio, keep
from benchmarks.systems import machine, publish, table
from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message

ABOUT = {"image": ("colour", "count", "name"), "audio": ("sound",), "video": ("motion",)}
"""The skills whose questions are about one medium of the kind."""
GENERAL = (
    "How many days does a week have?",
    "What is the opposite of hot?",
    "What is two plus two?",
    "Say hello.",
    "What colour is the sky on a clear day?",
    "Which animal says meow?",
    "What is the capital of France?",
    "Name a day of the week.",
)
OPTIONS = GenerationOptions(max_tokens=24, explain=True)

Item = dict[str, Any]


def items_of(file: Path) -> dict[str, list[Item]]:
    """The items with one medium, by its kind, of the skills above."""
    found: dict[str, list[Item]] = defaultdict(list)
    for line in file.read_text().splitlines():
        item = json.loads(line)
        kinds = [medium["kind"] for medium in item["media"]]
        if len(kinds) == 1 and item["skill"] in ABOUT.get(kinds[0], ()):
            found[kinds[0]].append(item)
    return found


def medium_of(item: Item, folder: Path) -> MediaFile:
    (medium,) = item["media"]
    return MediaFile(medium["kind"], folder / medium["path"])


def asked(assistant: Assistant, text: str, *media: MediaFile) -> Answer:
    return asyncio.run(assistant.answer([Message.user(*media, text)], OPTIONS))


def main(items: Path, output: Path | None = None, n: int = 20, seed: int = 0) -> None:
    rng = random.Random(seed)
    found = items_of(items)
    rows = []
    right = whole = 0
    with MediaDecoder() as decoder:
        assistant = load_assistant("mini", decoder, similarity=False)
        try:
            for kind, own in found.items():
                for other, beside in found.items():
                    if other == kind:
                        continue
                    hits, deciding, idle = [], [], []
                    for number, item in enumerate(rng.sample(own, min(n, len(own)))):
                        media = [medium_of(one, items.parent) for one in (item, rng.choice(beside))]
                        place = number % 2
                        media = media[::-1] if place else media
                        told = asked(assistant, item["message"], *media).explanation
                        assert told is not None
                        effects = [medium.effect for medium in told.media]
                        shares = [medium.share for medium in told.media]
                        hits.append(shares[place] > shares[1 - place])
                        deciding.append(effects[place])
                        idle.append(effects[1 - place])
                    right, whole = right + sum(hits), whole + len(hits)
                    medians = [f"{statistics.median(one):.2f}" for one in (deciding, idle)]
                    rows.append([kind, other, f"{sum(hits)} of {len(hits)}", *medians])
            general = []
            for text in GENERAL:
                media = [medium_of(rng.choice(found[kind]), items.parent) for kind in found]
                answer = asked(assistant, text, *media[:2])
                told = answer.explanation
                assert told is not None
                lost = [f"{medium.effect:.2f}" for medium in told.media]
                same = "yes" if told.same_without_media else "no"
                general.append([text, answer.text.replace("|", " "), *lost, same])
        finally:
            assistant.close()
    kinds = list(found)[:2]
    publish(
        "# Which medium made the answer\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {machine('torch', 'transformers')}. Made by "
        "`python -m benchmarks.explanations`. The mini; effects are nats that the answer's "
        "log-probability loses without the medium, medians.\n\n"
        "The question is about one of two media. How often it has the larger share:\n\n"
        + table(["about", "beside", "largest share", "its effect", "the other's"], rows)
        + f"\n\nIn all {right} of {whole}: {right / whole:.0%}.\n\n"
        "General questions, with two media that say nothing about them:\n\n"
        + table(["question", "answer", *kinds, "the same without"], general)
        + "\n",
        "explanations.md",
        output,
    )
    name = "explanations: the deciding medium has the largest share"
    ratio = Ratio(measure=name, value=100 * right / whole, unit="%", goal=95.0)
    keep("explanations", [ratio], output, "explanations.md", ("torch", "transformers"))


if __name__ == "__main__":
    typer.run(main)

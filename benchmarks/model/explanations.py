"""Is an explanation right? Questions with two media, of which one decides, and with none that does.

``python -m benchmarks explanations data/mini/items/items.jsonl --output benchmarks/results`` asks
the mini about a picture, a sound or a clip with another medium beside it, in both orders. Which
medium decides is found without the explanation: each medium is exchanged for others of its kind. A
scene counts if the answer changes with the medium that the question is about, and without it, and
never with the other one; the first should then have the largest share. General questions count
whose answer is the same with other media and with none; there no medium should have a share. What
does not count is the model's own mixing-up of media, and is told too.
"""

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import Ratio, Report
from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message
from mico_chat.wire import Explanation

ABOUT = {"image": ("colour", "count", "name"), "audio": ("sound",), "video": ("motion",)}
"""The skills whose questions are about one medium of the kind."""
GENERAL: list[str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
EXCHANGES = 3
"""How often a medium is exchanged; in two of three the answer must change."""

Item = dict[str, Any]


class Scenes:
    """Items with one medium, by its kind, of the skills above, and the model that is asked."""

    def __init__(self, file: Path, assistant: Assistant, rng: random.Random) -> None:
        self.assistant, self.rng, self._folder = assistant, rng, file.parent
        self.items: dict[str, list[Item]] = defaultdict(list)
        for line in file.read_text().splitlines():
            item = json.loads(line)
            kinds = [medium["kind"] for medium in item["media"]]
            if len(kinds) == 1 and item["skill"] in ABOUT.get(kinds[0], ()):
                self.items[kinds[0]].append(item)

    def medium(self, item: Item) -> MediaFile:
        (medium,) = item["media"]
        return MediaFile(medium["kind"], self._folder / medium["path"])

    def any_of(self, kind: str) -> MediaFile:
        return self.medium(self.rng.choice(self.items[kind]))

    def ask(self, text: str, *media: MediaFile, explain: bool = False) -> Answer:
        options = GenerationOptions(max_tokens=24, explain=explain)
        return self.assistant.answer_all([[Message.user(*media, text)]], options)[0]

    def explained(self, text: str, *media: MediaFile) -> Explanation:
        told = self.ask(text, *media, explain=True).explanation
        assert told is not None
        return told

    def said(self, text: str, order: slice, *media: MediaFile) -> str:
        return self.ask(text, *media[order]).text

    def deciding(self, kind: str, other: str, n: int) -> Iterator[tuple[float, float] | None]:
        """The shares of the medium that decides and of the other; None where none decides alone."""
        for number, item in enumerate(self.rng.sample(self.items[kind], n)):
            own, beside = self.medium(item), self.any_of(other)
            order, question = slice(None, None, -1 if number % 2 else 1), item["message"]
            said = partial(self.said, question, order)
            text = said(own, beside)
            changed = sum(said(self.any_of(kind), beside) != text for _ in range(EXCHANGES))
            others = sum(said(own, self.any_of(other)) != text for _ in range(EXCHANGES))
            if others or changed < EXCHANGES - 1 or said(beside) == text:
                yield None
                continue
            first, second = self.explained(question, *[own, beside][order]).media[order]
            yield first.share, second.share

    def general(self, text: str) -> tuple[str, Explanation | None]:
        """The answer beside two media, and what it rests on; None if it depends on them."""
        kinds = self.rng.sample(list(self.items), 2)
        shown = [self.any_of(kind) for kind in kinds]
        found = self.ask(text, *shown).text
        others = [[self.any_of(kind) for kind in kinds] for _ in range(EXCHANGES - 1)]
        if any(self.ask(text, *media).text != found for media in [*others, []]):
            return found, None
        return found, self.explained(text, *shown)


def measure(items: Path, n: int = 20, seed: int = 0) -> Report:
    """``n`` scenes of each pair of kinds, and of each general question a sixth as many."""
    rows, general = [], []
    right = whole = free = unmoved = 0
    with (
        MediaDecoder() as decoder,
        closing(load_assistant("mini", decoder, similarity=False)) as assistant,
    ):
        assistant.encoder.reader = None  # no words are in these media
        scenes = Scenes(items, assistant, random.Random(seed))
        for kind, other in permutations(scenes.items, 2):
            shares = [pair for pair in scenes.deciding(kind, other, n) if pair is not None]
            hits = sum(own > beside for own, beside in shares)
            right, whole = right + hits, whole + len(shares)
            mean = f"{statistics.fmean(own for own, _ in shares):.2f}" if shares else ""
            rows.append([kind, other, str(n), str(len(shares)), str(hits), mean])
            print(*rows[-1], flush=True)
        for text in GENERAL:
            for _ in range(max(1, n // 6)):
                found, told = scenes.general(text)
                if told is None:
                    continue
                resting = any(medium.share for medium in told.media)
                effects = ", ".join(f"{medium.effect:.2f}" for medium in told.media)
                unmoved, free = unmoved + 1, free + (not resting)
                general.append([text, found.replace("|", " "), effects, "yes" if resting else "no"])
    ratios = [
        Ratio(measure=f"explanations: {name}", value=100 * hits / max(1, most), unit="%", goal=goal)
        for name, hits, most, goal in (
            ("the deciding medium has the largest share", right, whole, 95.0),
            ("no medium has a share where none counts", free, unmoved, 100.0),
        )
    ]
    found_of = {"right": right, "whole": whole, "unmoved": unmoved, "free": free}
    asked = len(GENERAL) * max(1, n // 6)
    values = {"rows": rows, "general": general, "asked": asked, "exchanges": EXCHANGES}
    return Report({**values, **found_of}, ratios)

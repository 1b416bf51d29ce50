"""Examples about things no training picture shows: their concepts are simulated.

The stem knows 1,000 classes, the data engine pictures fewer of them. What the language model has
to learn is to put the concept attention's mix of word vectors into words, and for that a
posterior is enough: a picture of the sample is shown, but the concept path is given the posterior
of a drawn name instead of the picture's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mico_chat.media import MediaFile
from mico_chat.messages import Message, TextPart
from mico_training.data.conversations import ChatExample
from mico_training.data.mixture import Mixture

PURPOSE = 3  # of the mixture's generators
QUESTIONS = (
    "What is in this picture?",
    "What is this?",
    "What do you see?",
    "What does the picture show?",
    "What is in the image?",
    "What can you see in this photo?",
    "Name the main thing in the picture.",
    "What is shown here?",
)
ANSWERS = ("{name}.", "{name}.", "{name}.", "It is {name}.", "The picture shows {name}.")


class ChatDataset(Protocol):
    """Chat examples by draw."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: int) -> ChatExample: ...


class SimulatedNames:
    """A data set of which a share of the examples with a picture name a simulated thing."""

    def __init__(
        self, examples: ChatDataset, mixture: Mixture, names: Sequence[str], probability: float
    ) -> None:
        self.examples = examples
        self.mixture = mixture
        self.names = names
        self.probability = probability

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draw: int) -> ChatExample:
        example = self.examples[draw]
        pictures = [medium for medium in example.media if medium.kind == "image"]
        generator = self.mixture.generator(draw, PURPOSE)
        if not pictures or generator.random() >= self.probability:
            return example
        number = int(generator.integers(len(self.names)))
        question = QUESTIONS[int(generator.integers(len(QUESTIONS)))]
        answer = ANSWERS[int(generator.integers(len(ANSWERS)))].format(
            name=with_article(self.names[number])
        )
        shown = MediaFile("image", b"", pictures[0].name)
        return replace(
            example,
            messages=(
                Message("user", (shown, TextPart(question))),
                Message("assistant", (TextPart(answer[0].upper() + answer[1:]),)),
            ),
            media=(pictures[0],),
            simulated=number,
            regions=(),
        )


def with_article(name: str) -> str:
    """``"otter"`` -> ``"an otter"``; plurals stay bare."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"

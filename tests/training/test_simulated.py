"""Simulated names: a share of the pictures stands for drawn names, the same at every visit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mico_chat.media import MediaFile
from mico_chat.messages import Message, TextPart
from mico_training.data.conversations import QUESTIONS, ChatExample, SimulatedNames, with_article
from mico_training.data.mixture import Mixture
from mico_training.data.sample import TrainingMedium, TrainingSample

NAMES = ["otter", "ball", "scissors", "glass"]


class Pictures:
    """Examples with a sound and two pictures, or with a sound alone."""

    def __init__(self, pictures: int = 2, length: int = 400) -> None:
        media = [TrainingMedium("audio", Path("a.wav"), "a")]
        media += [TrainingMedium("image", Path(f"{n}.png"), f"p{n}") for n in range(pictures)]
        parts = [MediaFile(medium.kind, "", medium.name) for medium in media]
        messages = (Message.user(*parts, "What is here?"), Message.assistant("Much."))
        self.example = ChatExample("x", messages, tuple(media))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: int) -> ChatExample:
        return self.example


class OneSample:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> TrainingSample:
        return TrainingSample(id="x", media={})


def simulated(examples: Pictures, probability: float) -> SimulatedNames:
    return SimulatedNames(examples, Mixture([OneSample()], [1], seed=3), NAMES, probability)


def test_a_share_of_the_examples_is_simulated() -> None:
    data = simulated(Pictures(), 0.25)
    assert len(data) == 400
    found = [data[draw] for draw in range(400)]
    numbers = [example.simulated for example in found if example.simulated >= 0]
    assert len(numbers) / 400 == pytest.approx(0.25, abs=0.07)
    assert set(numbers) == set(range(len(NAMES)))
    plain = next(example for example in found if example.simulated < 0)
    assert plain is data.examples[0]


def test_a_simulated_example_names_the_drawn_thing() -> None:
    data = simulated(Pictures(), 1.0)
    for draw in range(50):
        example = data[draw]
        (picture,) = example.media
        assert (picture.kind, picture.name) == ("image", "p0")
        question, answer = example.messages
        assert question.role == "user"
        assert question.text in QUESTIONS
        assert [part.kind for part in question.media] == ["image"]
        assert isinstance(answer.content[0], TextPart)
        said = answer.text
        assert with_article(NAMES[example.simulated]) in said[0].lower() + said[1:]
        assert said[0].isupper()
        assert said.endswith(".")


def test_a_draw_is_the_same_at_every_visit() -> None:
    one, other = simulated(Pictures(), 0.5), simulated(Pictures(), 0.5)
    assert [one[draw] for draw in range(60)] == [other[draw] for draw in reversed(range(60))][::-1]


def test_without_a_picture_nothing_is_simulated() -> None:
    data = simulated(Pictures(pictures=0), 1.0)
    assert all(data[draw].simulated == -1 for draw in range(20))


def test_probability_zero_changes_nothing() -> None:
    data = simulated(Pictures(), 0.0)
    assert all(data[draw] is data.examples[draw] for draw in range(20))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("otter", "an otter"),
        ("ball", "a ball"),
        ("scissors", "scissors"),
        ("glass", "a glass"),
        ("Eskimo dog", "an Eskimo dog"),
    ],
)
def test_articles(name: str, said: str) -> None:
    assert with_article(name) == said

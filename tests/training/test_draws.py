"""Draws depend on seed and number alone: mixtures, contexts, conversations, simulated names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mico_chat.errors import ConfigError
from mico_chat.media import MediaFile
from mico_chat.messages import Message, TextPart
from mico_training.data.contexts import CORPUS_PAIRS, ContextDataset
from mico_training.data.conversations import (
    QUESTIONS,
    WINDOW,
    CaptionDataset,
    ChatExample,
    ConversationDataset,
    GroupedByLength,
    SimulatedNames,
    about_tokens,
    with_article,
)
from mico_training.data.mixture import BLOCK, Mixture
from mico_training.data.sample import TrainingSample
from mico_training.data.shards import ShardSource


class Numbers:
    """A source whose samples are their own numbers."""

    def __init__(self, name: str, length: int) -> None:
        self.name = name
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TrainingSample:
        return TrainingSample(id=f"{self.name}{index}", media={})


def test_ratios_hold_in_every_block_and_every_epoch_visits_all() -> None:
    mixture = Mixture([Numbers("a", 10), Numbers("b", 700)], [1, 3], seed=5)
    located = [mixture.locate(draw) for draw in range(2 * BLOCK)]
    for block in range(2):
        counts = Counter(source for source, _, _ in located[block * BLOCK : (block + 1) * BLOCK])
        assert counts == {0: BLOCK // 4, 1: 3 * BLOCK // 4}
    for epoch in range(3):
        indices = [i for source, e, i in located if source == 1 and e == epoch]
        assert sorted(indices) == list(range(700))
        assert indices != sorted(indices)


def test_a_draw_does_not_depend_on_those_before_it() -> None:
    sources = [Numbers("a", 10), Numbers("b", 70)]
    forwards = Mixture(sources, [1, 3], seed=5)
    backwards = Mixture(sources, [1, 3], seed=5)
    ids = [forwards.sample(draw).id for draw in range(300)]
    assert [backwards.sample(draw).id for draw in reversed(range(300))] == ids[::-1]
    other = Mixture(sources, [1, 3], seed=6)
    assert [other.sample(draw).id for draw in range(300)] != ids


def test_a_source_of_ratio_zero_is_never_drawn_and_a_tiny_one_is() -> None:
    mixture = Mixture([Numbers("a", 9), Numbers("b", 9), Numbers("c", 9)], [1, 0, 1e-9], seed=0)
    counts = Counter(mixture.locate(draw)[0] for draw in range(BLOCK))
    assert counts == {0: BLOCK - 1, 2: 1}
    with pytest.raises(ConfigError, match="no sample can be drawn"):
        Mixture([Numbers("a", 9)], [0], seed=0)


@pytest.fixture
def mixture(shards: Path) -> Mixture:
    return Mixture([ShardSource(str(shards / "*.tar"), "conversation")], [1.0], seed=1)


def test_joint_contexts_concatenate_their_captions(mixture: Mixture) -> None:
    examples = [ContextDataset(mixture, 64, 0.5, 0.0)[draw] for draw in range(64)]
    kinds = {tuple(m.kind for m in example.media) for example in examples}
    assert kinds == {("image",), ("audio",), ("image", "audio")}
    words = {"image": "square", "audio": "tone"}
    for example in examples:
        assert all(words[medium.kind] in example.caption for medium in example.media)
        assert example.corpus_pair == 0


def test_cross_corpus_joins_two_samples_and_names_the_pair(mixture: Mixture) -> None:
    examples = [ContextDataset(mixture, 32, 1.0, 1.0)[draw] for draw in range(32)]
    pair = CORPUS_PAIRS[frozenset(("image", "audio"))]
    assert {example.corpus_pair for example in examples} == {pair}
    for example in examples:
        names = [medium.name.split("/")[1].split(".")[0] for medium in example.media]
        assert len(set(names)) == 2
        assert "square" in example.caption
        assert "tone" in example.caption


def test_a_caption_is_the_answer_to_a_varied_instruction(mixture: Mixture) -> None:
    dataset = CaptionDataset(mixture, 32, join=0.2)
    questions = {dataset[draw].messages[0].text for draw in range(32)}
    assert len(questions) > 4
    for draw in range(32):
        example = dataset[draw]
        assert example == dataset[draw]
        assert example.messages[0].files == example.media


def test_conversations_show_each_medium_once_at_its_first_use(mixture: Mixture) -> None:
    dataset = ConversationDataset(mixture, 64, max_turns=3)
    lengths = Counter(len(dataset[draw].messages) for draw in range(64))
    assert set(lengths) == {2, 4, 6}
    without = 0
    for draw in range(64):
        example = dataset[draw]
        assert example == dataset[draw]
        names = [medium.name for medium in example.media]
        assert len(set(names)) == len(names)
        without += not names
        for message in example.messages:
            if "colour" in message.text:
                assert "image" in [medium.kind for medium in example.media]
    assert without  # text-only conversations occur


# --- batches of conversations of like length ----------------------------------------------------

BATCH = 4


class Examples:
    """Conversations of lengths drawn at random."""

    def __init__(self, n: int) -> None:
        self.lengths = np.random.default_rng(0).integers(4, 400, n)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, draw: int) -> ChatExample:
        text = TextPart("x" * int(self.lengths[draw]))
        return ChatExample(str(draw), (Message("user", (text,)),))


def test_each_example_is_drawn_once_and_stays_in_its_window() -> None:
    n = 2 * WINDOW * BATCH + 7
    grouped = GroupedByLength(Examples(n), BATCH, seed=0)
    drawn = [int(grouped[i].id) for i in range(n)]
    assert sorted(drawn) == list(range(n))
    assert all(i // (WINDOW * BATCH) == d // (WINDOW * BATCH) for i, d in enumerate(drawn))
    for draw in (n - 1, 5, WINDOW * BATCH):  # whatever was drawn before
        assert GroupedByLength(Examples(n), BATCH, seed=0)[draw].id == str(drawn[draw])
    other = GroupedByLength(Examples(n), BATCH, seed=1)
    assert [int(other[i].id) for i in range(n)] != drawn


def test_a_batch_holds_like_lengths_and_batches_are_mixed() -> None:
    n = WINDOW * BATCH
    grouped = GroupedByLength(Examples(n), BATCH, seed=0)
    lengths = np.array([about_tokens(grouped[i]) for i in range(n)]).reshape(-1, BATCH)
    plain = np.array([about_tokens(Examples(n)[i]) for i in range(n)]).reshape(-1, BATCH)
    assert np.ptp(lengths, axis=1).max() < np.ptp(plain, axis=1).min()
    assert (np.diff(lengths.max(1)) < 0).any()


# --- simulated names ----------------------------------------------------------------------------

NAMES = ["otter", "ball", "scissors", "glass"]


class Pictures:
    """Examples with a sound and two pictures, or with a sound alone."""

    def __init__(self, pictures: int = 2) -> None:
        media = [MediaFile("audio", Path("a.wav"), "a")]
        media += [MediaFile("image", Path(f"{n}.png"), f"p{n}") for n in range(pictures)]
        messages = (Message.user(*media, "What is here?"), Message.assistant("Much."))
        self.example = ChatExample("x", messages)

    def __len__(self) -> int:
        return 400

    def __getitem__(self, draw: int) -> ChatExample:
        return self.example


def simulated(probability: float, pictures: int = 2) -> list[ChatExample]:
    mixture = Mixture([Numbers("x", 1)], [1], seed=3)
    data = SimulatedNames(Pictures(pictures), mixture, NAMES, probability)
    found = [data[draw] for draw in range(len(data))]
    assert [data[draw] for draw in reversed(range(20))] == found[19::-1]
    return found


@pytest.mark.parametrize(("probability", "pictures"), [(0.25, 2), (0.0, 2), (1.0, 0)])
def test_a_share_of_the_examples_is_simulated(probability: float, pictures: int) -> None:
    found = simulated(probability, pictures)
    numbers = [example.simulated for example in found if example.simulated >= 0]
    assert len(numbers) / 400 == pytest.approx(probability * bool(pictures), abs=0.07)
    assert set(numbers) == (set(range(len(NAMES))) if numbers else set())
    plain = Pictures(pictures).example
    assert all(example == plain for example in found if example.simulated < 0)


def test_a_simulated_example_names_the_drawn_thing() -> None:
    for example in simulated(1.0)[:50]:
        (picture,) = example.media
        assert (picture.kind, picture.name) == ("image", "p0")
        question, answer = example.messages
        assert question.role == "user"
        assert question.text in QUESTIONS
        assert [part.kind for part in question.media] == ["image"]
        said = answer.text
        assert with_article(NAMES[example.simulated]) in said[0].lower() + said[1:]
        assert said[0].isupper()
        assert said.endswith(".")


def test_articles() -> None:
    names = ["otter", "ball", "scissors", "glass", "Eskimo dog"]
    told = ["an otter", "a ball", "scissors", "a glass", "an Eskimo dog"]
    assert [with_article(name) for name in names] == told

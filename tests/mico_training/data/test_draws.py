"""Draws depend on seed and number alone: mixtures, contexts, conversations, simulated names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from mico_chat.errors import ConfigError
from mico_chat.media import Kind, MediaFile
from mico_chat.messages import Message
from mico_training.build_model import learn_vocabulary
from mico_training.data.batches import ContextCollator
from mico_training.data.examples import (
    QUESTIONS,
    WINDOW,
    CaptionDataset,
    ChatExample,
    ContextDataset,
    ContextExample,
    ConversationDataset,
    GroupedByLength,
    QuestionDataset,
    SimulatedCaptions,
    SimulatedNames,
    about_tokens,
    with_article,
)
from mico_training.data.media import LoadedMedium
from mico_training.data.mixture import BLOCK, Mixture
from mico_training.data.sources.sample import TrainingSample
from mico_training.data.sources.shards import ShardSource
from mico_training.recipe import ObjectiveWeights, Stage1Recipe


def numbers(name: str, length: int) -> list[TrainingSample]:
    """A source whose samples are their own numbers."""
    return [TrainingSample(id=f"{name}{number}", media={}) for number in range(length)]


def test_ratios_hold_in_every_block_and_every_epoch_visits_all() -> None:
    mixture = Mixture([numbers("a", 10), numbers("b", 700)], [1, 3], seed=5)
    located = [mixture.locate(draw) for draw in range(2 * BLOCK)]
    for block in range(2):
        counts = Counter(source for source, _, _ in located[block * BLOCK : (block + 1) * BLOCK])
        assert counts == {0: BLOCK // 4, 1: 3 * BLOCK // 4}
    for epoch in range(3):
        indices = [i for source, e, i in located if source == 1 and e == epoch]
        assert sorted(indices) == list(range(700))
        assert indices != sorted(indices)


def test_a_draw_does_not_depend_on_those_before_it() -> None:
    sources = [numbers("a", 10), numbers("b", 70)]
    forwards = Mixture(sources, [1, 3], seed=5)
    backwards = Mixture(sources, [1, 3], seed=5)
    ids = [forwards.sample(draw).id for draw in range(300)]
    assert [backwards.sample(draw).id for draw in reversed(range(300))] == ids[::-1]
    other = Mixture(sources, [1, 3], seed=6)
    assert [other.sample(draw).id for draw in range(300)] != ids


def test_a_source_of_ratio_zero_is_never_drawn_and_a_tiny_one_is() -> None:
    mixture = Mixture([numbers("a", 9), numbers("b", 9), numbers("c", 9)], [1, 0, 1e-9], seed=0)
    counts = Counter(mixture.locate(draw)[0] for draw in range(BLOCK))
    assert counts == {0: BLOCK - 1, 2: 1}
    with pytest.raises(ConfigError, match="no sample can be drawn"):
        Mixture([numbers("a", 9)], [0], seed=0)


@pytest.fixture
def mixture(shards: Path) -> Mixture:
    return Mixture([ShardSource(str(shards / "*.tar"), "conversation")], [1.0], seed=1)


def test_joint_contexts_concatenate_their_captions(mixture: Mixture) -> None:
    examples = [ContextDataset(mixture, 64, 0.5, 0.0)[draw] for draw in range(64)]
    kinds = {tuple(m.kind for m in example.media) for example in examples}
    assert kinds == {("image",), ("audio",), ("image", "audio")}
    words = {"image": "square", "audio": "tone"}
    for example in examples:
        said = " ".join(example.captions)
        assert all(words[medium.kind] in said for medium in example.media)
        assert not example.joint


def across(kinds: tuple[Kind, ...], most: int, draws: int = 48) -> list[ContextExample]:
    """Joint examples of corpora of one kind each, whose media and captions say kind and number."""
    sources = [
        [
            TrainingSample(
                id=f"{kind}{n}",
                media={"medium": MediaFile(kind, b"", f"{kind} {n}")},
                captions={"medium": (f"{kind} {n}",)},
            )
            for n in range(6)
        ]
        for kind in kinds
    ]
    dataset = ContextDataset(Mixture(sources, [1.0] * len(kinds), 0), draws, 0.0, 1.0, most)
    return [dataset[draw] for draw in range(draws)]


@pytest.mark.parametrize(("most", "numbers"), [(2, {2}), (3, {2, 3}), (9, {2, 3, 4})])
def test_a_joint_example_has_a_medium_with_its_caption_of_each_of_its_corpora(
    most: int, numbers: set[int]
) -> None:
    examples = across(("image", "audio", "video", "depth"), most)
    assert {len(example.media) for example in examples} == numbers
    for example in examples:
        assert example.joint
        assert len({medium.kind for medium in example.media}) == len(example.media)
        assert [medium.name for medium in example.media] == list(example.captions)
    assert not any(example.joint for example in across(("image",), most))


class Blank:
    """A loader of media without content; every clip has a sound track."""

    def load(self, medium: MediaFile, generator: object = None) -> LoadedMedium:
        track = torch.zeros(1, 3, 4, 4) if medium.kind == "video" else None
        return LoadedMedium(medium.kind, torch.zeros(1, 3, 4, 4), track)

    def batch(self, rows: object) -> dict[str, torch.Tensor]:
        return {}


def test_every_token_of_a_caption_has_the_row_of_its_corpus() -> None:
    words = learn_vocabulary(["image audio video 0 1 2 3 4 5"], size=64)
    collate = ContextCollator(words, cast(Any, Blank()), {}, Stage1Recipe())
    examples = across(("image", "audio", "video"), 3)
    examples += [replace(example, joint=False) for example in examples]
    batch = collate(examples)
    whole = [" ".join(example.captions) for example in examples]
    assert batch["input_ids"].tolist() == words(whole, padding=True)["input_ids"]  # eq. (2)
    rows = {"image": 1, "audio": 2, "video": 3}
    expected = []
    for example, ids, found in zip(
        examples, batch["input_ids"].tolist(), batch["caption_corpus"].tolist(), strict=True
    ):
        own = [
            rows[word] * example.joint
            for caption in example.captions
            for word in caption.split()[:1]
            for _ in words(caption, add_special_tokens=False)["input_ids"]
        ]
        assert found == [0, *own] + [0] * (len(ids) - len(own) - 1)
        expected += [
            rows[medium.kind] * example.joint
            for medium in example.media
            for _ in range(1 + (medium.kind == "video"))
        ]
    assert batch["media_corpus"].tolist() == expected


# --- random frames and slices -------------------------------------------------------------------


class Numbered:
    """A loader of clips with 9 frames, and of sounds with 9 slices, whose values are their places.

    It has drawn them already, as with a cache.
    """

    def load(self, medium: MediaFile, generator: object = None) -> LoadedMedium:
        places = torch.arange(9.0).view(9, 1, 1, 1)
        return LoadedMedium(medium.kind, places, places if medium.kind == "video" else None)

    def batch(self, rows: Sequence[Sequence[LoadedMedium]]) -> dict[str, torch.Tensor]:
        parts = [part.flatten() for row in rows for one in row for _, part in one.parts()]
        return {"places": torch.stack(parts)}


def test_training_draws_a_unit_of_each_run_by_the_draw_alone() -> None:
    recipe = Stage1Recipe(most_units=3)
    words = learn_vocabulary(["image audio video 0 1 2 3 4 5"], size=64)
    collate = ContextCollator(words, cast(Any, Numbered()), {}, recipe)
    examples = across(("audio", "video"), 2)
    places = collate(examples)["places"]
    last = collate(examples[30:])["places"]
    assert torch.equal(last, places[-len(last) :])
    assert len({tuple(row) for row in places.tolist()}) > 12
    assert torch.equal(places // 3, torch.arange(3.0).expand(len(places), 3))
    middles = collate([replace(example, seed=None) for example in examples])["places"]
    assert middles.unique(dim=0).tolist() == [[1, 4, 7]]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_regions_are_read_only_for_their_objective(mixture: Mixture, weight: float) -> None:
    recipe = Stage1Recipe(weights=ObjectiveWeights(region=weight))
    words = learn_vocabulary(["a red square", "a tone"], size=64)
    collate = ContextCollator(words, cast(Any, Blank()), {}, recipe)
    examples = [ContextDataset(mixture, 8, 1.0, 0.0)[draw] for draw in range(8)]
    assert any(any(example.regions) for example in examples)
    assert ("region_box" in collate(examples)) == (weight > 0)


def test_the_seed_of_each_data_set_depends_on_the_draw(mixture: Mixture) -> None:
    for dataset in (
        ContextDataset(mixture, 8, 0.5, 0.5),
        QuestionDataset(mixture, 8),
        CaptionDataset(mixture, 8, join=0.2),
        ConversationDataset(mixture, 8, max_turns=3),
    ):
        seeds = [dataset[draw].seed for draw in range(8)]
        assert None not in seeds
        assert len(set(seeds)) == 8
        assert [dataset[draw].seed for draw in range(8)] == seeds
    assert CaptionDataset(mixture, 8, join=0.2, regions=True)[0].seed is None


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


def test_things_are_given_ever_less_often_and_only_where_all_are_known(mixture: Mixture) -> None:
    n = 400
    dataset = ConversationDataset(mixture, n, max_turns=2, given=1.0)
    examples = [dataset[draw] for draw in range(n)]
    plain = ConversationDataset(mixture, n, max_turns=2)
    known = [
        all(medium.kind != "audio" for medium in one.media) and bool(one.media) for one in examples
    ]
    halves = [sum(one.given for one in half) for half in (examples[: n // 2], examples[n // 2 :])]
    possible = [sum(known[: n // 2]), sum(known[n // 2 :])]
    assert halves[0] > 0.6 * possible[0]
    assert 0 < halves[1] < 0.4 * possible[1]
    for draw, one in enumerate(examples):
        assert one.messages == plain[draw].messages
        assert not plain[draw].given
        assert known[draw] or not one.given
        if one.given:
            assert len(one.regions) == len(one.media)
            assert all(one.regions)


# --- batches of conversations of like length ----------------------------------------------------

BATCH = 4


def examples(n: int) -> list[ChatExample]:
    """Conversations of lengths drawn at random."""
    lengths = np.random.default_rng(0).integers(4, 400, n)
    texts = ("x" * int(length) for length in lengths)
    return [ChatExample(str(draw), (Message.user(text),)) for draw, text in enumerate(texts)]


def test_each_example_is_drawn_once_and_stays_in_its_window() -> None:
    n = 2 * WINDOW * BATCH + 7
    grouped = GroupedByLength(examples(n), BATCH, seed=0)
    drawn = [int(grouped[i].id) for i in range(n)]
    assert sorted(drawn) == list(range(n))
    assert all(i // (WINDOW * BATCH) == d // (WINDOW * BATCH) for i, d in enumerate(drawn))
    for draw in (n - 1, 5, WINDOW * BATCH):  # whatever was drawn before
        assert GroupedByLength(examples(n), BATCH, seed=0)[draw].id == str(drawn[draw])
    other = GroupedByLength(examples(n), BATCH, seed=1)
    assert [int(other[i].id) for i in range(n)] != drawn


def test_a_batch_holds_like_lengths_and_batches_are_mixed() -> None:
    n = WINDOW * BATCH
    grouped = GroupedByLength(examples(n), BATCH, seed=0)
    lengths = np.array([about_tokens(grouped[i]) for i in range(n)]).reshape(-1, BATCH)
    plain = np.array([about_tokens(one) for one in examples(n)]).reshape(-1, BATCH)
    assert np.ptp(lengths, axis=1).max() < np.ptp(plain, axis=1).min()
    assert (np.diff(lengths.max(1)) < 0).any()


# --- simulated names ----------------------------------------------------------------------------

NAMES = ["otter", "ball", "scissors", "glass"]


def example(pictures: int) -> ChatExample:
    """A question about a sound and some pictures."""
    media = [MediaFile("audio", Path("a.wav"), "a")]
    media += [MediaFile("image", Path(f"{n}.png"), f"p{n}") for n in range(pictures)]
    return ChatExample("x", (Message.user(*media, "What is here?"), Message.assistant("Much.")))


def simulated(
    probability: float, pictures: int = 2, plain: Sequence[str] = NAMES
) -> list[ChatExample]:
    mixture = Mixture([numbers("x", 1)], [1], seed=3)
    data = SimulatedNames([example(pictures)] * 400, mixture, NAMES, plain, probability)
    found = [data[draw] for draw in range(len(data))]
    assert [data[draw] for draw in reversed(range(20))] == found[19::-1]
    return found


@pytest.mark.parametrize(("probability", "pictures"), [(0.25, 2), (0.0, 2), (1.0, 0)])
def test_a_share_of_the_examples_is_simulated(probability: float, pictures: int) -> None:
    found = simulated(probability, pictures)
    drawn = [one.simulated for one in found if one.simulated >= 0]
    assert len(drawn) / 400 == pytest.approx(probability * bool(pictures), abs=0.07)
    assert set(drawn) == (set(range(len(NAMES))) if drawn else set())
    assert all(one == example(pictures) for one in found if one.simulated < 0)


def test_a_simulated_example_names_the_drawn_thing() -> None:
    for one in simulated(1.0)[:50]:
        question, answer = one.messages
        assert question.role == "user"
        assert question.text in QUESTIONS
        assert [(file.kind, file.name) for file in question.files] == [("image", "p0")]
        said = answer.text
        assert with_article(NAMES[one.simulated]) in said[0].lower() + said[1:]
        assert said[0].isupper()
        assert said.endswith(".")


def test_the_plain_name_is_said_first_and_the_exact_one_when_asked() -> None:
    plain = ["animal", "toy", "scissors", "glass"]
    asked = 0
    for one in simulated(1.0, plain=plain):
        name, said = NAMES[one.simulated], [message.text.lower() for message in one.messages]
        assert with_article(plain[one.simulated]) in said[1]
        assert len(said) in (2, 4)
        if len(said) == 4:
            asked += 1
            assert name not in said[2]
            assert with_article(name) in said[3]
            assert name != plain[one.simulated]
    assert 60 < asked < 140, "half of those whose exact name is another one"


def test_a_simulated_context_is_a_picture_with_the_drawn_name() -> None:
    drawn = [MediaFile("image", Path("a.png"), "a"), MediaFile("audio", Path("b.wav"), "b")]
    samples = [TrainingSample(m.name, {"m": m}, {"m": ("Much.",)}, {"m": "it"}) for m in drawn]
    mixture = Mixture([samples], [1], seed=3)
    contexts = ContextDataset(mixture, 400, 0.5, 0.0)
    found = [SimulatedCaptions(contexts, NAMES, 0.5)[draw] for draw in range(400)]
    named = [one for one in found if one.simulated >= 0]
    assert {one.simulated for one in named} == set(range(len(NAMES)))
    pictures = [one for one in found if one.media == (drawn[0],)]
    assert len(named) / len(pictures) == pytest.approx(0.5, abs=0.1)
    for one in named:
        assert one.media == (drawn[0],)
        assert one.captions[0].endswith(with_article(NAMES[one.simulated]))
        assert one.concepts == ("",)
    assert all(one.captions == ("Much.",) for one in found if one.simulated < 0)


def test_articles() -> None:
    names = ["otter", "ball", "scissors", "glass", "Eskimo dog"]
    told = ["an otter", "a ball", "scissors", "a glass", "an Eskimo dog"]
    assert [with_article(name) for name in names] == told

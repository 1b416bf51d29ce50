"""Draws depend on seed and number alone: mixtures, contexts, conversations, simulated names."""

import json
import tarfile
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
from mico_chat.media.kinds import MODALITIES
from mico_chat.messages import Message
from mico_training.build_model import learn_vocabulary
from mico_training.data.batches import ContextCollator
from mico_training.data.examples import (
    NAMING,
    WINDOW,
    CaptionDataset,
    ChatExample,
    ContextDataset,
    ContextExample,
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
from mico_training.data.sources.written import add_sample
from mico_training.data.talk.conversations import ConversationDataset
from mico_training.recipe import ObjectiveWeights, Stage1Recipe, Stage1Run, load_recipe
from tests.mico_training.test_estimate import RECIPES


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


# --- a budget for each caption --------------------------------------------------------------------

STAGE_1 = [path for path in sorted(RECIPES.glob("*.yaml")) if "\nstage1:" in path.read_text()]
WORDS = [f"{one}{two}" for one in "abcde" for two in "vwxyz"]
PAPERS = {"mico-b-stage1", "mico-l-stage1", "mico-g-stage1"}


def long_captions(*lengths: int, fused: int = 0) -> ContextExample:
    """A joint example of a clip, a picture and a sound, with captions of so many words."""
    texts = tuple(" ".join((WORDS * 9)[n : n + length]) for n, length in enumerate(lengths))
    kinds: tuple[Kind, ...] = ("video", "image", "audio")
    media = tuple(MediaFile(kind, b"", kind) for kind in kinds[: len(lengths)])
    said: Any = {"references": texts, "fused": frozenset(texts[:fused])}
    return ContextExample(media, ("",) * len(media), texts, True, **said)


@pytest.mark.parametrize("path", STAGE_1, ids=lambda path: path.stem)
def test_every_recipe_reads_each_of_three_captions(path: Path) -> None:
    recipe = load_recipe(Stage1Run, path).stage1
    words = learn_vocabulary([" ".join(WORDS)] * 9, size=128)
    collate = ContextCollator(words, cast(Any, Blank()), {}, recipe)
    batch = collate([long_captions(25, 25, 25), long_captions(200, 4, 25, fused=1)])
    rows = {1, 2, 3}
    for number, read in enumerate(batch["caption_corpus"]):
        counts = Counter(read.tolist())
        assert set(batch["media_corpus"].unique().tolist()) == rows <= counts.keys(), "eq. (2)"
        if number == 0 and recipe.caption_length >= 27 and recipe.text_length <= 128:
            assert [counts[row] for row in rows] == [25, 25, 25]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (ids.gather(1, mask.sum(1, keepdim=True) - 1) == words.sep_token_id).all()
    if path.stem in PAPERS:
        batch = replace(collate, positions=512)([long_captions(200, 25, 25, fused=1)])
        assert [(batch["caption_corpus"] == row).sum() for row in (3, 1, 2)] == [160, 25, 25]


@pytest.mark.parametrize("positions", [16, 64, 512])
def test_captions_share_the_room_and_a_row_of_one_is_as_before(positions: int) -> None:
    words = learn_vocabulary([" ".join(WORDS)] * 9, size=128)
    recipe = Stage1Recipe(caption_length=30)
    collate = ContextCollator(words, cast(Any, Blank()), {}, recipe, positions)
    batch = collate([long_captions(200, 200, 2), long_captions(200)])
    assert batch["input_ids"].shape[1] == min(positions - positions % 2, 2 + 28 + 28 + 2)
    alone = collate([long_captions(200)])["input_ids"]
    most = {"truncation": True, "max_length": min(30, positions)}
    assert alone.tolist() == [words(long_captions(200).captions[0], **most)["input_ids"]]


# --- depth and normal maps have the picture's caption ---------------------------------------------


def photographed(folder: Path, captions: dict[str, tuple[str, ...]]) -> Path:
    """A shard of a picture with its maps, and captions of some of the three."""
    files = dict.fromkeys(("image.jpg", "depth.png", "normal.png"), b"")
    own = {name: captions[kind] for name in files if (kind := name.partition(".")[0]) in captions}
    with tarfile.open(folder / "maps.tar", "w") as tar:
        add_sample(tar, "s", json.dumps({"files": [*files], "captions": own}), files)
    return folder / "maps.tar"


def shares(dataset: ContextDataset | CaptionDataset) -> Counter[str]:
    """How many of all draws show maps alone, and how many show a map first."""
    found = Counter[str]()
    for draw in range(4000):
        example = dataset[draw]
        kinds = [medium.kind for medium in example.media]
        found["alone"] += set(kinds) <= {"depth", "normal"}
        found["first"] += kinds[0] in ("depth", "normal")
    return found


@pytest.mark.parametrize("only", [(), ("depth", "normal")])
def test_maps_are_shown_alone_and_first_in_both_stages(
    tmp_path: Path, only: tuple[Kind, ...]
) -> None:
    kinds = frozenset(only or MODALITIES)
    shard = str(photographed(tmp_path, {"image": ("a cup",)}))
    mixture = Mixture([ShardSource(shard, "caption", (), kinds)], [1.0], 0)
    contexts = ContextDataset(mixture, 4000, 0.5, 0.0)
    assert all(contexts[draw].captions == ("a cup",) for draw in range(40))
    for dataset in (contexts, CaptionDataset(mixture, 4000, 0.1)):
        assert all(share > 400 for share in shares(dataset).values())


@pytest.mark.parametrize(
    ("captions", "depth"),
    [
        ({"image": ("a cup",), "depth": ("a near cup",)}, ("a near cup",)),
        ({"normal": ("bent",)}, None),
        ({"image": ("a cup", "cups")}, ("a cup", "cups")),
    ],
)
def test_a_maps_own_caption_stays(
    tmp_path: Path, captions: dict[str, tuple[str, ...]], depth: tuple[str, ...] | None
) -> None:
    sample = ShardSource(str(photographed(tmp_path, captions)), "caption")[0]
    assert sample.captions.get("depth.png") == depth


@pytest.mark.parametrize(
    ("captions", "maps"),
    [
        ({"image": ("a",), "image2": ("b",)}, {"depth": ("a",), "normal2": ("b",)}),
        ({"image": ("a",)}, {"depth": ("a",)}),
        ({"video": ("v",), "audio": ("s",)}, {"depth": ("v",), "normal2": ("v",)}),
    ],
)
def test_a_map_has_the_caption_of_the_picture_of_its_number(captions: Any, maps: Any) -> None:
    names = ("image", "image2", "video", "audio", "depth", "normal2")
    kinds = [cast(Kind, name.rstrip("2")) for name in names]
    media = {name: MediaFile(kind, b"", name) for name, kind in zip(names, kinds, strict=True)}
    if "video" in captions:
        assert TrainingSample("x", media, captions).captions == {**captions, **maps}
    del media["video"]
    expected = {**captions, **maps} if "image" in captions else captions
    assert TrainingSample("x", media, captions).captions == expected


def test_a_fused_caption_is_known_from_the_shard(tmp_path: Path) -> None:
    said = [{"annotator": name, "role": "caption", "text": name} for name in ("fuse", "see")]
    record = {"files": ["video.mp4"], "captions": {"video.mp4": ["fuse", "see"]}}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_sample(tar, "a", json.dumps(record | {"annotations": said}), {"video.mp4": b""})
    mixture = Mixture([ShardSource(str(tmp_path / "a.tar"), "caption")], [1.0], 0)
    examples = [ContextDataset(mixture, 20, 0.0, 0.0)[draw] for draw in range(20)]
    known = {one.captions[0]: one.captions[0] in one.fused for one in examples}
    assert known == {"fuse": True, "see": False}


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
    data = SimulatedNames([example(pictures)] * 400, mixture, NAMES, plain, len(NAMES), probability)
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
        assert question.text in NAMING["questions"]
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


def test_a_name_that_is_unsure_is_said_beside_what_it_may_be_as_well() -> None:
    """Of pictures and of sounds, whose names stand behind the visual ones."""
    seen = {"image": 0, "audio": 0}
    for medium in (MediaFile("image", Path("a.png")), MediaFile("audio", Path("b.wav"))):
        drawn = ChatExample("x", (Message.user(medium, "?"), Message.assistant("!")))
        names = ["otter", "hare", "rabbit", "bell", "wind chimes"]
        plain = ["otter", "hare", "hare", "bell", "wind chimes"]
        alike = [[1, 2], [2, 0], [0, 1], [4], [3]]
        mixture = Mixture([numbers("x", 1)], [1], seed=3)
        data = SimulatedNames([drawn] * 200, mixture, names, plain, 3, 1.0, alike)
        for one in (data[draw] for draw in range(200)):
            heard = medium.kind == "audio"
            assert (one.simulated >= 3, one.messages[0].files) == (heard, (medium,))
            answer = one.messages[1].text.lower()
            said = {name for name in {*plain} if name in answer}
            if one.unsure < 0:
                assert said == {plain[one.simulated]}
                assert "sure" not in answer
                continue
            seen[medium.kind] += 1
            assert one.unsure in alike[one.simulated]
            assert said == {plain[one.simulated], plain[one.unsure]}
            assert len(said) == 2, "two finer names of one thing are no doubt"
            assert "not sure" in answer
            assert len(one.messages) == 2
    assert all(50 < count < 90 for count in seen.values()), "a third"


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

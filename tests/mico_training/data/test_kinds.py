"""Kinds of question: their shares of the draws, and conversations about several or absent media."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from mico_chat.checkpoints.folders import MODELS
from mico_chat.errors import ConfigError
from mico_chat.media import Kind
from mico_chat.model.processing import MicoChatProcessor
from mico_training.data.examples import ChatExample, SimulatedNames
from mico_training.data.language.english import article, sentence
from mico_training.data.mixture import BLOCK, Mixture, open_mixture
from mico_training.data.sources import shards
from mico_training.data.sources.written import Sample, Turn, write_shard
from mico_training.data.talk.conversations import ConversationDataset, shares
from mico_training.data.talk.kinds import table
from mico_training.recipe import DataRecipe, DpoRecipe, Stage3Recipe, Stage3Run, load_recipe
from mico_training.stages import train_stage3
from mico_world import build
from tests.mico_training.scenes import COLOURS, picture, tone
from tests.mico_training.test_estimate import RECIPES
from tests.mico_training.test_runs import losses, write_recipe

NAMES = ("dog", "cat", "owl", "cup")
SHOWN: dict[Kind, str] = {
    "image": "image.png",
    "video": "video.mp4",
    "depth": "depth.png",
    "audio": "audio.wav",
}
MEDIA: tuple[Kind, ...] = tuple(SHOWN)


def told(n: int) -> Sample:
    """Sample ``n`` has one medium, whose answers say its number, so that no other one's are it."""
    kind, name = MEDIA[n % 4], NAMES[n // 4 % 4]
    file, colour = (SHOWN[kind],), list(COLOURS)[n // 16 % 3]
    asked: list[tuple[str, str, str, tuple[str, ...]]]
    if kind == "audio":
        asked = [("What do you hear?", f"Sound {n}.", "sound", ())]
        asked += [("Is this a bell?", "No.", "sound", ("yes", "no"))]
    else:
        asked = [("What is here?", f"{name.title()} {n}.", "name", ())]
        asked += [("Is there a cow?", f"No, number {n}.", "present", ("yes", "no"))]
        asked += [(f"Is there a {name}?", f"Yes, number {n}.", "present", ("yes", "no"))]
    if kind == "image":
        asked += [("What colour is it?", f"It is {colour}.", "colour", ())]
    count = 1 + n // 16 % 5
    turns = [Turn(q, a, skill, file, choices, (name,)) for q, a, skill, choices in asked]
    if kind == "image":
        word = ("one", "two", "three", "four", "five")[count - 1]
        turns.append(
            Turn("How many things are there?", word, "count", file, (), (word, str(count)))
        )
    place = {"x": 0.5, "y": 0.5, "width": 0.5, "height": 0.5}
    return Sample(
        id=f"told{n}",
        split="train",
        files={
            file[0]: picture(colour) if kind == "image" else tone(300) if kind == "audio" else b""
        },
        captions={},
        turns=tuple(turns),
        concepts={file[0]: name} if kind == "image" else {},
        truth={"things": [{"name": name, "colour": colour} | place]} if kind == "image" else {},
    )


def name_of(n: int) -> str:
    """What is said to be in a medium: a picture has a name, of others the answer is known."""
    return told(n).turns[0].answer if n % 4 else sentence(article(NAMES[n // 4 % 4]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[DataRecipe]:
    folder = tmp_path_factory.mktemp("told")
    write_shard(folder / "train-0.tar", [told(n) for n in range(120)])
    talks = [[("user", f"Hello {n}!"), ("assistant", "Good day.")] for n in range(20)]
    lines = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        DataRecipe(path=str(folder / "train-*.tar"), ratio=0.9),
        DataRecipe(path=str(folder / "text.jsonl"), ratio=0.1),
    ]


def dataset(
    data: list[DataRecipe], n: int = 400, most: int = 4, **asked: Any
) -> ConversationDataset:
    return ConversationDataset(open_mixture(data, "conversation", 0, cast(Any, asked)), n, most)


@pytest.fixture
def drawn(data: list[DataRecipe]) -> Callable[..., list[ChatExample]]:
    def draw(kind: str, n: int = 400) -> list[ChatExample]:
        examples = dataset(data, n, small_talk=0.1, **cast(Any, {kind: 0.9}))
        found = [examples[draw] for draw in range(n)]
        assert [examples[draw] for draw in reversed(range(20))] == found[19::-1]
        return [one for one in found if one.kind == kind]

    return draw


def turns(one: ChatExample) -> Iterator[tuple[list[str], str, str]]:
    """The kinds of the media of each question, the question, and its answer."""
    for question, answer in zip(one.messages[::2], one.messages[1::2], strict=True):
        yield [file.kind for file in question.files], question.text, answer.text


# --- shares ---------------------------------------------------------------------------------------


def test_the_shares_hold_in_every_block_and_each_draw_can_be_asked_its_kind(
    data: list[DataRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_mixture(data, "conversation", 0)
    monkeypatch.setattr(shards, "sample_of", lambda *_: pytest.fail("the index says enough"))
    asked: Any = {"count": 0.25, "hear": 0.125, "small_talk": 0.125}
    mixture = open_mixture(data, "conversation", 0, asked)
    for block in range(2):
        kinds = Counter(mixture.kind(draw) for draw in range(block * BLOCK, (block + 1) * BLOCK))
        assert kinds == {"count": 1024, "hear": 512, "small_talk": 512, None: 2048}
    monkeypatch.undo()
    for draw in range(300):
        kind, sample = mixture.kind(draw), mixture.sample(draw)
        skills = {turn.skill for turn in sample.turns}
        assert kind != "count" or "count" in skills
        assert kind != "hear" or "sound" in skills
        assert kind != "small_talk" or (sample.conversation and not sample.media)
    rest = Counter(mixture.locate(d)[0] for d in range(BLOCK) if mixture.kind(d) is None)
    assert rest[0] / 2048 == pytest.approx(0.9, abs=0.01), "by the sources' ratios, as without"


def test_without_shares_draws_are_as_before(data: list[DataRecipe]) -> None:
    plain, none = open_mixture(data, "conversation", 0), open_mixture(data, "conversation", 0, {})
    assert isinstance(plain, Mixture)
    assert [plain.locate(d) for d in range(99)] == [none.locate(d) for d in range(99)]
    examples = dataset(data, 300)
    found = [examples[draw] for draw in range(300)]
    assert {one.kind for one in found} == {None}
    assert all(len(set(one.places)) < 2 for one in found), "of one sample"


def test_a_part_of_the_samples_and_of_the_media_has_its_kinds_too(data: list[DataRecipe]) -> None:
    part = [replace_recipe(data[0], fraction=0.5, modalities=("image", "audio")), data[1]]
    mixture = open_mixture(part, "conversation", 0, {"present": 0.5, "hear": 0.5})
    for draw in range(60):
        kinds = {medium.kind for medium in mixture.sample(draw).media.values()}
        assert kinds == ({"image"} if mixture.kind(draw) == "present" else {"audio"})
    few = replace_recipe(data[0], skills=("sound",))
    with pytest.raises(ConfigError, match=r"asked\.present: a share of 1.*of the skills present"):
        open_mixture([few], "conversation", 0, {"present": 1.0})


def replace_recipe(recipe: DataRecipe, **changes: Any) -> DataRecipe:
    return recipe.model_copy(update=changes)


def test_what_cannot_be_asked_is_refused_with_its_key(
    data: list[DataRecipe], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"stage3\.asked\.nearer: .*nearest_name.*leave the key out"
    ):
        open_mixture(data, "conversation", 0, {"nearer": 0.1})
    with pytest.raises(ConfigError, match=r"small_talk: .*conversations without media"):
        open_mixture(data[:1], "conversation", 0, {"small_talk": 0.1})
    for asked, message in (
        ({"nam": 0.1}, r"stage3\.asked\.nam.*should be 'name', 'hear'"),
        ({"name": 0.7, "count": 0.5}, r"the shares are 1\.2 together, more than 1"),
        ({"name": -0.1}, r"asked\.name.*greater than or equal to 0"),
    ):
        recipe = write_recipe(tmp_path, tmp_path, tmp_path, stage3={"asked": asked})
        with pytest.raises(ConfigError, match=message):
            load_recipe(Stage3Run, recipe)
    with pytest.raises(ValueError, match="leave out asked"):
        Stage3Recipe(asked={"name": 0.5}, dpo=DpoRecipe())


def test_a_run_with_kinds_goes_on_to_the_same_losses_and_logs_the_shares(
    data: list[DataRecipe], tmp_path: Path, tiny_chat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    media = [recipe.model_dump(include={"path", "ratio"}) for recipe in data]
    media[0]["modalities"] = ["image", "audio"]
    asked = {"name": 0.2, "new_medium": 0.4, "absent_medium": 0.2, "words": 0.1, "compare": 0.1}
    sections: dict[str, Any] = {"data": media, "stage3": {"asked": asked, "simulate": 0.5}}
    caplog.set_level("INFO")
    recipe = write_recipe(tmp_path, tmp_path, tiny_chat, **sections)
    train_stage3(recipe)
    assert re.search(r"new_medium: \d+\.\d % of the conversations, [\d.]+ % of the", caplog.text)
    whole = losses(tmp_path)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    train_stage3(recipe)
    assert losses(tmp_path) == whole


# --- several media --------------------------------------------------------------------------------


def test_a_new_medium_is_of_another_sample_and_its_question_is_about_it(drawn: Any) -> None:
    seen = Counter[str]()
    for one in drawn("new_medium"):
        numbers = [int(medium.name.partition("told")[2].partition(".")[0]) for medium in one.media]
        assert len(set(one.places)) == len(one.media) == len(set(numbers)) > 1
        assert 2 <= len(one.messages) // 2 <= 4
        shown: list[int] = []
        for kinds, question, answer in turns(one):
            if kinds:
                shown.append(numbers[len(shown)])
                own = told(shown[-1]).turns
                assert answer in {turn.answer for turn in own}, (question, answer)
                short = question not in {turn.question for turn in own}
                seen["short"] += short
                assert not short or answer == own[0].answer, "asks what the new one is"
                continue
            seen["back"] += 1
            ordinal = next((n for n, w in enumerate(table().ordinals) if w in question), None)
            if question in table().old["begun"]:
                assert name_of(shown[0]) == answer
                continue
            asked = next(k for k in MEDIA if any(noun in question for noun in table().nouns[k]))
            alike = [n for n in shown if MEDIA[n % 4] == asked]
            assert (ordinal is None) == (len(alike) == 1), "a number only if there are several"
            number = alike[ordinal or 0]
            assert number != shown[-1]
            assert answer == name_of(number)
    assert min(seen.values()) > 40, seen


def test_an_absent_medium_is_said_to_be_absent_until_it_comes(drawn: Any) -> None:
    words = {k: table().nouns[k] for k in MEDIA}
    own = {turn.answer for n in range(120) for turn in told(n).turns}
    gone = re.compile(r"\b([Nn]o|not|[Nn]othing)\b")
    seen, answers = Counter[str](), set()
    for one in drawn("absent_medium"):
        shown: set[str] = set()
        for kinds, question, answer in turns(one):
            shown |= set(kinds)
            if answer in {*own, "Good day."}:
                seen["shown"] += bool(kinds)
                continue
            assert gone.search(answer), answer
            answers.add(re.sub(r"|".join(n for ns in words.values() for n in ns), "_", answer))
            asked = [k for k in MEDIA if any(hint in question for hint in table().hints[k])]
            seen["with another" if kinds else "after another" if shown else "alone"] += 1
            if asked:
                assert not shown & {asked[0], *table().looks_like[asked[0]]}
                assert any(noun in answer for noun in words[asked[0]]), (question, answer)
    assert min(seen.values()) > 40, seen
    assert len(answers) > 8


def test_two_pictures_are_compared_by_what_is_true_of_both(drawn: Any) -> None:
    seen = Counter[str]()
    for one in drawn("compare", 300):
        assert [medium.kind for medium in one.media] == ["image", "image"]
        two = [
            told(int(medium.name.partition("told")[2].partition(".")[0])) for medium in one.media
        ]
        assert two[0].id != two[1].id
        names = [sample.concepts["image.png"] for sample in two]
        colours = [sample.truth["things"][0]["colour"] for sample in two]
        counts = [int(sample.turns[-1].accept[1]) for sample in two]
        for _, question, answer in turns(one):
            if answer == two[0].turns[0].answer:
                continue
            elif "colour" in question or "color" in question:
                seen[f"colour {colours[0] == colours[1]}"] += 1
                assert (", so yes." in answer) == (colours[0] == colours[1])
                assert all(colour in answer for colour in colours)
            elif "more things" in question:
                right = "first" if counts[0] > counts[1] else "second"
                assert counts[0] != counts[1]
                assert answer.endswith(f"so the {right} one.")
                seen[f"more {right}"] += 1
            elif ", so " in answer:
                seen[f"same {names[0] == names[1]}"] += 1
                assert (", so yes." in answer) == (names[0] == names[1])
                assert all(name in answer for name in names)
            else:
                (name,) = {name for name in names if re.search(rf"\b{name}\b", question)}
                right = "first" if names[0] == name else "second"
                assert names[0] != names[1]
                assert right in answer
                seen[f"which {right}"] += 1
    assert len(seen) == 8, seen
    assert min(seen.values()) > 4, seen


def test_yes_and_no_are_as_frequent_and_follow_ups_show_no_second_medium(drawn: Any) -> None:
    said = Counter(one.messages[1].text.partition(",")[0] for one in drawn("present"))
    assert said.keys() == {"Yes", "No"}
    assert 0.4 < said["Yes"] / said.total() < 0.6
    follow = drawn("follow_up", 100)
    assert all(len(one.media) == 1 and len(one.messages) >= 4 for one in follow)
    assert sum("Hello" in message.text for one in follow for message in one.messages) > 5


def test_given_things_are_those_of_each_medium_and_names_are_simulated_for_names_alone(
    data: list[DataRecipe],
) -> None:
    examples = replace(dataset(data, 400, name=0.5, new_medium=0.5), given=1.0)
    given = [one for one in map(examples.__getitem__, range(400)) if one.given]
    assert any(len(one.media) > 1 for one in given)
    for one in given:
        numbers = [int(medium.name.partition("told")[2].partition(".")[0]) for medium in one.media]
        assert [own[0].name for own in one.regions] == [NAMES[n // 4 % 4] for n in numbers]
    named = SimulatedNames(examples, examples.mixture, ["otter"], ["otter"], 1, 1.0)
    for draw in range(100):
        one = named[draw]
        asked = one.kind == "name" and any(m.kind == "image" for m in examples[draw].media)
        assert (one.simulated == 0) == asked


# --- the mini's recipe ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of drawn shapes; sounds and texts as the data engine and the LLM say them."""
    folder = tmp_path_factory.mktemp("miniature")
    kinds = ("single", "colour", "count", "pair", "scene")
    train = dict.fromkeys(kinds, 4) | {"layers": 6, "motion": 3}
    build.main({"things": "shapes", "train": train}, folder, workers=1, seed=3)
    texts = ("A dog barking.", "I hear a flute playing.", "This is the sound of rain falling.")
    heard = [Turn("What do you hear?", t, "sound", ("audio.flac",), (), ("x",)) for t in texts]
    both = ("image.jpg", "audio.flac")
    belong = "The picture shows a dog and the sound is a cat meowing, so no."
    samples = [Sample(f"s{n}", "train", {"audio.flac": b""}, {}, (heard[n % 3],)) for n in range(9)]
    pair = (Turn("Do they belong together?", belong, "belong", both, ("yes", "no"), ("no",)),)
    files = {"image.jpg": b"", "audio.flac": b""}
    samples += [Sample(f"p{n}", "train", files, {}, (*pair, heard[n])) for n in range(3)]
    write_shard(folder / "train-000009.tar", samples)
    answer = "Bees make honey. They also make wax, from which they build the cells of their combs. "
    said = [("user", "What do bees make?"), ("assistant", answer * 2)]
    line = json.dumps({"messages": [{"role": role, "content": text} for role, text in said]})
    (folder / "text.jsonl").write_text(f"{line}\n" * 5)
    return folder


def test_each_kind_of_the_minis_recipe_has_4_per_cent_of_the_tokens(miniature: Path) -> None:
    recipe = load_recipe(Stage3Run, RECIPES / "mini-stage3.yaml")
    paths = [str(miniature / "train-*.tar"), str(miniature / "text.jsonl")]
    data = [replace_recipe(own, path=path) for own, path in zip(recipe.data, paths, strict=True)]
    asked = recipe.stage3.asked
    skills = frozenset().union(*(fitting.skills for fitting in table().kinds.values()))
    source = open_mixture(data, "conversation", 0)
    assert {turn.skill for n in range(60) for turn in source.sample(n).turns} <= skills
    assert sum(asked.values()) == pytest.approx(1.0)
    assert asked.keys() == table().kinds.keys()
    mixture = open_mixture(data, "conversation", 0, asked)
    examples = ConversationDataset(mixture, 1000, recipe.stage3.max_turns)
    lines = shares(examples, MicoChatProcessor.from_pretrained(MODELS / "mini"), 1000)
    found = {line.partition(":")[0]: re.findall(r"([\d.]+) %", line) for line in lines}
    assert found.keys() == asked.keys()
    for kind, share in asked.items():
        talks, tokens = found[kind]
        assert float(talks) == pytest.approx(100 * share, abs=2.5)
        assert float(tokens) >= 4.0, (kind, tokens)

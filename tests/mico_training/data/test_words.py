"""Drawn words in training: the prompt is that of inference, and answers repeat the words."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mico_chat.errors import ConfigError
from mico_chat.media import Audio, Image, Kind, MediaFile, Medium, Video
from mico_chat.media.kinds import TABLE
from mico_chat.media.medium import MediaReport, SpokenText, Words, WrittenText
from mico_chat.messages import Message
from mico_chat.model.processing import MicoChatProcessor
from mico_training.data.batches import PAD_TO, ChatCollator
from mico_training.data.examples import ChatExample, about_tokens
from mico_training.data.media import LoadedMedium
from mico_training.data.mixture import open_mixture
from mico_training.data.sources.written import Sample, Turn, write_shard
from mico_training.data.talk.conversations import ConversationDataset
from mico_training.data.talk.words import CASES, PROMPTS, SHARES
from mico_training.recipe import DataRecipe
from tests.support.tiny import clip, picture, sound

BOX = (0.1, 0.2, 0.5, 0.3)
WORDS = Words(
    (
        WrittenText(text="Mind", box=BOX, confidence=0.99),
        WrittenText(text="the gap", box=BOX, confidence=0.99),
    ),
    (SpokenText(text="Good morning.", start=0.5, end=1.5, confidence=0.8),),
)


def example(kind: Kind | None = "image") -> ChatExample:
    """A question about a medium of a kind, and a second one about another."""
    media = [] if kind is None else [MediaFile(kind, Path("a"), "a")]
    more = MediaFile("image", Path("b"), "b")
    return ChatExample(
        "x",
        (
            Message.user(*media, "How many?"),
            Message.assistant("Two."),
            *([Message.user(more, "And here?"), Message.assistant("Three.")] if media else []),
        ),
    )


FILES = {"image": "image.png", "audio": "audio.wav", "video": "video.mp4", "depth": "depth.png"}
Draw = Callable[..., list[ChatExample]]


@pytest.fixture
def drawn(tmp_path: Path) -> Draw:
    """Conversations of the kind ``words`` about media of one kind, with a question of its own."""

    def draw(kind: str, n: int = 600) -> list[ChatExample]:
        file = FILES[kind]
        turns = (Turn("How many?", "Two.", "count", (file,)),)
        samples = [Sample(f"{kind}{i}", "train", {file: b""}, {}, turns) for i in range(9)]
        write_shard(tmp_path / "a.tar", samples)
        recipe = DataRecipe(path=str(tmp_path / "a.tar"))
        data = ConversationDataset(open_mixture([recipe], "conversation", 3, {"words": 1.0}), n, 4)
        found = [data[draw] for draw in range(n)]
        assert [data[draw] for draw in reversed(range(20))] == found[19::-1]
        return found

    return draw


def texts(words: Words) -> list[str]:
    return [one.text for one in words.written or ()] + [one.text for one in words.spoken or ()]


def case(one: ChatExample) -> str:
    """The case of :data:`CASES` that a conversation was made for, from what it says."""
    if not texts(one.words[0]):
        return "nothing"
    if not any('"' in message.text for message in one.messages[1::2]):
        return "own"
    asked = (message.text for message in one.messages[:4:2])
    heard = {text for t in PROMPTS["heard"]["questions"] for text in filled(t)}
    return "heard" if heard & {*asked} else "asked"


def filled(template: str) -> set[str]:
    names = [name for own in PROMPTS["media"].values() for name in own]
    return {template.format(medium=name) for name in names}


# --- the prompt -------------------------------------------------------------------------------


class Loader:
    """Loads media of one unit; a clip has three frames and a sound track."""

    def load(self, medium: MediaFile, generator: object = None) -> LoadedMedium:
        frames = torch.zeros(3 if medium.kind == "video" else 1, 3, 4, 4)
        track = torch.zeros(1, 3, 4, 4) if medium.kind == "video" else None
        return LoadedMedium(medium.kind, frames, track)

    def batch(self, rows: object) -> dict[str, torch.Tensor]:
        return {}


def decoded(kind: Kind, words: Words) -> Medium:
    report = MediaReport(name="a", kind=kind, written=words.written, spoken=words.spoken)
    if kind == "video":
        made = clip(3, track=True)
        return Video(made.frames, made.times, made.audio, report=report)
    if kind == "audio":
        return Audio(sound().samples, report=report)
    return Image(picture().pixels, report=report)


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
@pytest.mark.parametrize("words", [WORDS, replace(WORDS, written=None), replace(WORDS, spoken=())])
def test_the_prompt_is_that_of_inference(
    processor: MicoChatProcessor, kind: Kind, words: Words
) -> None:
    of_kind = {"image": replace(words, spoken=None), "audio": replace(words, written=None)}
    words = of_kind.get(kind, words)
    asked = replace(example(kind), words=(words,))
    collate = ChatCollator(processor, cast(Any, Loader()), 512)
    batch = collate([asked])
    same = [
        Message.user(decoded(kind, words), "How many?"),
        asked.messages[1],
        Message.user(picture(), "And here?"),
        asked.messages[3],
    ]
    expected = processor([same], train=True)
    length = expected["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][:, :length], expected[name])
    assert batch["input_ids"].shape[1] - length < PAD_TO
    bare = collate([replace(asked, words=())])["input_ids"]
    assert (bare.shape != batch["input_ids"].shape) == bool(texts(words))


def test_a_conversation_begins_with_the_system_prompt_as_a_chat_does(
    processor: MicoChatProcessor,
) -> None:
    served = copy.copy(processor)
    served.system_prompt = "You are small."
    asked, own = example("image"), Message.system("Be brief.")
    for given, first in (
        (asked, Message.system("You are small.")),
        (replace(asked, messages=(own, *asked.messages)), own),
    ):
        batch = ChatCollator(served, cast(Any, Loader()), 512)([given])
        talk = (first, *asked.messages)
        expected = ChatCollator(processor, cast(Any, Loader()), 512)(
            [replace(asked, messages=talk)]
        )
        for name in ("input_ids", "labels"):
            assert torch.equal(batch[name], expected[name])


def test_the_words_that_do_not_fit_lose_the_last_turn_with_its_medium(
    processor: MicoChatProcessor,
) -> None:
    asked = example("image")
    collate = ChatCollator(processor, cast(Any, Loader()), 512)
    whole = int(collate([asked])["attention_mask"].sum())
    shorter = replace(collate, max_length=whole)
    first = replace(asked, messages=asked.messages[:2], words=(replace(WORDS, spoken=None),))
    assert int(shorter([asked])["attention_mask"].sum()) == whole
    assert torch.equal(
        shorter([replace(asked, words=first.words)])["input_ids"], collate([first])["input_ids"]
    )


def test_the_estimate_of_the_length_counts_the_words() -> None:
    plain = example("video")
    assert about_tokens(plain) < about_tokens(replace(plain, words=(WORDS,)))


# --- the draws --------------------------------------------------------------------------------


def test_maps_have_no_words(drawn: Draw) -> None:
    with pytest.raises(ConfigError, match=r"stage3\.asked\.words: .* about audio, image, video"):
        drawn("depth")


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_cases_have_their_shares(drawn: Draw, kind: str) -> None:
    counts = Counter(case(one) for one in drawn(kind, n=1500))
    shares = dict(zip(CASES, SHARES, strict=True))
    if kind == "image":  # which cannot be heard
        shares["asked"] += shares.pop("heard")
    assert {name: n / 1500 for name, n in counts.items()} == pytest.approx(shares, abs=0.05)


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_the_answers_repeat_the_words_that_the_prompt_shows(
    processor: MicoChatProcessor, drawn: Draw, kind: Kind
) -> None:
    again, later = Counter[int](), 0
    way = "A voice says" if kind == "audio" else f"Text in the {TABLE[kind].noun}"
    for one in drawn(kind, 300):
        if case(one) not in ("asked", "heard"):
            continue
        loaded = [Loader().load(medium).measured for medium in one.media]
        measured = [replace(m, words=w) for m, w in zip(loaded, one.words, strict=True)]
        ids, labels = processor.tokenize(one.messages, False, measured)
        asked = [i for i, label in zip(ids, labels, strict=True) if label < 0]
        named = processor.tokenizer.convert_ids_to_tokens
        prompt = "".join(named([i for i in asked if i != processor.context_token_id]))
        answers = [m.text for m in one.messages[1::2] if '"' in m.text]
        quoted = [text.replace("£", "<unk>").replace("€", "<unk>").split('"') for text in answers]
        assert all(len(parts) == 3 for parts in quoted)
        assert all(f'{way}: "{parts[1]}"\n' in prompt for parts in quoted)
        later += one.messages[0].text == "How many?"
        again[len(one.media)] += len(quoted) > 1
        if len(quoted) > 1:  # later, after a turn about the same medium or another one with words
            question = one.messages[-2]
            assert not question.files
            assert (
                quoted[-1][1]
                == quoted[0][1]
                == " ".join(texts(one.words[0])).replace("£", "<unk>").replace("€", "<unk>")
            )
            both = len(one.media) == 2 and all(map(texts, one.words))
            assert "first" in question.text or not both
            assert "first" not in question.text or len(one.media) == 2
    assert min(again[1], again[2]) > 10
    assert (later > 20) == (kind != "audio"), "after another question about the medium"


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_what_is_asked_for_in_vain_is_not_there(drawn: Draw, kind: str) -> None:
    found = [one for one in drawn(kind, 200) if case(one) == "nothing"]
    assert found
    assert not any(texts(one.words[0]) for one in found)


def test_own_turns_stay_and_words_stand_beside_them(drawn: Draw) -> None:
    own = [one for one in drawn("video", 200) if case(one) == "own"]
    assert {tuple(m.text for m in one.messages) for one in own} == {("How many?", "Two.")}
    assert all(texts(one.words[0]) for one in own)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_drawn_words_are_varied_and_can_be_quoted(drawn: Draw, kind: str) -> None:
    held = [one.words[0] for one in drawn(kind) if texts(one.words[0])]
    whole = [" ".join(texts(words)) for words in held]
    assert len(set(whole)) > 0.95 * len(whole)
    assert len({word for text in whole for word in text.lower().split()}) > 500
    assert {len(texts(words)) for words in held} >= {1, 2, 3}
    for words in held:
        for text in texts(words):
            assert text == " ".join(text.split())
            assert text
            assert not set('"{}') & set(text)
    lengths = [len(text.split()) for text in whole]
    assert min(lengths) <= 3
    assert 15 <= max(lengths) <= 25

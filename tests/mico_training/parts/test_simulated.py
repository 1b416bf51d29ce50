"""Given things: runs of context tokens from the truth, which the encoder does not see."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.mini.things import WORDS
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor
from mico_training.build_model import Chat
from mico_training.data.sources.sample import region_batch, regions_of
from mico_training.parts import simulated
from mico_training.parts.media_noise import MediaNoise
from mico_training.parts.simulated import GivenThings
from mico_training.recipe import DropRecipe
from mico_training.stages import train_stage3
from tests.mico_training.parts.test_set_prediction import with_things
from tests.mico_training.test_runs import losses, write_recipe
from tests.support.tiny import SIDE, chat_model, letters

SAID = {
    word: 20 + n for n, word in enumerate(dict.fromkeys(w for ws in WORDS.values() for w in ws))
}
"""The token of each word of a run; 10 to 14 are those of names (``chat_model``)."""
NAMES = {"one": [10], "two": [11], "three": [12, 13], "strange": [60, 61]}


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> MicoChatForConditionalGeneration:
    """A model that says each word by its own token, and things that are as sure as can be."""
    for name, value in (("MISSED", 0.0), ("BESIDE", 0.0), ("METRES", 0.0), ("SURE", (50.0, 51.0))):
        monkeypatch.setattr(simulated, name, value)
    model = chat_model(with_things())
    model.thing_words.learn_words(SAID.__getitem__)
    assert model.concepts is not None
    with torch.no_grad():  # each name is like no other
        torch.nn.init.orthogonal_(model.concepts.classifier.weight)
        model.concepts.learned.weight.copy_(-model.concepts.classifier.weight.sum(0, keepdim=True))
    return model.train()


def thing(name: str, x: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "x": x, "y": 0.5, "width": 0.2, "height": 0.2, **more}


def given(
    model: MicoChatForConditionalGeneration,
    kinds: list[Kind],
    truths: Sequence[list[dict[str, Any]] | None],
    units: int = 1,
) -> list[Tensor]:
    """The context tokens of media whose things are given; a truth of None: the medium is seen."""
    noise = MediaNoise(model, DropRecipe())
    counts = [units if kind == "video" else 1 for kind in kinds]
    media = {
        "media_kind": torch.tensor([KINDS.index(kind) for kind in kinds]),
        "media_units": torch.tensor(counts),
        "pixel_values": torch.rand(
            sum(counts), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)
        ),
    }
    regions = region_batch(
        [
            () if truth is None else regions_of(kind, {"things": truth})
            for kind, truth in zip(kinds, truths, strict=True)
        ],
        lambda word: NAMES.get(word, [SAID.get(word, 1)]),
    )
    assert regions is not None
    inputs = {**regions.inputs(), "given": torch.tensor([truth is not None for truth in truths])}
    given = noise(inputs | media)
    see = given.pop("see")
    assert given.keys() == media.keys(), "the model itself knows none of the others"
    torch.manual_seed(0)
    tokens: list[Tensor] = see(**given)
    return tokens


def said(model: MicoChatForConditionalGeneration, tokens: Tensor) -> list[int]:
    """The words that a medium's tokens say, behind zeros: the ids of the nearest vectors."""
    table = cast(nn.Embedding, model.get_input_embeddings()).weight
    there = tokens.any(-1)
    assert there.int().diff().min() >= 0, "nothing stands between words"
    return cast(list[int], torch.cdist(tokens[there], table).argmin(-1).tolist())


def words(*names: str) -> list[int]:
    return [SAID[name] for name in names]


def test_a_given_picture_says_its_true_things_the_nearest_first(
    chat: MicoChatForConditionalGeneration,
) -> None:
    far = thing("two", 0.8, colour="red", depth=6.0)
    near = thing("three", 0.2, colour="blue", depth=0.7)
    (tokens,) = given(chat, ["image"], [[far, near]])
    assert len(tokens) == chat.config.context_length("image", 1)
    near_run = [12, 13, *words("one", "blue", "left", "center", "near", "two")]
    assert said(chat, tokens)[-15:] == [
        *near_run,
        *[11, *words("one", "red", "right", "center", "far", "two")],
    ]


def test_things_of_one_name_say_how_many_they_are(chat: MicoChatForConditionalGeneration) -> None:
    truth = [thing(name, 0.3 * n, depth=1.0 + n) for n, name in enumerate(["one", "two", "one"])]
    (tokens,) = given(chat, ["image"], [truth])
    found = said(chat, tokens)[-21:]
    assert [found[n] for n in (1, 8, 15)] == words("two", "one", "two")
    assert [found[n] for n in (6, 13, 20)] == words("three", "three", "three")


def test_a_name_that_the_classifier_lacks_says_its_own_words(
    chat: MicoChatForConditionalGeneration,
) -> None:
    (tokens,) = given(chat, ["image"], [[thing("strange", 0.5, colour="red")]])
    assert said(chat, tokens)[-8:-6] == [60, 61]


def test_a_given_depth_map_says_its_halves_and_metres_and_a_clip_its_ways(
    chat: MicoChatForConditionalGeneration,
) -> None:
    moving = thing("one", 0.2, colour="red", way="up")
    depth, clip = given(chat, ["depth", "video"], [[thing("two", 0.8, depth=3.0)], [moving]], 3)
    assert len(clip) == chat.config.context_length("video", 3)
    *halves, name, _, metres, side, _, _, _ = said(chat, depth)[-13:]
    assert {halves[0], halves[3]} == {SAID["left"], SAID["right"]}
    assert [halves[2], halves[5]] == words(";", ";")
    assert [name, metres, side] == [11, *words("3", "right")]
    assert said(chat, clip)[-2:] == words("up", "one")


def test_the_encoder_sees_only_what_is_not_given(
    chat: MicoChatForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = chat.encoded
    units: list[int] = []

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        units.append(int(args[1].sum()))
        return encode(*args)

    monkeypatch.setattr(chat, "encoded", counted)
    kinds: list[Kind] = ["image", "audio", "image"]
    truths = [[thing("one", 0.5)], None, None]
    mixed = given(chat, kinds, truths)
    lengths = [chat.config.context_length(kind, 1) for kind in kinds]
    assert [len(tokens) for tokens in mixed] == lengths
    assert units == [2]
    given(chat, ["image"], [[]])
    assert units == [2], "nothing was there to be seen"


def test_some_things_are_missed_and_colours_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chat_model(with_things())
    model.thing_words.learn_words(SAID.__getitem__)
    monkeypatch.setattr(simulated, "MISSED", 0.4)
    monkeypatch.setattr(simulated, "SURE", (0.0, 1.0))
    model.train()
    pictures = [[thing("one", 0.5, colour="red")]] * 60
    found = [said(model, tokens) for tokens in given(model, ["image"] * 60, pictures)]
    missed = sum(ids[-1] != SAID["one"] for ids in found)
    assert 12 <= missed <= 36
    assert len({ids[-5] for ids in found if ids[-1] == SAID["one"]}) > 1


# PEFT asks transformers for the old name of a property.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_stage_3_is_given_pictures_and_hears_sounds(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = GivenThings.tokens
    kinds: list[str] = []

    def counted(self: GivenThings, regions: Any, medium: int, kind: int, pixels: Tensor) -> Tensor:
        kinds.append(KINDS[kind])
        return make(self, regions, medium, kind, pixels)

    monkeypatch.setattr(GivenThings, "tokens", counted)
    config = with_things()
    processor = MicoChatProcessor.for_config(config, letters(), Preprocessing(image_size=SIDE))
    Chat(MicoChatForConditionalGeneration(config), processor).save(tmp_path / "chat")
    lora = {"lora": {"r": 2, "targets": ["q_proj"]}}
    train_stage3(write_recipe(tmp_path, shards, tmp_path / "chat", stage3=lora | {"given": 1.0}))
    assert set(kinds) == {"image"}
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    kinds.clear()
    train_stage3(write_recipe(tmp_path / "plain", shards, tmp_path / "chat", stage3=lora))
    assert not kinds


def test_given_things_need_a_model_with_things_and_processes_that_do_not_wait(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat, stage3={"given": 0.5})
    with pytest.raises(ConfigError, match="the model has no things"):
        train_stage3(recipe)
    for parallel in ("fsdp", "zero2"):
        with pytest.raises(ConfigError, match=f"needs train.parallel ddp, not {parallel}"):
            train_stage3(recipe, [f"train.parallel={parallel}"])


def test_a_scene_is_not_named_after_a_thing_that_the_classifier_lacks(
    chat: MicoChatForConditionalGeneration,
) -> None:
    (tokens,) = given(chat, ["image"], [[thing("strange", 0.8, colour="red")]])
    table = cast(nn.Embedding, chat.get_input_embeddings()).weight
    whole = tokens[tokens.any(-1)][0]
    torch.testing.assert_close(whole, table[[10, 11, 12]].mean(0), msg="any name is as likely")


def test_the_sound_track_of_a_given_clip_is_heard(chat: MicoChatForConditionalGeneration) -> None:
    clip, track = given(chat, ["video", "audio"], [[thing("one", 0.2, way="up")], []], 3)
    assert len(clip) == chat.config.context_length("video", 3)
    assert len(track) == chat.config.context_length("audio", 1)

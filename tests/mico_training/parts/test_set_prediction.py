"""Things: queries learn to find them, each becomes a run of tokens, and stage 2 trains them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import THING_WORDS, MicoChatConfig
from mico_chat.model.mini.motion import Ways, split_motion
from mico_chat.model.mini.regions import INNER, RegionBatch
from mico_chat.model.mini.things import (
    WORDS,
    Found,
    Thing,
    ThingWords,
    among,
    look_at,
    namesakes,
    padded,
    there,
    zeros_first,
)
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor
from mico_training.build_model import Chat
from mico_training.data.sources.sample import region_batch, regions_of
from mico_training.parts.set_prediction import SetPrediction, layer_losses, matched
from mico_training.stages import train_stage2
from tests.mico_training.test_runs import logged, moved, write_recipe
from tests.support.tiny import SIDE, chat_model, letters

QUERIES = 3


def with_things() -> MicoChatConfig:
    config = MicoChatConfig.tiny()
    config.bridge_config.things = QUERIES
    assert config.concept_config is not None
    config.concept_config.colours = True
    return config


def media(kinds: list[Kind], units: list[int], side: int = 2 * SIDE) -> dict[str, Any]:
    return {
        "media_kind": torch.tensor([KINDS.index(kind) for kind in kinds]),
        "media_units": torch.tensor(units),
        "pixel_values": torch.rand(sum(units), 3, side, side),
    }


def found(boxes: list[list[float]], logits: list[float]) -> Found:
    return Found(torch.tensor([logits]), torch.tensor([boxes]), torch.zeros(1, len(boxes)))


LEFT, RIGHT = [0.2, 0.5, 0.2, 0.4], [0.8, 0.5, 0.3, 0.3]
TRUTH = torch.tensor([[*RIGHT, 0.0], [*LEFT, float("nan")]])


def test_each_thing_is_matched_with_the_query_on_it() -> None:
    rows, columns = matched(found([LEFT, [0.5] * 4, RIGHT], [0.0, 9.0, 0.0]), 0, TRUTH)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (2, 0)]


def test_what_is_true_costs_nothing_and_a_second_query_on_a_thing_costs() -> None:
    boxes = [LEFT, LEFT, RIGHT]
    right = layer_losses(found(boxes, [9.0, -9.0, 9.0]), [TRUTH])
    assert all(float(loss) < 1e-3 for loss in right.values())
    assert float(layer_losses(found(boxes, [9.0, 9.0, 9.0]), [TRUTH])["thing"]) > 1
    moved = layer_losses(found([[0.4, *LEFT[1:]], LEFT, RIGHT], [9.0, -9.0, 9.0]), [TRUTH])
    assert float(moved["box"]) + float(moved["thing"]) > 0.5
    empty = layer_losses(found(boxes, [-9.0] * 3), [TRUTH[:0]])
    assert all(float(loss) < 1e-3 for loss in empty.values())


def test_queries_learn_where_bright_squares_are() -> None:
    torch.manual_seed(0)
    chat = chat_model(with_things())
    trained = SetPrediction(chat)
    pictures = torch.zeros(8, 3, SIDE, SIDE)
    boxes = torch.rand(8, 2) * 0.4 + 0.1
    for picture, (x, y) in zip(pictures, boxes.tolist(), strict=True):
        picture[:, int(y * SIDE) : int((y + 0.4) * SIDE), int(x * SIDE) : int((x + 0.4) * SIDE)] = 3
    inner = torch.cat([boxes + 0.2 - 0.2 * INNER, boxes + 0.2 + 0.2 * INNER], 1)
    none = torch.full((8, 1), -1)
    regions = RegionBatch(
        torch.arange(8), inner, none, none, torch.full((8,), 2.0), torch.full((8,), -1)
    )
    inputs = media(["image"] * 8, [1] * 8) | {"pixel_values": pictures} | regions.inputs()
    inputs["media_row"] = torch.arange(8)
    optimizer = torch.optim.AdamW(trained.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        loss = trained(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 5
    assert chat.things is not None
    tokens, _ = chat.encoded(*(inputs[k] for k in ("media_kind", "media_units", "pixel_values")))
    last = chat.things(tokens[:, chat.encoder.n_prefix :])[-1]
    there = last.logits > 0
    assert there.sum(1).tolist() == [1] * 8
    assert (last.boxes[there][:, :2] - boxes - 0.2).abs().max() < 0.12
    assert (last.distance[there].exp() - 2).abs().max() < 0.3


@pytest.mark.parametrize(
    ("kind", "units"), [("image", 1), ("depth", 1), ("video", 3), ("audio", 2)]
)
def test_a_medium_has_as_many_tokens_as_its_kind_says(kind: Kind, units: int) -> None:
    config = with_things()
    chat = chat_model(config)
    (tokens,) = chat.context_tokens(**media([kind], [units]))
    assert len(tokens) == config.context_length(kind, units)
    processor = MicoChatProcessor.for_config(config, letters(), Preprocessing(image_size=SIDE))
    assert processor._own_length(type("M", (), {"kind": kind, "units": units})()) == len(tokens)


def test_where_nothing_is_found_nothing_is_said_and_half_precision_looks_too() -> None:
    config = with_things()
    chat = chat_model(config)
    chat.encoder.to(torch.bfloat16)
    assert chat.things is not None
    last = chat.things.decide.get_submodule("2")
    assert isinstance(last, torch.nn.Linear)
    length = QUERIES * (2 + THING_WORDS)
    for bias, some in ((-99.0, False), (99.0, True)):
        with torch.no_grad():
            last.bias[0] = bias
        for inputs in (media(["image"], [1]), media(["video"], [3])):
            (tokens,) = chat.context_tokens(**inputs)
            assert int(tokens.any(-1).sum()) > length if some else not tokens[:length].any()


def test_only_pictures_whose_things_are_known_teach() -> None:
    chat = chat_model(with_things())
    inputs = media(["image", "image"], [1, 1]) | {"media_row": torch.arange(2)}
    assert float(SetPrediction(chat)(**inputs).loss.detach()) == 0
    nothing = regions_of("image", {"things": []})
    batch = region_batch([nothing, regions_of("image", {})], lambda word: [1])
    assert batch is not None
    assert batch.medium.tolist() == [0]
    told = SetPrediction(chat)(**inputs, **batch.inputs()).loss.detach()
    assert float(told) > 0
    inputs["pixel_values"][1] = 9.0
    torch.testing.assert_close(SetPrediction(chat)(**inputs, **batch.inputs()).loss.detach(), told)


def test_cached_features_cannot_be_looked_at_closely() -> None:
    chat = chat_model(with_things())
    inputs = media(["image"], [1])
    features = chat.encoder.features(inputs.pop("pixel_values"))
    with pytest.raises(ModelError, match="give pixel_values"):
        chat.context_tokens(**inputs, stem_features=features)


def test_a_look_shows_the_box_and_a_margin_in_full_detail() -> None:
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[1, :, 16:32, 32:48] = 1.0
    boxes = torch.tensor([[0.625, 0.375, 0.25, 0.25], [1.2, 0.5, 0.01, 0.01]])
    inside, edge = look_at(pixels, torch.tensor([1, 0]), boxes, 32)
    assert inside.shape == edge.shape == (3, 32, 32)
    assert 0.7 < float(inside.mean()) < 1.0, "mostly the thing, and a margin of what is around it"
    assert torch.isfinite(edge).all()
    assert look_at(pixels, torch.zeros(0, dtype=torch.long), boxes[:0], 32).shape == (0, 3, 32, 32)


def test_a_thing_becomes_words_near_what_is_true_of_it() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.eye(64))
    words = ThingWords(2)
    words.learn_words({word: number for number, word in enumerate(all_words())}.__getitem__)
    colour = torch.full((2, 11), -20.0)
    colour[:, 4] = 20.0  # blue
    thing = Thing(
        boxes=torch.tensor([[0.1, 0.9, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]]),
        picture=torch.tensor([0, 1]),
        distance=torch.tensor([6.0, 3.0]).log(),
        name=torch.zeros(2, 2, 64),
        namesakes=torch.tensor([2, 20]),
        colour=colour,
        way=None,
        surface=torch.tensor([False, True]),
    )
    runs = words(thing, table)
    assert runs.shape == (2, 2 + THING_WORDS, 64)
    said = [[all_words()[int(token)] for token in run.argmax(-1)] for run in runs[:, 2:]]
    assert said == [
        ["two", "blue", "left", "bottom", "far", "one"],
        ["nine", "3", "right", "top", "away", "one"],
    ]


def test_of_things_close_together_one_is_left_and_of_far_ones_one_is_near() -> None:
    x, ends = torch.tensor([[0.2], [0.4], [0.9], [0.5], [0.51]]), torch.tensor([0.0, 1.0])
    moved = among(x, torch.tensor([0, 0, 1, 2, 2]), ends).squeeze(1)
    assert moved[0] < 0.2
    assert moved[1] > 0.55, "on the left, but right of the other"
    assert moved[2] == 0.9, "alone"
    assert (moved[3:] - 0.5).abs().max() < 0.05, "one above the other"
    far = torch.tensor([[4.0], [7.0]]).log()
    assert among(far, torch.zeros(2).long(), torch.tensor([0.7, 6.0]).log())[0] < math.log(2)


def test_namesakes_are_of_one_picture_and_need_not_be_sure() -> None:
    posterior = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.9, 0.1], [0.8, 0.2], [0.8, 0.2]])
    assert namesakes(posterior, torch.tensor([0, 0, 0, 1, 2])).tolist() == [3, 1, 2 + 1, 1, 1]


def test_zeros_stand_first_and_the_rest_keeps_its_order() -> None:
    tokens = torch.tensor([[1.0, 0, 2, 0, 3], [0, 0, 4, 5, 0]]).unsqueeze(-1)
    assert zeros_first(tokens).squeeze(-1).tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 4, 5]]


def test_of_a_depth_map_the_nearer_half_is_said_first() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.eye(64))
    words = ThingWords(2)
    words.learn_words({word: number for number, word in enumerate(all_words())}.__getitem__)
    maps = torch.zeros(3, 3, 8, 8)
    maps[0, 1, :, 5:] = 2.0  # something near on the right
    maps[1, 1, 2:7, :3] = 1.0
    runs = words.halves(maps, table)
    assert runs.shape == (3, 2, 2 + THING_WORDS, 64)
    said = [[all_words()[int(token)] for token in run.argmax(-1)] for run in runs[0, :, [-4, -2]]]
    assert said == [["right", "near"], ["left", "far"]]
    assert runs[1, :, -4].argmax(-1).tolist() == runs[0, :, -4].argmax(-1).flip(0).tolist()
    assert runs[2, 0, -2].max() == 0.5, "where both are as near, neither is near or far"
    assert not runs[..., :2, :].any(), "a half has no name"


def all_words() -> list[str]:
    return list(dict.fromkeys(word for words in WORDS.values() for word in words))


def test_runs_stand_first_and_zeros_behind() -> None:
    runs = torch.arange(1.0, 4.0).view(3, 1, 1)
    assert padded(runs, torch.tensor([0, 2, 2]), 3, 3).squeeze(-1).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [2, 3, 0],
    ]


def test_more_runs_than_places_lose_the_last() -> None:
    runs = torch.arange(1.0, 5.0).view(4, 1, 1)
    kept = padded(runs, torch.tensor([0, 0, 0, 1]), 2, 2).squeeze(-1)
    assert kept.tolist() == [[1, 2], [4, 0]]


def test_ways_are_learnt_from_where_a_texture_goes() -> None:
    torch.manual_seed(0)
    ways = Ways(3)
    background, patch = torch.randn(16, 14, 14), torch.randn(16, 3, 3)

    def clip(step: int, row: int) -> Tensor:
        frames = background.repeat(4, 1, 1, 1) + 0.1 * torch.randn(4, 16, 14, 14)
        for t, frame in enumerate(frames):
            left = 6 + step * (t - 2)
            frame[:, row : row + 3, left : left + 3] = patch
        return frames

    steps = torch.arange(24) % 3 - 1  # to the left, none, to the right
    rows = (1 + torch.arange(24) // 3).tolist()
    frames = torch.stack([clip(int(s), row) for s, row in zip(steps, rows, strict=True)])
    boxes = torch.tensor([[7.5 / 14, (row + 1.5) / 14, 3 / 14, 3 / 14] for row in rows])
    optimizer = torch.optim.AdamW(ways.parameters(), 1e-2)
    for _ in range(60):
        loss = F.cross_entropy(ways(frames[:12], boxes[:12], torch.arange(12)), steps[:12] + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ways.train(False)
    held_out = ways(frames[12:], boxes[12:], torch.arange(12)).argmax(1) - 1
    assert held_out.tolist() == steps[12:].tolist()
    assert ways(frames[:1, :1], boxes[:1], torch.zeros(1, dtype=torch.long)).shape == (1, 3)


def test_a_pan_is_the_cameras_motion_and_no_things() -> None:
    torch.manual_seed(0)
    wide = torch.randn(16, 14, 20)
    panned = torch.stack([wide[:, :, t : t + 14] for t in range(5)])
    camera, own = split_motion(Ways(3).matched(panned[None]))
    assert (camera[0, :, 0] < -0.8).all(), "all cells go to the left"
    assert camera[0, :, 1].abs().max() < 0.2
    assert own[..., 2:-2, 2:-2].abs().mean() < 0.2


def test_stage_2_trains_queries_and_encoder(tmp_path: Path, shards: Path) -> None:
    torch.manual_seed(0)
    config = with_things()
    processor = MicoChatProcessor.for_config(config, letters(), Preprocessing(image_size=SIDE))
    Chat(MicoChatForConditionalGeneration(config), processor).save(tmp_path / "chat")
    parts = {"objective": "things", "trainable": ["encoder.vit", "things"]}
    train_stage2(write_recipe(tmp_path, shards, tmp_path / "chat", stage2=parts))
    for entry in logged(tmp_path):
        assert entry["thing_loss"] > 0
        assert entry["box_loss"] > 0
    changed = moved(MicoChatForConditionalGeneration, tmp_path / "chat", tmp_path / "out")
    assert {name.split(".")[0] for name in changed} == {"encoder", "things"}


def test_a_box_on_a_surer_one_is_no_thing_of_its_own() -> None:
    boxes = torch.tensor([[0.3, 0.5, 0.2, 0.2], [0.32, 0.5, 0.2, 0.2], [0.7, 0.5, 0.2, 0.2]])
    logits = torch.tensor([[1.0, 2.0, 0.5], [1.0, -3.0, -2.0]])
    found = Found(logits, torch.stack([boxes, boxes]), torch.zeros(2, 3))
    assert there(found).tolist() == [[False, True, True], [True, False, False]]

"""Subtitles from a line of JSON to the context: the words decide where the media cannot."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mico_chat.checkpoints.assemble import set_options
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.pretrained import MediumUnits, PretrainedModel
from mico_chat.evaluation.run import words_digest
from mico_chat.media import KINDS, MediaFile, decode
from mico_chat.model.config import MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.released import SUBTITLE_LENGTH, Subtitles
from mico_training.build_model import Pretraining, learn_vocabulary
from mico_training.data.batches import ContextCollator
from mico_training.data.benchmarks import write_manifest
from mico_training.data.examples import ContextDataset
from mico_training.data.media import LoadedMedium
from mico_training.data.mixture import Mixture
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.sample import TrainingSample
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.stages import train_stage1
from tests.mico_training.data.test_draws import PAPERS
from tests.mico_training.scenes import COLOURS, picture
from tests.mico_training.test_estimate import RECIPES
from tests.mico_training.test_runs import write_recipe

OTHERS = ("contrastive", "matching", "tagging", "region", "concept")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model that reads subtitles."""
    torch.manual_seed(0)
    words = list(COLOURS)
    config = MicoConfig.tiny(concepts=False)
    config.text_config.subtitles = True
    folder = tmp_path_factory.mktemp("models") / "reader"
    model = MicoForPretraining(config)
    tokenizer = learn_vocabulary(words, size=128)
    Pretraining(model, tokenizer, Preprocessing(image_size=64)).save(folder)
    return folder


def manifest(folder: Path) -> Path:
    """One picture with three captions: a subtitle says which is right."""
    (folder / "x.png").write_bytes(picture("red"))
    lines = [
        {"image": "x.png", "caption": colour, "subtitle": f"{colour}, {colour}!"}
        for colour in COLOURS
    ]
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(folder: Path, model: Path, **stage1: Any) -> Path:
    data = [{"path": str(manifest(folder)), "kind": "jsonl"}]
    train: dict[str, Any] = {"lr": 3e-3, "steps": 120, "batch_size": 12, "save_steps": 120}
    train |= {"log_steps": 40, "drop": {"modality": 0.0}}
    weights = {"weights": dict.fromkeys(OTHERS, 0.0)}
    return write_recipe(folder, folder, model, data=data, train=train, stage1=weights | stage1)


def test_captions_follow_the_subtitle(tmp_path: Path, reader: Path) -> None:
    train_stage1(recipe(tmp_path, reader, subtitles=True))
    model = PretrainedModel(str(tmp_path / "out"))
    pixels = model.preprocessing.units(decode(MediaFile("image", tmp_path / "x.png")))
    items = [MediumUnits(("image",), (pixels,), f"{colour}, {colour}!") for colour in COLOURS]
    assert model.caption(model.encode(items)) == list(COLOURS)


def test_a_model_without_them_or_room_is_refused(tmp_path: Path, tiny_pretraining: Path) -> None:
    with pytest.raises(ConfigError, match=r"a model with text_config\.subtitles: true"):
        train_stage1(recipe(tmp_path, tiny_pretraining, subtitles=True))
    with pytest.raises(ConfigError, match=r"3 captions side by side have 116 tokens"):
        train_stage1(recipe(tmp_path, tiny_pretraining, cross_corpus=0.1))


def test_they_are_dropped_like_a_medium(tmp_path: Path) -> None:
    mixture = Mixture([ManifestSource(manifest(tmp_path), "caption")], [1.0], 0)
    always, half, never = (
        [bool(ContextDataset(mixture, 200, drop, 0.0)[n].subtitle) for n in range(200)]
        for drop in (0.0, 0.5, 1.0)
    )
    assert all(always)
    assert not any(never)
    assert 60 < sum(half) < 140


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_the_papers_recipes_learn_from_subtitles(name: str) -> None:
    """A tiny model, built and fed as the recipe says: whose subtitle it is changes the loss."""
    recipe = load_recipe(Stage1Run, RECIPES / f"{name}.yaml")
    config = MicoConfig.tiny(concepts=False)
    config.text_config.max_position_embeddings = 512
    set_options(config, recipe.model.options)
    torch.manual_seed(0)
    model = MicoForPretraining(config).train(False)
    model.objective_weights = recipe.stage1.weights.model_dump()
    with torch.no_grad():
        for weight in (weight for weight in model.text.parameters() if weight.dim() == 2):
            weight.mul_(10)  # new ones are so small that all words read alike
    samples = [
        TrainingSample(
            f"s{number}",
            {"v": MediaFile("video", b"", f"s{number}")},
            {"v": (f"a {colour} square",)},
            subtitle=f"{colour}!",
        )
        for number, colour in enumerate(COLOURS)
    ]
    mixture = Mixture([samples], [1.0], 0)
    contexts = ContextDataset(mixture, 3, 0.0, recipe.stage1.cross_corpus)
    words = learn_vocabulary([*COLOURS, "a square!"] * 9, size=128)
    collate = ContextCollator(words, cast(Any, Clips()), {}, recipe.stage1, 512)

    def loss(order: list[int], read: bool = True) -> float:
        examples = [
            replace(contexts[draw], subtitle=contexts[said].subtitle * read)
            for draw, said in enumerate(order)
        ]
        torch.manual_seed(1)
        return float(model(**collate(examples)).loss.detach())

    assert loss([0, 1, 2]) == loss([0, 1, 2])
    assert loss([0, 1, 2]) != pytest.approx(loss([1, 2, 0]), rel=1e-4)
    assert loss([0, 1, 2], read=False) == loss([1, 2, 0], read=False), "the control"


class Clips:
    """A loader of clips of one frame, without content."""

    def load(self, medium: MediaFile, generator: object = None) -> LoadedMedium:
        return LoadedMedium(medium.kind, torch.full((1, 3, 64, 64), int(medium.name[1:]) / 3))

    def batch(self, rows: Sequence[Sequence[LoadedMedium]]) -> dict[str, torch.Tensor]:
        media = [one for row in rows for one in row]
        return {
            "pixel_values": torch.cat([one.inputs for one in media]),
            "media_kind": torch.tensor([KINDS.index(one.kind) for one in media]),
            "media_units": torch.ones(len(media), dtype=torch.long),
            "media_row": torch.arange(len(rows)),
        }


def test_a_subtitle_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture("red"))
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"image": "x.png", "caption": "a square", "subtitle": ["hi"]}))
    with pytest.raises(DataError, match=r"train\.jsonl:1: 'subtitle' is list, not a string"):
        raise ManifestSource(path, "caption").bad.errors[0]


@torch.inference_mode()
def test_a_neighbour_and_no_subtitle_change_nothing(tmp_path: Path, reader: Path) -> None:
    model = PretrainedModel(str(reader))
    (tmp_path / "x.png").write_bytes(picture("red"))
    pixels = model.preprocessing.units(decode(MediaFile("image", tmp_path / "x.png")))
    silent, spoken, other = (
        MediumUnits(("image",), (pixels,), text) for text in ("", "red", "blue")
    )
    (alone,) = model.encode([silent])
    (said,) = model.encode([spoken])
    together = model.encode([silent, other, spoken])
    for one, same in ((alone, together[0]), (said, together[2])):
        torch.testing.assert_close(one.context, same.context)
        torch.testing.assert_close(one.vector, same.vector)
    length = min(SUBTITLE_LENGTH, model.model.config.text_config.max_position_embeddings)
    assert len(said.context) == len(alone.context) + length
    assert not torch.allclose(said.vector, alone.vector)
    assert not torch.allclose(said.vector, together[1].vector)


def test_marks_in_them_are_text_and_they_have_one_length(reader: Path) -> None:
    tokenizer = PretrainedModel(str(reader)).tokenizer
    found = Subtitles.of(["[SEP] red", "", "red " * 200], tokenizer, 512)
    assert found.ids.shape == found.mask.shape == (3, SUBTITLE_LENGTH)
    assert found.there.tolist() == [True, False, True]
    assert found.ids[0].tolist().count(tokenizer.sep_token_id) == 1
    assert found.ids[2, -1] == tokenizer.sep_token_id


def msrvtt(data: Path, subtitles: str) -> Path:
    folder = data / "msrvtt"
    (folder / "videos").mkdir(parents=True)
    for name in ("video1.mp4", "video2.mp4"):
        (folder / "videos" / name).touch()
    content = {
        "videos": [{"video_id": f"video{n}", "split": "train"} for n in (1, 2)],
        "sentences": [{"video_id": f"video{n}", "caption": f"clip {n}"} for n in (1, 2)],
    }
    (folder / "train_val_videodatainfo.json").write_text(json.dumps(content))
    (folder / "subtitles.json").write_text(subtitles)
    return folder


def test_a_benchmarks_subtitles_reach_items_and_manifest(tmp_path: Path) -> None:
    folder = msrvtt(tmp_path, '{"video2": " hello  there "}')
    items = DATASETS["msrvtt"].read(tmp_path, "train").items
    assert [item.subtitle for item in items] == ["", "hello  there"]
    path, _, _ = write_manifest("msrvtt", tmp_path)
    source = ManifestSource(path, "caption")
    assert [source[n].subtitle for n in range(2)] == ["", "hello  there"]
    (folder / "subtitles.json").unlink()
    without = DATASETS["msrvtt"].read(tmp_path, "train").items
    assert words_digest(items) != words_digest(without)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not JSON"), ("[]", "an object"), ('{"a": 1}', "a text for each")]
)
def test_a_broken_file_of_subtitles_is_named(tmp_path: Path, content: str, said: str) -> None:
    msrvtt(tmp_path, content)
    with pytest.raises(DataError, match=rf"subtitles\.json.*{said}"):
        DATASETS["msrvtt"].read(tmp_path, "train")

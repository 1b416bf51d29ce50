"""Pretraining starts from a timm ViT and a BERT: strictly, and it says what was left and is new."""

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, ViTConfig

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig, MicoTextConfig
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.pretraining import MicoForPretraining
from mico_training import starts
from mico_training.build_model import build_chat, build_pretraining, pretraining_config
from mico_training.recipe import ModelRecipe, Stage1Run, load_recipe
from mico_training.starts import start_from
from tests.mico_training.test_estimate import RECIPES

EVA: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
BERT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def model(
    seed: int = 1, image_size: int = 56, position: bool = True, **eva: Any
) -> MicoForPretraining:
    torch.manual_seed(seed)
    config = MicoConfig.tiny()
    config.context_config.position = position
    config.concept_config = None
    config.encoder_config.stem = None
    config.encoder_config.architecture = "eva_giant_patch14_clip_224"
    config.encoder_config.architecture_options = EVA | eva
    config.encoder_config.image_size = image_size
    return MicoForPretraining(config)


def start(model: MicoForPretraining, **weights: Path | str) -> list[str]:
    return start_from(
        model, ModelRecipe(name="tiny", **{key: str(value) for key, value in weights.items()})
    )


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm saves it, with a classifier."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eva")
    vit: Any = timm.create_model("eva_giant_patch14_clip_224", img_size=56, num_classes=8, **EVA)
    nn.init.normal_(vit.pos_embed)
    timm.models.save_for_hf(vit, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a BERT with all its heads, as the hub's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    whole = BertForPreTraining(BertConfig(**BERT))
    nn.init.normal_(whole.cls.predictions.bias)
    whole.save_pretrained(folder)
    return folder


def test_the_vit_is_the_folders_and_its_classifier_is_named(
    eva: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh, given = model(), load_file(eva / "model.safetensors")
    with caplog.at_level(logging.INFO):
        said = start(fresh, encoder_weights=eva)
    for name, value in fresh.encoder.vit.state_dict().items():
        assert torch.equal(value, given[name]), name
    assert said == [r.getMessage() for r in caplog.records if r.name == "mico_training.starts"]
    assert said[0].endswith("all 32 tensors of the ViT; left aside: head.weight, head.bias")
    pixels = torch.randn(1, 3, 56, 56)
    source: Any = timm.create_model(f"local-dir:{eva}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.train(False).encoder(pixels), source.forward_features(pixels)
        )


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_with_a_text_tower_beside_it(
    eva: Path, tmp_path: Path, prefix: str, suffix: str
) -> None:
    given = load_file(eva / "model.safetensors")
    content = {prefix + name: value.half() for name, value in given.items()}
    if prefix:
        content["text.ln_final.weight"] = torch.ones(4)
    file = tmp_path / f"clip{suffix}"
    save_file(content, file) if suffix == ".safetensors" else torch.save(content, file)
    fresh = model()
    said = start(fresh, encoder_weights=file)[0]
    for name, value in fresh.encoder.vit.state_dict().items():
        assert torch.equal(value, given[name].half().float()), name
    assert ("text.ln_final" in said) == bool(prefix)
    assert "head.weight" in said


def test_another_image_size_resamples_the_positions(eva: Path) -> None:
    fresh, small = model(image_size=84), model()
    said = start(fresh, encoder_weights=eva)[0]
    assert "position embeddings resampled from 4 x 4 to 6 x 6" in said
    start(small, encoder_weights=eva)
    tables: Any = [m.encoder.vit.pos_embed for m in (fresh, small)]
    assert torch.equal(tables[0][:, 0], tables[1][:, 0])  # [CLS]
    assert nn.functional.cosine_similarity(tables[0][0, 1], tables[1][0, 1], dim=0) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 64}, r"has the shape \(1, 1, 32\), but \(1, 1, 64\) in the model"),
        ({"depth": 3}, r"it lacks blocks\.2\..*, which the model has \(and"),
        ({"depth": 1}, r"it has blocks\.1\..*, which the model lacks \(and"),
        ({"patch_size": 28}, r"patch_embed\.proj\.weight has the shape \(32, 3, 14, 14\), but \("),
        ({"num_heads": 4}, "it has 2 attention heads, but the model has 4"),
    ],
)
def test_a_vit_of_another_size_is_refused(eva: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        start(model(**options), encoder_weights=eva)
    assert str(error.value).startswith(f"model.encoder_weights {eva}: ")
    assert "set model.options.encoder_config to the sizes of those" in str(error.value)


def test_a_file_of_another_patch_size_is_refused(eva: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(32, 3, 14, 14\), but \(32, 3, 28, 28\)"):
        start(model(patch_size=28), encoder_weights=eva / "model.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "there is no such file or folder"),
        ("eva_gigantic_patch14", "timm cannot load it: .*eva_gigantic_patch14.*; give a timm name"),
    ],
)
def test_a_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        start(model(), encoder_weights=source)


def test_files_that_hold_no_vit(tmp_path: Path, bert: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not weights")
    listed, pickled = tmp_path / "list.pt", tmp_path / "code.pt"
    torch.save([1, 2], listed)
    torch.save({"model": Path("/")}, pickled)
    for source in (damaged, listed, pickled, bert, bert / "model.safetensors"):
        with pytest.raises(ConfigError, match=f"model.encoder_weights {source}: ") as error:
            start(model(), encoder_weights=source)
        assert "\n" not in str(error.value)


def test_the_text_branch_is_the_folders_and_what_bert_lacks_is_new(bert: Path) -> None:
    before, fresh = model().text.state_dict(), model()
    said = start(fresh, text_weights=bert)[0]
    given, found = load_file(bert / "model.safetensors"), fresh.text.state_dict()
    kept = {name for name in found if torch.equal(found[name], before[name])}
    for name in found:
        inside = given.get(name)
        if inside is not None:
            assert torch.equal(found[name], inside), name
    heads = {
        "head.0.weight": "cls.predictions.transform.dense.weight",
        "head.2.bias": "cls.predictions.transform.LayerNorm.bias",
        "head_bias": "cls.predictions.bias",
    }
    for own, theirs in heads.items():
        assert torch.equal(found[own], given[theirs])
    assert {name.split(".")[0] for name in kept} >= {"context_proj", "sampling"}
    assert any(".crossattention." in name for name in kept)
    aside, new = said.split("; left aside: ")[1].split("; new: ")
    assert "bert.pooler.*" in aside
    assert "cls.seq_relationship.weight" in aside
    assert "cross-attention" in new
    assert "context_proj.0.weight" in new
    assert "head" not in new


def test_the_text_branch_reads_as_bert_does(bert: Path) -> None:
    fresh = model()
    start(fresh, text_weights=bert)
    ids = torch.randint(5, 128, (2, 9))
    source: Any = BertModel.from_pretrained(bert, add_pooling_layer=False)
    source.eval()
    with torch.no_grad():
        found = fresh.train(False).text(ids, torch.ones_like(ids))
        torch.testing.assert_close(found, source(ids).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_a_bert_without_heads_leaves_the_head_new(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = BertModel(BertConfig(**BERT))
    plain.save_pretrained(tmp_path)
    fresh = model()
    said = start(fresh, text_weights=tmp_path)[0]
    assert torch.equal(fresh.text.table.weight, plain.embeddings.word_embeddings.weight)
    assert "head.0.weight" in said.split("; new: ")[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 99}, r"word_embeddings.weight has the shape \(99, 32\), but \(128, 32\)"),
        ({"num_hidden_layers": 1}, r"it lacks encoder\.layer\.1\."),
        ({"num_hidden_layers": 3}, r"it has encoder\.layer\.2\.\S+, which the model lacks"),
        ({"num_attention_heads": 4}, "it has 4 attention heads, but the model has 2"),
    ],
)
def test_a_bert_of_another_size_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    BertModel(BertConfig(**BERT | change)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        start(model(), text_weights=tmp_path)
    assert "stage1.tokenizer to its tokenizer" in str(error.value)


def test_what_is_no_bert_is_refused(tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a model of type 'vit', expected 'bert'"):
        start(model(), text_weights=tmp_path)
    with pytest.raises(
        ConfigError, match=r"model.text_weights \./nowhere: there is no such folder"
    ):
        start(model(), text_weights="./nowhere")


def test_only_a_new_model_of_stage_1_starts_from_them(tiny_pretraining: Path) -> None:
    folder = ModelRecipe(name=str(tiny_pretraining), encoder_weights="some")
    with pytest.raises(ConfigError, match=r"encoder_weights some: .* has weights"):
        build_pretraining(folder, None)
    with pytest.raises(ConfigError, match="text_weights some: only stage 1 starts from them"):
        build_chat(ModelRecipe(name="tiny", text_weights="some"))


ROPE = "model.options.encoder_config.architecture_options={use_rot_pos_emb: true}"
SIZES = {"b": (86, "86M"), "l": (303, "331M"), "g": (1011, "1.3B")}
"""Millions of parameters of the encoder, and what the paper says."""


@pytest.mark.parametrize(
    ("size", "overrides", "rotates"),
    [("b", [], False), ("b", [ROPE], True), ("l", [], False), ("g", [], False)],
)
def test_the_recipes_name_weights_that_fit(
    size: str, overrides: list[str], rotates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size, without numbers: the tensors that timm and transformers would load."""
    recipe = load_recipe(Stage1Run, RECIPES / f"mico-{size}-stage1.yaml", overrides).model
    assert recipe.encoder_weights in timm.list_pretrained()
    assert recipe.text_weights == "google-bert/bert-base-uncased"
    create = timm.create_model

    def without_numbers(name: str, pretrained: bool) -> nn.Module:
        return create(name, pretrained=False)

    def bert_without_numbers(name: str, **_: Any) -> Any:
        return BertForMaskedLM(BertConfig()), {"missing_keys": [], "unexpected_keys": []}

    with torch.device("meta"):
        whole = MicoForPretraining(pretraining_config(recipe, MicoTextConfig()))
        monkeypatch.setattr(timm, "create_model", without_numbers)
        monkeypatch.setattr(starts, "read_part", lambda *_: BertConfig())
        monkeypatch.setattr(BertForMaskedLM, "from_pretrained", bert_without_numbers)
        said = start_from(whole, recipe)
    assert len(said) == 2
    vit: Any = whole.encoder.vit
    assert (vit.rope is not None) == rotates
    assert vit.pos_embed.requires_grad, "E_Pos is learnt (3.3)"
    assert whole.media_sampling is not None
    assert isinstance(whole.media_projection, nn.Sequential)
    n, papers = SIZES[size]
    assert round(sum(p.numel() for p in whole.encoder.parameters()) / 1e6) == n
    text = (RECIPES.parents[1] / "docs/training.md").read_text()
    assert f"| ViT-{size.replace('b', 'B').replace('l', 'L')} | {papers} | {n:,} M |" in text


@pytest.mark.parametrize("size", ["b", "l", "g"])
def test_the_recipes_attention_knows_no_places(size: str) -> None:
    """A shallow ViT of the recipe without its table of positions sees a bag of patches."""
    recipe = load_recipe(Stage1Run, RECIPES / f"mico-{size}-stage1.yaml").model
    config = pretraining_config(recipe, MicoTextConfig()).encoder_config
    small = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    config.architecture_options = (config.architecture_options or {}) | small
    config.image_size, patch = 2 * config.patch_size, config.patch_size
    torch.manual_seed(0)
    encoder = OmniEncoder(config).train(False)
    nn.init.zeros_(cast(Any, encoder.vit).pos_embed)
    top, bottom = torch.randn(1, 3, 2 * patch, 2 * patch).split(patch, 2)
    with torch.no_grad():
        up, down = (encoder(torch.cat(x, 2)) for x in ((top, bottom), (bottom, top)))
    torch.testing.assert_close(up[:, [0, 3, 4, 1, 2]], down)


def test_weights_give_their_positions_only_to_a_model_with_e_pos(eva: Path) -> None:
    fresh = model(position=False)
    assert "left aside: pos_embed, head.weight, head.bias" in start(fresh, encoder_weights=eva)[0]
    assert "pos_embed" not in fresh.encoder.vit.state_dict()


@pytest.mark.slow
def test_weights_that_rotated_learn_anew_without_it_only_at_the_whole_rate() -> None:
    """Why mico-b and mico-l have one learning rate: a ViT of EVA-02's build that knows digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    pictures = torch.tensor(digits.images / 8 - 1).float().unsqueeze(1)
    pictures = nn.functional.interpolate(pictures, (16, 16), mode="bilinear").expand(-1, 3, -1, -1)
    names, size = torch.tensor(digits.target), {"depth": 4, "embed_dim": 32, "num_heads": 2}
    shape: dict[str, Any] = {"img_size": 16, "patch_size": 4, "ref_feat_shape": (4, 4)}

    def tuned(steps: int, lr: float, rotates: bool = False, of: Any = None) -> tuple[Any, float]:
        vit: Any = timm.create_model(
            "eva02_base_patch16_clip_224", num_classes=10, use_rot_pos_emb=rotates, **shape | size
        )
        vit.load_state_dict(of or vit.state_dict())
        optimizer = torch.optim.AdamW(vit.parameters(), lr=lr)
        for _ in range(steps):
            chosen = torch.randint(1400, (64,))
            nn.functional.cross_entropy(vit(pictures[chosen]), names[chosen]).backward()
            nn.utils.clip_grad_norm_(vit.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            right = vit(pictures[1400:]).argmax(1) == names[1400:]
        return vit.state_dict(), float(right.float().mean())

    torch.manual_seed(0)
    weights, known = tuned(250, 3e-3, rotates=True)
    _, at_once = tuned(0, 3e-3, of=weights)
    _, slowly = tuned(60, 3e-3 / 200, of=weights)
    _, wholly = tuned(60, 3e-3, of=weights)
    _, new = tuned(60, 3e-3)
    print(*(f"{100 * share:.0f}" for share in (known, at_once, slowly, wholly, new)))
    assert known > wholly > max(at_once, slowly, new) + 0.2

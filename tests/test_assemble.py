"""An encoder and any language model make a chat model; what does not fit is said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ViTConfig

from mico_chat.checkpoints.assemble import assemble, set_options
from mico_chat.checkpoints.folders import PREPROCESSING_FILE
from mico_chat.checkpoints.load import has_text_branch, load_chat, load_encoder, load_pretraining
from mico_chat.cli import main as cli
from mico_chat.errors import ConfigError, MicoError, ModelError
from mico_chat.messages import Message
from mico_chat.model.config import MicoBridgeConfig, MicoChatConfig, MicoConfig, MicoEncoderConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from tests.tiny import (
    SIDE,
    captions,
    chat_model,
    letters,
    llm_folder,
    picture,
    pretraining_model,
    processor_for,
    shown,
)
from tests.vicuna import VOCABULARY, pickle_weights, vicuna_folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    pretraining_model().save_pretrained(folder)
    letters().save_pretrained(folder)
    content = Preprocessing(image_size=SIDE, max_slices=4).model_dump_json()
    (folder / PREPROCESSING_FILE).write_text(content)
    return folder


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = vicuna_folder(tmp_path_factory.mktemp("llm") / "vicuna-7b-v1.5")
    pickle_weights(folder)
    return folder


def config_of(folder: Path) -> MicoChatConfig:
    config = MicoChatConfig.from_pretrained(folder)
    assert isinstance(config, MicoChatConfig)
    return config


def bridge_of(folder: Path) -> MicoBridgeConfig:
    bridge = config_of(folder).bridge_config
    assert isinstance(bridge, MicoBridgeConfig)
    return bridge


def test_stage_1_and_a_vicuna_make_a_model(stage1: Path, vicuna: Path, tmp_path: Path) -> None:
    folder = assemble(stage1, str(vicuna), tmp_path / "deep" / "chat")
    model, processor = load_chat(folder, dtype="float32")
    pretrained = MicoForPretraining.from_pretrained(stage1)
    for part in ("encoder", "context"):
        ours, theirs = (getattr(m, part).state_dict() for m in (model, pretrained))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert model.concepts is not None
    tokenizer = AutoTokenizer.from_pretrained(vicuna)
    names = tokenizer(" cat", add_special_tokens=False).input_ids
    assert model.concepts.name_ids[0, : len(names)].tolist() == names
    table = LlamaForCausalLM.from_pretrained(vicuna).model.embed_tokens.weight.detach()
    assert model.bridge.scale.item() == pytest.approx(table.float().std().item(), rel=1e-5)
    assert processor.preprocessing["image_size"] == SIDE
    ids, _ = processor.tokenize([Message.user("Hi")], True)
    text = str(processor.tokenizer.decode(ids))
    assert text.startswith("<s> A chat between")
    assert text.endswith("USER: Hi ASSISTANT:")
    answer = model.generate(**processor([[shown(picture(), "What?")]]), max_new_tokens=3)
    assert answer.shape[1] <= 3
    # The folder has no weights of the language model's; its path means the same from everywhere.
    assert config_of(folder).base_llm == str(vicuna.resolve())
    assert not list(folder.glob("**/pytorch_model*"))
    assert load_encoder(folder)[0].get_input_embeddings().weight.shape == (VOCABULARY, 64)
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"chat"}


def test_the_text_branch_stays_beside(stage1: Path, vicuna: Path, tmp_path: Path) -> None:
    folder = assemble(stage1, str(vicuna), tmp_path / "chat")
    assert has_text_branch(folder)
    branch, tokenizer = load_pretraining(folder)
    pretrained = MicoForPretraining.from_pretrained(stage1).train(False)
    torch.testing.assert_close(branch.encode_text(*captions()), pretrained.encode_text(*captions()))
    assert len(tokenizer) == len(letters())
    again = assemble(folder, str(vicuna), tmp_path / "again")
    assert has_text_branch(again), "an assembled model's encoder brings it too"


def test_the_encoder_of_a_chat_model(vicuna: Path, tmp_path: Path) -> None:
    chat = chat_model()
    chat.save_pretrained(tmp_path / "old")
    config = chat.config
    assert isinstance(config, MicoChatConfig)
    processor_for(config).save_pretrained(tmp_path / "old")
    folder = assemble(tmp_path / "old", str(vicuna), tmp_path / "new")
    model, processor = load_encoder(folder, dtype="float32")
    for name, value in chat.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    assert processor.preprocessing["image_size"] == SIDE
    assert not has_text_branch(folder)


def test_without_a_tokenizer_there_is_no_text_branch(vicuna: Path, tmp_path: Path) -> None:
    pretraining_model().save_pretrained(tmp_path / "stage1")
    assert not has_text_branch(assemble(tmp_path / "stage1", str(vicuna), tmp_path / "chat"))


def test_a_bridge_by_default_fits_and_may_be_given(
    stage1: Path, vicuna: Path, tmp_path: Path
) -> None:
    bridge = bridge_of(assemble(stage1, str(vicuna), tmp_path / "default"))
    assert (bridge.hidden_size, bridge.num_heads) == (32, 1), "as wide as the encoder"
    assert (bridge.n_still, bridge.frame_grid) == (32, 1), "MiCo-Chat's context tokens"
    options = {"bridge.hidden_size": 48, "bridge_config.num_heads": 4, "bridge.still_grid": 2}
    bridge = bridge_of(assemble(stage1, str(vicuna), tmp_path / "given", options=options))
    assert (bridge.hidden_size, bridge.num_heads, bridge.still_grid) == (48, 4, 2)
    processor = MicoChatProcessor.from_pretrained(tmp_path / "given")
    assert processor.still_tokens == config_of(tmp_path / "given").context_length("image", 1)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(32, (32, 1)), (384, (384, 6)), (768, (768, 12)), (1024, (1024, 16)), (1408, (1024, 16))],
)
def test_widths_of_bridges(width: int, expected: tuple[int, int]) -> None:
    from mico_chat.checkpoints.assemble import _bridge

    bridge = _bridge(width)
    assert (bridge.hidden_size, bridge.num_heads) == expected


def test_options_keep_their_types() -> None:
    config = MicoChatConfig.named("mico-g-vicuna-7b")
    set_options(config, {"bridge.depth": 2, "encoder.mlp_ratio": 4, "encoder.stem": "a"})
    encoder = config.encoder_config
    assert isinstance(encoder, MicoEncoderConfig)
    assert (encoder.mlp_ratio, encoder.stem) == (4, "a")
    for path, value, why in (
        ("bridge.width", 1, "lacks 'bridge.width'"),
        ("nothing.at.all", 1, r"lacks 'nothing\.at\.all'"),
        ("bridge.depth.more", 1, "lacks 'bridge.depth.more'"),
        (
            "bridge.depth",
            "two",
            "expected a value of type int, like the present value 2, but got 'two'",
        ),
        ("bridge.depth", True, "expected a value of type int"),
        ("bridge.depth", 2.5, "expected a value of type int"),
    ):
        with pytest.raises(ConfigError, match=why):
            set_options(config, {path: value})


# --- what cannot be assembled -------------------------------------------------------------------


def vit(folder: Path) -> Path:
    ViTConfig().save_pretrained(folder)
    return folder


def without_tokenizer(folder: Path) -> Path:
    vicuna_folder(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def without_template(folder: Path) -> Path:
    llm_folder(folder)
    for file in folder.glob("*.jinja"):
        file.unlink()
    return folder


def without_weights(folder: Path) -> Path:
    vicuna_folder(folder)
    (folder / "model.safetensors").unlink()
    return folder


def too_many_tokens(folder: Path) -> Path:
    vicuna_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (vit, "a model of type 'vit' is not a causal language model"),
        (without_tokenizer, "the tokenizer cannot be read"),
        (without_template, "its tokenizer lacks a chat template"),
        (without_weights, r"no model\.safetensors or pytorch_model\.bin with the token table"),
        (too_many_tokens, "449 tokens, but the model has 448 token vectors"),
        (empty, "the configuration cannot be read"),
        (lambda folder: folder, "the configuration cannot be read"),
    ],
)
def test_a_language_model_that_is_none(
    stage1: Path, tmp_path: Path, make: Callable[[Path], Path], why: str
) -> None:
    with pytest.raises(ModelError, match=why) as caught:
        assemble(stage1, str(make(tmp_path / "given")), tmp_path / "chat")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chat").exists()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            vit,
            "'vit'; an encoder is read from a model of type 'mico' .stage 1. or 'mico_chat'",
        ),
        (empty, "no config.json there; is it a model folder"),
        (lambda folder: folder, "no such folder"),
    ],
)
def test_an_encoder_that_is_none(
    vicuna: Path, tmp_path: Path, make: Callable[[Path], Path], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        assemble(make(tmp_path / "encoder"), str(vicuna), tmp_path / "chat")


def test_a_chat_model_is_no_language_model(stage1: Path, vicuna: Path, tmp_path: Path) -> None:
    folder = assemble(stage1, str(vicuna), tmp_path / "chat")
    with pytest.raises(ModelError, match="'mico_chat' is not a causal language model"):
        assemble(stage1, str(folder), tmp_path / "other")


def test_nothing_is_written_over(stage1: Path, vicuna: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assemble(stage1, str(vicuna), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for there in ("empty", "file"):
        with pytest.raises(ConfigError, match=f"{there}: it is there already"):
            assemble(stage1, str(vicuna), tmp_path / there)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bridge.hidden_size": 30, "bridge.num_heads": 4}, "30 is not a multiple of .* 4"),
        ({"bridge.depth": 0}, r"bridge\.depth 0 is less than 1"),
        ({"bridge.num_heads": 0}, "not a multiple of"),
    ],
)
def test_a_bridge_that_cannot_be(
    stage1: Path, vicuna: Path, tmp_path: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        assemble(stage1, str(vicuna), tmp_path / "chat", options=options)


def test_a_plain_vit_keeps_its_own_preprocessing(vicuna: Path, tmp_path: Path) -> None:
    config = MicoConfig.tiny(concepts=False)
    config.encoder_config = MicoEncoderConfig(
        architecture="vit_tiny_patch16_224", image_size=64, patch_size=16
    )
    MicoForPretraining(config).save_pretrained(tmp_path / "stage1")
    folder = assemble(tmp_path / "stage1", str(vicuna), tmp_path / "chat")
    processor = MicoChatProcessor.from_pretrained(folder)
    assert processor.preprocessing == json.loads(Preprocessing(image_size=64).model_dump_json())


# --- the command --------------------------------------------------------------------------------


def test_the_command(stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = llm_folder(tmp_path / "llm")
    arguments = ["assemble", "--encoder", str(stage1), "--llm", str(llm)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--output", str(tmp_path / "chat"), "--set", "bridge.depth=2"])
    assert ended.value.code == 0
    assert f"{tmp_path / 'chat'}: next" in capsys.readouterr().out
    assert bridge_of(tmp_path / "chat").depth == 2
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--output", str(tmp_path / "b"), "--chat-template", str(template)])
    ids, _ = MicoChatProcessor.from_pretrained(tmp_path / "b").tokenize([Message.user("Hi")], True)
    assert letters().convert_ids_to_tokens(ids) == list("[Hi]")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--output", str(tmp_path / "b")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wide_language_model_meets_its_bridge(stage1: Path, tmp_path: Path) -> None:
    llm = vicuna_folder(tmp_path / "vicuna")
    config = LlamaConfig.from_pretrained(llm)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 96, 4, 4
    config.head_dim = 24
    LlamaForCausalLM(config).save_pretrained(llm)  # by its folder's name it is a Vicuna still
    model, _ = load_encoder(
        assemble(stage1, str(llm), tmp_path / "chat", chat_template="vicuna_v1.1")
    )
    assert model.bridge.proj_out.out_features == 96


def test_errors_are_the_projects(stage1: Path, vicuna: Path, tmp_path: Path) -> None:
    with pytest.raises(MicoError, match="chat template 'nope'"):
        assemble(stage1, str(vicuna), tmp_path / "chat", chat_template="nope")

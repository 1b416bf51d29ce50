"""An encoder and any language model make a chat model; what does not fit is said in one line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, ViTConfig

from mico_chat.checkpoints.assemble import _bridge, assemble, build, read_encoder, set_options
from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.load import has_text_branch, load_chat, load_encoder, load_pretraining
from mico_chat.errors import ConfigError, ModelError
from mico_chat.messages import Message
from mico_chat.model.config import MicoChatConfig, MicoConfig, MicoEncoderConfig
from mico_chat.model.mini.things import WORDS
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from tests.support.tiny import (
    SIDE,
    captions,
    chat_model,
    command,
    letters,
    llm_folder,
    picture,
    saved,
    shown,
    stage1_folder,
)
from tests.support.vicuna import VOCABULARY, pickle_weights, vicuna_folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage1_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = vicuna_folder(tmp_path_factory.mktemp("llm") / "vicuna-7b-v1.5")
    pickle_weights(folder)
    return folder


def test_things_speak_in_the_language_models_words(vicuna: Path) -> None:
    config = MicoChatConfig.tiny()
    config.bridge_config.things = 2
    assert config.concept_config is not None
    config.concept_config.colours = True
    config.base_llm = str(vicuna)
    llm = LlamaForCausalLM.from_pretrained(vicuna)
    config.llm_config = llm.config
    model, _ = build(config, llm)
    tokenizer = AutoTokenizer.from_pretrained(vicuna)
    words = [word for words in WORDS.values() for word in words]
    last = [tokenizer(f" {word}", add_special_tokens=False).input_ids[-1] for word in words]
    assert model.thing_words.word_ids.tolist() == last


@pytest.fixture(scope="module")
def assembled(stage1: Path, vicuna: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(stage1, str(vicuna), tmp_path_factory.mktemp("chats") / "deep" / "chat")


def test_stage_1_and_a_vicuna_make_a_model(stage1: Path, vicuna: Path, assembled: Path) -> None:
    folder = assembled
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
    assert processor.preprocessing.image_size == SIDE
    ids, _ = processor.tokenize([Message.user("Hi")], True)
    text = str(processor.tokenizer.decode(ids))
    assert text.startswith("<s> A chat between")
    assert text.endswith("USER: Hi ASSISTANT:")
    answer = model.generate(**processor([[shown(picture(), "What?")]]), max_new_tokens=3)
    assert answer.shape[1] <= 3
    assert chat_config(folder).base_llm == str(vicuna.resolve())
    assert not list(folder.glob("**/pytorch_model*"))
    assert load_encoder(folder)[0].get_input_embeddings().weight.shape == (VOCABULARY, 64)
    assert {p.name for p in folder.parent.iterdir()} == {"chat"}


def test_the_text_branch_stays_beside(
    stage1: Path, vicuna: Path, assembled: Path, tmp_path: Path
) -> None:
    assert has_text_branch(assembled)
    branch, tokenizer = load_pretraining(assembled)
    pretrained = MicoForPretraining.from_pretrained(stage1).train(False)
    torch.testing.assert_close(branch.encode_text(*captions()), pretrained.encode_text(*captions()))
    assert len(tokenizer) == len(letters())
    again = assemble(assembled, str(vicuna), tmp_path / "again")
    assert has_text_branch(again), "an assembled model's encoder brings it too"


def test_the_encoder_of_a_chat_model(vicuna: Path, tmp_path: Path) -> None:
    chat = chat_model()
    folder = assemble(saved(tmp_path / "old", chat), str(vicuna), tmp_path / "new")
    model, processor = load_encoder(folder, dtype="float32")
    for name, value in chat.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
    assert processor.preprocessing.image_size == SIDE
    assert not has_text_branch(folder)


def test_a_bridge_by_default_fits_and_may_be_given(
    stage1: Path, vicuna: Path, assembled: Path, tmp_path: Path
) -> None:
    bridge = chat_config(assembled).bridge_config
    assert (bridge.hidden_size, bridge.num_heads) == (32, 1), "as wide as the encoder"
    assert (bridge.n_still, bridge.frame_grid) == (32, 1), "MiCo-Chat's context tokens"
    options = {"bridge.hidden_size": 48, "bridge_config.num_heads": 4, "bridge.still_grid": 2}
    given = assemble(stage1, str(vicuna), tmp_path / "given", options=options)
    bridge = chat_config(given).bridge_config
    assert (bridge.hidden_size, bridge.num_heads, bridge.still_grid) == (48, 4, 2)
    processor = MicoChatProcessor.from_pretrained(given)
    assert processor.still_tokens == chat_config(given).context_length("image", 1)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(32, (32, 1)), (384, (384, 6)), (768, (768, 12)), (1024, (1024, 16)), (1408, (1024, 16))],
)
def test_widths_of_bridges(width: int, expected: tuple[int, int]) -> None:
    bridge = _bridge(width)
    assert (bridge.hidden_size, bridge.num_heads) == expected


# --- refused ------------------------------------------------------------------------------------


def test_options_keep_their_types() -> None:
    config = MicoChatConfig.named("mico-g-vicuna-7b")
    set_options(config, {"bridge.depth": 2, "encoder.mlp_ratio": 4, "encoder.stem": "a"})
    assert (config.encoder_config.mlp_ratio, config.encoder_config.stem) == (4, "a")
    wanted = "expected a value of type int, like the present value 2, but got"
    for path, value, why in (
        ("bridge.width", 1, "lacks 'bridge.width'"),
        ("nothing.at.all", 1, r"lacks 'nothing\.at\.all'"),
        ("bridge.depth.more", 1, "lacks 'bridge.depth.more'"),
        ("bridge.depth", "two", f"{wanted} 'two'"),
        ("bridge.depth", True, wanted),
        ("bridge.depth", 2.5, wanted),
    ):
        with pytest.raises(ConfigError, match=why):
            set_options(config, {path: value})


def without(make: Callable[[Path], Any], files: str, folder: Path) -> None:
    make(folder)
    for file in folder.glob(files):
        file.unlink()


def too_many_tokens(folder: Path) -> None:
    vicuna_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


MAKE: dict[str, Callable[[Path], Any]] = {
    "vit": ViTConfig().save_pretrained,
    "chat": MicoChatConfig.tiny().save_pretrained,
    "no tokenizer": partial(without, vicuna_folder, "tokenizer*"),
    "no weights": partial(without, vicuna_folder, "model.safetensors"),
    "no template": partial(without, llm_folder, "chat_template.jinja"),
    "too many tokens": too_many_tokens,
    "empty": Path.mkdir,
    "nothing": Path.as_posix,
}


@pytest.mark.parametrize(
    ("llm", "why"),
    [
        ("vit", "a model of type 'vit' is not a causal language model"),
        ("chat", "'mico_chat' is not a causal language model"),
        ("no tokenizer", "the tokenizer cannot be read"),
        ("no template", "its tokenizer lacks a chat template"),
        ("no weights", r"no model\.safetensors or pytorch_model\.bin with the token table"),
        ("too many tokens", "449 tokens, but the model has 448 token vectors"),
        ("empty", "the configuration cannot be read"),
        ("nothing", "the configuration cannot be read"),
    ],
)
def test_a_wrong_language_model(stage1: Path, tmp_path: Path, llm: str, why: str) -> None:
    MAKE[llm](tmp_path / "given")
    with pytest.raises(ModelError, match=why) as caught:
        assemble(stage1, str(tmp_path / "given"), tmp_path / "chat")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chat").exists()


def test_a_wrong_encoder(tmp_path: Path) -> None:
    for encoder, why in (
        ("vit", "'vit'; an encoder is read from a model of type 'mico' .stage 1. or 'mico_chat'"),
        ("empty", "no config.json there; is it a model folder"),
        ("nothing", "no such folder"),
    ):
        MAKE[encoder](tmp_path / encoder)
        with pytest.raises(ModelError, match=why):
            read_encoder(tmp_path / encoder)


def test_wrong_options_and_nothing_is_written_over(
    stage1: Path, vicuna: Path, tmp_path: Path
) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"options": {"bridge.hidden_size": 30, "bridge.num_heads": 4}}, "30 is not a multiple"),
        ({"options": {"bridge.depth": 0}}, r"bridge\.depth 0 is less than 1"),
        ({"options": {"bridge.num_heads": 0}}, "not a multiple of"),
        ({"chat_template": "nope"}, "chat template 'nope'"),
    ]
    for given, why in wrong:
        with pytest.raises(ConfigError, match=why):
            assemble(stage1, str(vicuna), tmp_path / "chat", **given)
    assert not (tmp_path / "chat").exists()
    (tmp_path / "empty").mkdir()
    assemble(stage1, str(vicuna), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for there in ("empty", "file"):
        with pytest.raises(ConfigError, match=f"{there}: it is there already"):
            assemble(stage1, str(vicuna), tmp_path / there)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plain_vit_keeps_its_own_preprocessing(vicuna: Path, tmp_path: Path) -> None:
    config = MicoConfig.tiny(concepts=False)
    config.encoder_config = MicoEncoderConfig(
        architecture="vit_tiny_patch16_224", image_size=64, patch_size=16
    )
    MicoForPretraining(config).save_pretrained(tmp_path / "stage1")
    folder = assemble(tmp_path / "stage1", str(vicuna), tmp_path / "chat")
    processor = MicoChatProcessor.from_pretrained(folder)
    assert processor.preprocessing == Preprocessing(image_size=64)
    assert not has_text_branch(folder), "stage 1 had no tokenizer"


# --- the command --------------------------------------------------------------------------------


def test_the_command(stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = llm_folder(tmp_path / "llm")
    arguments = ("assemble", "--encoder", str(stage1), "--llm", str(llm))
    command(*arguments, "--output", str(tmp_path / "chat"), "--set", "bridge.depth=2")
    assert f"{tmp_path / 'chat'}: next" in capsys.readouterr().out
    assert chat_config(tmp_path / "chat").bridge_config.depth == 2
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    command(*arguments, "--output", str(tmp_path / "b"), "--chat-template", str(template))
    ids, _ = MicoChatProcessor.from_pretrained(tmp_path / "b").tokenize([Message.user("Hi")], True)
    assert letters().convert_ids_to_tokens(ids) == list("[Hi]")
    capsys.readouterr()
    command(*arguments, "--output", str(tmp_path / "b"), code=2)
    assert capsys.readouterr().err.count("\n") == 1

"""The table of what ``assemble`` takes: families of language models and ViTs, as tiny replicas."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from mico_chat.checkpoints.assemble import assemble
from mico_chat.checkpoints.load import load_chat, load_encoder
from mico_chat.checkpoints.pretrained import merge
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import ModelError
from mico_training.build_model import add_lora, build_chat
from mico_training.recipe import LoraRecipe, ModelRecipe
from tests.engine.tiny_llm import answer
from tests.support.tiny import letters, llm_folder, picture, saved, shown, stage1_folder

LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 8}
LLMS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "olmo2", "smollm3", "starcoder2"), LLAMA),
    **dict.fromkeys(("phi", "stablelm"), LLAMA | {"num_key_value_heads": 2}),
    "qwen3": LLAMA | {"head_dim": 16},
    "mixtral": LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "granite": LLAMA | {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "cohere": LLAMA | {"logit_scale": 0.5},
    "gemma2": GEMMA | {"final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "gpt_neox": LLAMA,
    "opt": LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "falcon": LLAMA | {"alibi": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
}
ALONE = ("bloom",)
"""Families that the engine does not batch."""

SMALL = {"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 2}
VITS = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    *("beit_base_patch16_224", "eva_giant_patch14_clip_224", "eva02_tiny_patch14_224"),
    *("vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224", "cait_xxs24_224"),
    *(
        "vit_base_patch16_clip_224",
        "vit_relpos_small_patch16_224",
        "vit_base_patch16_siglip_gap_224",
    ),
)
REFUSED = {
    "resnet18": {},
    "samvit_base_patch16": SMALL,
    "swin_tiny_patch4_window7_224": {"img_size": 64},
}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage1_folder(tmp_path_factory.mktemp("encoder"))


def language_model(family: str, folder: Path) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=128, **LLMS[family])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    llm = AutoModelForCausalLM.from_config(config)
    for weight in llm.parameters():  # sharper than new, so that answers differ
        torch.nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else None
    llm.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def said(model: Any, given: Any) -> list[int]:
    tokens: list[int] = model.generate(**given, max_new_tokens=6, do_sample=False)[0].tolist()
    return tokens


@pytest.mark.parametrize("family", LLMS)
def test_any_language_model(family: str, stage1: Path, tmp_path: Path) -> None:
    """Its vectors, loss, adapter, merged and saved weights, and the engine's answer are its own."""
    llm = language_model(family, tmp_path / "llm")
    folder = assemble(stage1, str(llm), tmp_path / "chat")
    chat = build_chat(ModelRecipe(name=str(folder)))
    model: Any = chat.model
    ids = torch.arange(20)
    vectors = model.get_input_embeddings()(ids)
    table: Any = load_encoder(folder, "float32")[0].get_input_embeddings()
    torch.testing.assert_close(table(ids), vectors)
    assert model.bridge.scale.item() == pytest.approx(vectors.std().item(), rel=0.2)

    given = chat.processor([[shown(picture(), "What is it?")]])
    labels = given["input_ids"].masked_fill(given["input_ids"] >= 100, -100)
    media = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
    embeds = model.embed_prompt(given["input_ids"], media)
    own = model.llm(inputs_embeds=embeds, attention_mask=given["attention_mask"], labels=labels)
    torch.testing.assert_close(model(**given, labels=labels).loss, own.loss)

    plain = model(**given).logits
    add_lora(model, LoraRecipe(r=2))
    assert isinstance(model.llm, PeftModel)
    for name, weight in model.llm.named_parameters():
        torch.nn.init.normal_(weight, std=0.5) if "lora_B" in name else None
    tuned, answered = model.eval()(**given).logits, said(model, given)
    assert (tuned - plain).abs().max() > 0.1
    chat.save(tmp_path / "tuned")
    for place in (tmp_path / "tuned", merge(tmp_path / "tuned", tmp_path / "merged")):
        loaded, _ = load_chat(place, "float32")
        torch.testing.assert_close(loaded(**given).logits, tuned, atol=1e-3, rtol=1e-3)
        assert said(loaded, given) == answered
    if family in ALONE:
        with pytest.raises(ModelError, match=f"{family}: it takes no positions"):
            TransformersModel(loaded.llm)
    else:
        words = tuple(given["input_ids"][given["input_ids"] < 100].tolist())
        batch = TransformersModel(loaded.llm, n_slots=2)
        prompt = torch.tensor([words])
        text = said(loaded, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
        assert answer(batch, [Prompt((words,))], GenerationOptions(max_tokens=6)) == [text]


def vit(name: str, folder: Path, **options: Any) -> Any:
    torch.manual_seed(1)
    made: Any = timm.create_model(name, num_classes=3, **options).eval()
    timm.models.save_for_hf(made, str(folder), safe_serialization=True)
    return made


@pytest.mark.parametrize("name", VITS)
def test_any_vit_of_timm(name: str, tmp_path: Path) -> None:
    options = SMALL | ({"img_size": 56} if "patch14" in name else {})
    made = vit(name, tmp_path / "vit", **options)
    folder = assemble(tmp_path / "vit", str(llm_folder(tmp_path / "llm")), tmp_path / "chat")
    model, processor = load_chat(folder, "float32")
    assert processor.preprocessing.image_mean == made.pretrained_cfg["mean"]
    given = processor([[shown(picture(), "What is it?")]])
    with torch.no_grad():
        tokens = made.forward_features(given["pixel_values"])
        torch.testing.assert_close(model.encoder(given["pixel_values"]), tokens)
    again, _ = load_chat(saved(tmp_path / "again", model), "float32")
    assert said(again, given) == said(model, given)


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_tokens_is_refused(name: str, tmp_path: Path) -> None:
    vit(name, tmp_path / "cnn", **REFUSED[name])
    with pytest.raises(ModelError, match="cnn: ") as error:
        assemble(tmp_path / "cnn", str(llm_folder(tmp_path / "llm")), tmp_path / "chat")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "chat").exists()

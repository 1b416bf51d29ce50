"""Each stage from its recipe, end to end, on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.stages import train_stage1, train_stage2, train_stage3


def write_recipe(folder: Path, shards: Path, model: Path | dict[str, Any], **sections: Any) -> Path:
    """A recipe of a few steps whose output is ``folder/out``."""
    content: dict[str, Any] = {
        "model": str(model) if isinstance(model, Path) else model,
        "output": str(folder / "out"),
        "data": [{"path": str(shards / "train-*.tar")}],
        "train": {
            "lr": 1e-3,
            "steps": 4,
            "batch_size": 4,
            "save_steps": 2,
            "log_steps": 1,
            "arguments": {"use_cpu": True, "disable_tqdm": True},
        },
    }
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]


def test_stage_1_logs_every_objective_and_leaves_a_model(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        shards,
        tiny_pretraining,
        features={"cache": str(tmp_path / "features")},
        stage1={"cross_corpus": 0.3, "weights": {"matching": 0.5}},
    )
    train_stage1(recipe)
    history = logged(tmp_path)
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    for entry in history:
        objectives = ("contrastive", "matching", "caption", "tagging", "region", "concept")
        parts = [entry[f"{name}_loss"] for name in objectives]
        assert all(math.isfinite(part) for part in parts)
        total = parts[0] + 0.5 * parts[1] + sum(parts[2:])
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    before = MicoForPretraining.from_pretrained(tiny_pretraining).state_dict()
    after = MicoForPretraining.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("encoder.vit") for name in moved)
    assert not any(name.startswith("encoder.stem") for name in moved)


def test_features_change_no_loss(tmp_path: Path, shards: Path, tiny_pretraining: Path) -> None:
    histories = []
    for name, features in (("pixels", {}), ("cached", {"cache": str(tmp_path / "features")})):
        folder = tmp_path / name
        folder.mkdir()
        sections: dict[str, Any] = {"features": features} if features else {}
        recipe = write_recipe(folder, shards, tiny_pretraining, **sections)
        train_stage1(recipe, ["train.freeze=[encoder.stem]", "train.steps=2"])
        histories.append([entry["loss"] for entry in logged(folder)])
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)


def test_stage_2_trains_the_bridge_alone_and_checkpoints_hold_no_more(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    train_stage2(write_recipe(tmp_path, shards, tiny_chat))
    before = MicoChatForConditionalGeneration.from_pretrained(tiny_chat).state_dict()
    after = MicoChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("bridge.") for name in moved)
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert all(name.startswith("bridge.") for name in saved)


def test_an_encoder_of_another_shape_is_refused(
    tmp_path: Path, shards: Path, tiny_chat: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat)
    with pytest.raises(ConfigError, match=r"model\.encoder: context has different shapes"):
        train_stage2(recipe, [f"model.encoder={tiny_pretraining}"])


# PEFT asks transformers for the old name of a property.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_the_stages_follow_each_other(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, tiny_llm: Path
) -> None:
    """Stage 2 on stage 1's encoder and a base LLM that stays where it is, then stage 3 on that."""
    two, three, four = (tmp_path / name for name in ("two", "three", "four"))
    for folder in (two, three, four):
        folder.mkdir()
    model = [
        f"model.llm={tiny_llm}",
        f"model.encoder={tiny_pretraining}",
        "model.llm_dtype=bfloat16",
    ]
    train_stage2(write_recipe(two, shards, Path("tiny")), model)
    encoder = MicoForPretraining.from_pretrained(tiny_pretraining).encoder.state_dict()
    chat = MicoChatForConditionalGeneration.from_pretrained(two / "out")
    for name, value in chat.encoder.state_dict().items():
        assert torch.equal(value, encoder[name]), name
    assert chat.concepts is not None
    assert (chat.concepts.name_ids[0] >= 0).any()
    assert not any(n.startswith("llm.") for n in load_file(two / "out/model.safetensors"))

    train_stage3(write_recipe(three, shards, two / "out"))
    assert (three / "out/lora/adapter_model.safetensors").is_file()
    assert not any(n.startswith("llm.") for n in load_file(three / "out/model.safetensors"))
    tuned = MicoChatForConditionalGeneration.from_pretrained(three / "out").state_dict()
    plain = chat.state_dict()
    moved = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert any(name.startswith("llm.") for name in moved)
    with pytest.raises(ConfigError, match="already has a LoRA"):
        train_stage3(write_recipe(four, shards, three / "out"))


# PEFT asks transformers for the old name of a property.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_stage_3_tunes_bridge_and_lora(tmp_path: Path, shards: Path, tiny_chat: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    talk.write_text(json.dumps({"messages": turns}))
    recipe = write_recipe(
        tmp_path, shards, tiny_chat, stage3={"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}
    )
    content = yaml.safe_load(recipe.read_text())
    content["data"].append({"path": str(talk), "kind": "jsonl"})
    recipe.write_text(yaml.safe_dump(content))
    train_stage3(recipe)
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert any("lora_" in name for name in saved)
    assert all(name.startswith("bridge.") or "lora_" in name for name in saved)
    before = MicoChatForConditionalGeneration.from_pretrained(tiny_chat).state_dict()
    after = MicoChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved if name.startswith("llm.")} == {
        "q_proj",
        "v_proj",
    }


def test_a_finished_run_stays_as_it_is(tmp_path: Path, shards: Path, tiny_chat: Path) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat)
    train_stage2(recipe)
    before = logged(tmp_path)
    train_stage2(recipe)
    assert logged(tmp_path) == before


def test_another_model_in_the_same_output_is_refused(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat)
    train_stage2(recipe)
    with pytest.raises(ConfigError, match="made by another recipe"):
        train_stage2(recipe, ["stage2.trainable=[bridge, context]"])

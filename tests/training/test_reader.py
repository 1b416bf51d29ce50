"""Stage 2 before a small reader instead of the whole language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mico_chat.errors import ConfigError
from mico_chat.modeling import MicoChatForConditionalGeneration
from mico_training import stage2_align
from mico_training.reader import first_layers
from tests.training.test_runs import logged, write_recipe

IDS = torch.tensor([[1, 2, 3, 4]])


def test_all_layers_read_as_the_model_does(tiny_llm: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float32).eval()
    n = llm.config.num_hidden_layers
    reader = first_layers(llm, n).eval()
    with torch.no_grad():
        assert torch.allclose(reader(IDS).logits, llm(IDS).logits, atol=1e-5)
    fewer = first_layers(llm, n - 1)
    assert len(fewer.get_decoder().layers) == n - 1
    assert llm.config.num_hidden_layers == n


def test_what_the_reader_learns_leaves_the_model_alone(tiny_llm: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.bfloat16)
    llm.requires_grad_(False)
    reader = first_layers(llm, 1)
    learns = {name for name, p in reader.named_parameters() if p.requires_grad}
    assert learns
    assert not any("embed" in name or "lm_head" in name for name in learns)
    assert {p.dtype for p in reader.parameters() if p.requires_grad} == {torch.float32}
    before = {name: p.clone() for name, p in llm.named_parameters()}
    with torch.no_grad():
        for p in reader.parameters():
            if p.requires_grad:
                p.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in llm.named_parameters())
    assert not any(p.requires_grad for p in llm.parameters())


def test_more_layers_than_there_are_are_refused(tiny_llm: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(tiny_llm)
    with pytest.raises(ConfigError, match="99 layers, but the language model has"):
        first_layers(llm, 99)


def test_the_stage_keeps_the_bridge_and_drops_the_reader(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    stage = {"objective": "answers", "reader": 1, "max_turns": 2}
    stage2_align.main(write_recipe(tmp_path, shards, tiny_chat, stage2=stage))
    assert [entry["step"] for entry in logged(tmp_path)] == [1, 2, 3, 4]
    before = MicoChatForConditionalGeneration.from_pretrained(tiny_chat).state_dict()
    after = MicoChatForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("bridge.") for name in moved)
    # A checkpoint holds the reader, or a resumed run would start it anew.
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert any(name.startswith("llm.") for name in saved)

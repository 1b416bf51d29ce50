"""Adapters in llama.cpp: a step has one, so they take turns; a PEFT folder is converted."""

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest

from mico_chat.checkpoints.lora import read_lora
from mico_chat.engine.llamacpp import LlamaCppModel
from mico_chat.errors import ModelError
from tests.engine.tiny_llm import answer, exported, generated, prompts, tiny_llm
from tests.support.made_lora import SETTINGS, left_by_twenty, lora_folder, merged


def test_adapters_take_turns_and_answer_as_in_torch(tmp_path: Path) -> None:
    llm = tiny_llm()
    folders = [lora_folder(llm, tmp_path / f"{n}", n, **own) for n, own in enumerate(SETTINGS, 1)]
    model = LlamaCppModel(exported(llm, tmp_path))
    loras = [read_lora(one.name, one, "tiny", ["tiny"]) for one in folders]
    for lora in loras:
        model.loras.load(lora)
    models = [llm, *(merged(llm, folder) for folder in folders)]
    worn = list(zip(prompts(), cycle([None, *loras]), cycle(models)))
    expected = [generated(one, prompt) for prompt, _, one in worn]
    batch = [replace(prompt, lora=lora) for prompt, lora, _ in worn]
    assert answer(model, batch) == expected
    assert len(batch) >= 8
    model.loras.unload(loras[0])
    assert answer(model, [batch[2], batch[0]]) == [expected[2], expected[0]]
    model.loras.load(loras[0])
    assert answer(model, batch) == expected
    deeper = lora_folder(tiny_llm(num_hidden_layers=3), tmp_path / "deeper")
    other = lora_folder(tiny_llm(intermediate_size=48), tmp_path / "other")
    for folder in (deeper, other):
        with pytest.raises(ModelError, match=r"made for tiny.*base"):
            model.loras.load(read_lora("x", folder, "base"))
    model.close()


def test_twenty_in_turn_leave_the_memory_flat(tmp_path: Path) -> None:
    llm = tiny_llm()
    model = LlamaCppModel(exported(llm, tmp_path))
    assert left_by_twenty(model, lora_folder(llm, tmp_path / "large", r=4096)) < 4
    model.close()

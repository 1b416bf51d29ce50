"""Adapters in the engines: many in one batch, what is shared, what is refused, what is freed."""

import gc
from collections.abc import Sequence as Many
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mico_chat.checkpoints.lora import Lora, read_lora
from mico_chat.engine.alone import AloneModel
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Scheduler, Sequence
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import ModelError
from tests.engine.tiny_llm import answer, generated, prompts, text, tiny_llm
from tests.support.made_lora import SETTINGS, left_by_twenty, lora_folder, merged


@pytest.fixture
def llm() -> LlamaForCausalLM:
    return tiny_llm()  # each test hangs its own adapters beside its layers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, llm = tmp_path_factory.mktemp("loras"), tiny_llm()
    return [lora_folder(llm, root / f"{n}", n, **given) for n, given in enumerate(SETTINGS, 1)]


@pytest.fixture(scope="module")
def loras(folders: list[Path]) -> list[Lora]:
    return [read_lora(folder.name, folder, "tiny", ["tiny"]) for folder in folders]


def adapted(llm: Any, folders: Many[Path]) -> list[Any]:
    return [llm, *(merged(llm, folder) for folder in folders)]


def test_a_batch_of_base_and_four_adapters_answers_as_each_alone(
    llm: LlamaForCausalLM, folders: list[Path], loras: list[Lora]
) -> None:
    model, models = TransformersModel(llm), adapted(llm, folders)
    for lora in loras:
        model.loras.load(lora)
    worn = list(zip(prompts(), cycle([None, *loras]), cycle(models)))
    expected = [generated(one, prompt) for prompt, _, one in worn]
    assert answer(model, [replace(prompt, lora=lora) for prompt, lora, _ in worn]) == expected
    assert expected != [generated(llm, prompt) for prompt, _, _ in worn]


def test_a_shared_beginning_is_shared_within_an_adapter_alone(
    llm: LlamaForCausalLM, folders: list[Path], loras: list[Lora]
) -> None:
    model, models = TransformersModel(llm), adapted(llm, folders)
    for lora in loras:
        model.loras.load(lora)
    scheduler = Scheduler(model, (), max_running=4)
    first = text(30)
    for _ in range(2):  # in the second turn each finds its own
        for worn, one in zip([None, *loras], models, strict=True):
            prompt = Prompt((first,), lora=worn, tenant="someone", common=5)
            sequence = Sequence(prompt, GenerationOptions(max_tokens=6))
            scheduler.add(sequence)
            while not scheduler.idle:
                scheduler.step()
            assert sequence.tokens == generated(one, prompt, 6)
            assert sequence.cached == (29 if _ else 0)


def test_loading_and_unloading_twenty_leaves_the_model_as_it_was(
    llm: LlamaForCausalLM, folders: list[Path]
) -> None:
    model = TransformersModel(llm)
    before = [name for name, _ in llm.named_modules()], [*dict(llm.named_parameters())]
    answer(model, [Prompt((text(5),))])
    tensors, most = _tensors(), 0
    for n in range(20):
        lora = read_lora("x", folders[n % 4], "tiny", ["tiny"])
        model.loras.load(lora)
        answer(model, [Prompt((text(5),), lora=lora)])
        most = max(most, sum(len(module._forward_hooks) for module in llm.modules()))
        model.loras.unload(lora)
        del lora
    assert most > 0
    assert _tensors() == tensors
    assert not any(module._forward_hooks for module in llm.modules())
    assert before == ([name for name, _ in llm.named_modules()], [*dict(llm.named_parameters())])


def test_twenty_in_turn_leave_the_memory_flat(llm: LlamaForCausalLM, tmp_path: Path) -> None:
    assert left_by_twenty(TransformersModel(llm), lora_folder(llm, tmp_path, r=4096)) < 4


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_requests_that_run_alone_wear_adapters_too(
    llm: LlamaForCausalLM, folders: list[Path], loras: list[Lora]
) -> None:
    model = AloneModel(llm, lambda prompt: {"input_ids": torch.tensor(prompt.segments)})
    for lora in loras:
        model.loras.load(lora)
    worn = [None, *loras]
    batch = [Prompt((text(9, seed=n),), lora=lora) for n, lora in enumerate(worn)]
    models = adapted(llm, folders)
    expected = [generated(one, prompt) for one, prompt in zip(models, batch, strict=True)]
    assert answer(model, batch) == expected
    model.close()


def test_one_that_goes_on_from_a_merged_adapter_stands_in_for_it(
    llm: LlamaForCausalLM, folders: list[Path]
) -> None:
    model = TransformersModel(merged(llm, folders[0]))
    lora = read_lora("own", folders[2], "mini", ["mini", "tiny"], folders[0])
    model.loras.load(lora)
    batch = [replace(prompt, lora=lora) for prompt in prompts()]
    expected = [generated(merged(llm, folders[2]), prompt) for prompt in batch]
    assert answer(model, batch) == expected


def test_what_does_not_fit_is_refused_with_both_sides(tmp_path: Path) -> None:
    llm, wide = tiny_llm(), tiny_llm()
    wide.model.layers[1].self_attn.q_proj = torch.nn.Linear(48, 32)
    model = TransformersModel(llm)
    cases: list[tuple[dict[str, Any], str, Any]] = [
        ({"base": "org/Other-7B"}, "made for org/Other-7B.*served is tiny", llm),
        ({"target_modules": ["q_proj"]}, r"q_proj reads .*\(48, 32\).*tiny \(32, 32\)", wide),
        ({"use_dora": True}, "use_dora", llm),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.*no matrix", llm),
    ]
    for n, (changes, why, made_of) in enumerate(cases):
        folder = lora_folder(made_of, tmp_path / f"{n}", **changes)
        with pytest.raises(ModelError, match=why) as refused:
            model.loras.load(read_lora("mine", folder, "tiny", ["tiny"]))
        assert "\n" not in str(refused.value)
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="is broken"):
        read_lora("mine", tmp_path / "0", "Other-7B").parts()
    with pytest.raises(ModelError, match="No adapter found"):
        read_lora("mine", tmp_path, "tiny")
    assert not any(module._forward_hooks for module in llm.modules())

"""Counted bytes are those of the model that is really built, quantized and run."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from mico_chat.checkpoints.footprint import (
    GGUF_BITS,
    LiveMemory,
    Serving,
    fake,
    gguf_bytes,
    meta_chat,
    meta_llm,
    module_bytes,
    parameter_count,
    quantize,
    quantized_bytes,
    quantized_layers,
)
from mico_chat.checkpoints.gguf_files import QUANTIZATIONS
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engines.table import ENGINES
from mico_chat.model.config import MicoChatConfig
from tests.engine.tiny_llm import exported
from tests.support.tiny import chat_model

GB = 10**9

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 320}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = LlamaConfig(**SIZES, **HEADS, num_hidden_layers=2, tie_word_embeddings=False)


def held(module: nn.Module) -> int:
    """Bytes of what a module really holds, the state of bitsandbytes' weights included."""
    total = module_bytes(module)
    for parameter in module.parameters():
        tensors = []
        state: Any = parameter.__dict__.get("quant_state")
        if state is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
        scales: Any = parameter.__dict__.get("SCB")
        tensors += [] if scales is None else [scales]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def test_the_parts_are_those_of_the_built_model() -> None:
    needs = Serving.of(meta_chat(MicoChatConfig.tiny()), torch.float32)
    for name, module in chat_model().named_children():
        expected = (sum(parameter.numel() for parameter in module.parameters()), held(module))
        found = (needs.llm_parameters, needs.llm["float32"]) if name == "llm" else needs.parts[name]
        assert found == expected, name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_language_model_is_as_large_as_bitsandbytes_makes_it(
    tmp_path: Path, quantization: Any, double: bool
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options["bnb_4bit_use_double_quant"] = double
    settings = BitsAndBytesConfig(**options)
    real = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=settings
    )
    llm = meta_llm(LLAMA, torch.bfloat16)
    n, plain = parameter_count(llm), module_bytes(llm)
    weights = [layer.weight for layer in quantized_layers(llm)]
    packed = sum(quantized_bytes(weight, quantization, double) for weight in weights)
    assert held(real) == plain - sum(weight.numel() for weight in weights) * 2 + packed
    quantize(llm, quantization)
    assert parameter_count(llm) == n
    assert module_bytes(llm) == held(real) or not double


def test_each_use_and_the_peak_are_told_apart() -> None:
    with torch.device("meta"):
        layer = nn.Linear(1000, 1000, bias=False)
    mode = fake(layer)
    with LiveMemory() as live:
        live.name("layer", layer.parameters())
        with mode:
            x = torch.empty(500, 1000)
        live.name("inputs", [x])
        y = layer(x).relu()
        del x
        assert live.name_others("activations") == 2_000_000
        y.sum().backward()
        live.name("gradients", [parameter.grad for parameter in layer.parameters()])
        del y
    gc.collect()
    peak = live.peak()
    assert peak["layer"] == peak["gradients"] == 4_000_000
    assert peak["inputs"] == 2_000_000  # kept for the weight's gradient
    assert live.flops == 2 * 2 * 500 * 1000 * 1000


def test_a_choice_by_fake_numbers_takes_all_of_them() -> None:
    with torch.device("meta"):
        layer = nn.Linear(4, 4)
    mode = fake(layer)
    with mode:
        x = torch.empty(3, 4)
    with LiveMemory():
        y = layer(x)
        assert bool((y > 0).any())
        assert y[y[:, 0] > 0].shape == (3, 4)
        assert y[torch.tensor([True, False, True])].shape == (2, 4)  # a real mask


def test_the_keys_and_values_are_those_of_the_real_cache() -> None:
    config = MicoChatConfig.tiny()
    config.llm_config = LLAMA
    needs = Serving.of(meta_chat(config), torch.float32)
    llm = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32)
    _, cache = llm(torch.tensor([[1, 2, 3]]), use_cache=True).to_tuple()
    kept = [kv for layer in cache.layers for kv in (layer.keys, layer.values)]
    assert needs.kv_per_token * 3 == sum(kv.numel() * kv.element_size() for kv in kept)


def test_mico_chat_7b() -> None:
    chat = meta_chat(MicoChatConfig.named("mico-g-vicuna-7b"))
    needs = Serving.of(chat, torch.bfloat16)
    assert needs.llm_parameters == 6_738_415_616
    assert needs.llm["bfloat16"] == pytest.approx(13.48 * GB, rel=0.01)
    # Files of this very model that llama.cpp's own tools write.
    assert needs.llm["Q8_0"] == pytest.approx(7.16 * GB, rel=0.01)
    assert needs.llm["Q4_0"] == pytest.approx(3.83 * GB, rel=0.01)
    assert needs.llm["Q4_K_M"] == pytest.approx(4.08 * GB, rel=0.02)
    assert needs.kv_per_token == 2 * 32 * 4096 * 2
    plain = ENGINES["transformers"].total(needs, "bfloat16")
    context = 4096 * needs.kv_per_token
    assert plain - needs.llm["bfloat16"] - needs.beside - context < 0.7 * GB
    assert ENGINES["transformers"].total(needs, "nf4") < 10 * GB < plain
    # llama.cpp has the token table a second time, and logits; its cache is float16.
    more = ENGINES["llamacpp"].total(needs, "Q8_0") - needs.llm["Q8_0"]
    assert more > needs.beside + context + 32000 * 4096 * 2


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("width", "tied"), [(256, True), (96, False)])
def test_a_gguf_files_size(tmp_path: Path, quantization: str, width: int, tied: bool) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    gguf = pytest.importorskip("gguf")
    sizes = SIZES | {"hidden_size": width, "intermediate_size": 2 * width}
    llm_config = LlamaConfig(**sizes, **HEADS, num_hidden_layers=8, tie_word_embeddings=tied)
    llm = AutoModelForCausalLM.from_config(llm_config)
    file = exported(llm, tmp_path, quantization)
    tensors = file.stat().st_size - int(gguf.GGUFReader(file).data_offset)
    # In 4 bit, which tables and layers get a finer type depends on their number.
    rel = 0.1 if quantization.startswith("Q4") else 0.005
    assert gguf_bytes(meta_llm(llm_config), quantization) == pytest.approx(tensors, rel=rel)
    assert set(GGUF_BITS) == set(QUANTIZATIONS)

"""A footprint is that of the model which is then really built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from mico_chat.checkpoints.footprint import LoraSize, kv_bytes_per_token, parts
from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoChatConfig
from tests.tiny import chat_model

LLAMA = LlamaConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def held(module: nn.Module) -> int:
    """Bytes of what a module really holds, the state of bitsandbytes' weights included."""
    total = 0
    for parameter in module.parameters():
        total += parameter.numel() * parameter.element_size()
        state: Any = parameter.__dict__.get("quant_state")
        if state is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        scales: Any = parameter.__dict__.get("SCB")
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return total + sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


def by_name(config: MicoChatConfig, **options: Any) -> dict[str, tuple[int, int]]:
    return {part.name: (part.parameters, part.bytes) for part in parts(config, **options)}


def test_the_parts_are_those_of_the_built_model() -> None:
    model = chat_model()
    found = by_name(MicoChatConfig.tiny(), dtype=torch.float32)
    assert list(found) == ["encoder", "context", "concepts", "bridge", "llm"]
    for name, module in model.named_children():
        n = sum(parameter.numel() for parameter in module.parameters())
        assert found[name] == (n, held(module)), name
    half = by_name(MicoChatConfig.tiny())
    assert half["bridge"][1] * 2 == found["bridge"][1]


def test_the_published_sizes() -> None:
    found = by_name(MicoChatConfig.named("mico-g-vicuna-7b"), quantization="nf4")
    assert 1.0e9 < found["encoder"][0] < 1.3e9
    assert found["llm"][0] == 6_738_415_616
    # 6.48 B weights at 4.127 bits, and 0.26 B of token table and head at 16.
    assert found["llm"][1] == pytest.approx(6.476e9 * 4.127 / 8 + 0.262e9 * 2, rel=1e-3)
    assert kv_bytes_per_token(LlamaConfig(num_hidden_layers=32, hidden_size=4096)) == 524_288


@pytest.mark.parametrize(
    ("quantization", "double", "options"),
    [
        ("nf4", True, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}),
        ("nf4", False, {"load_in_4bit": True, "bnb_4bit_use_double_quant": False}),
        ("int8", True, {"load_in_8bit": True}),
        (None, True, None),
    ],
)
def test_a_quantized_language_model_is_as_large_as_bitsandbytes_makes_it(
    tmp_path: Path, quantization: Any, double: bool, options: dict[str, Any] | None
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    kwargs: dict[str, Any] = {"dtype": torch.bfloat16}
    if options is not None:
        kwargs["quantization_config"] = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **options)
    llm = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    found = by_name(
        MicoChatConfig.tiny(),
        llm_config=LLAMA,
        quantization=quantization,
        double_quantization=double,
    )
    assert found["llm"][1] == held(llm)
    assert llm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert llm.get_output_embeddings().weight.dtype == torch.bfloat16


def test_the_adapter_is_pefts() -> None:
    llm = AutoModelForCausalLM.from_config(LLAMA)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(llm, LoraConfig(r=4, target_modules=targets))
    n = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    found = by_name(MicoChatConfig.tiny(), llm_config=LLAMA, lora=LoraSize(4, tuple(targets)))
    assert found["lora"] == (n, n * 4)
    with pytest.raises(ConfigError, match="lacks the layer 'w_proj'"):
        parts(MicoChatConfig.tiny(), lora=LoraSize(4, ("q_proj", "w_proj")))


def test_the_cache_of_a_token() -> None:
    llm = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32)
    cache: Any = llm.generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    held_by = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    assert kv_bytes_per_token(LLAMA, torch.float32) * 3 == held_by

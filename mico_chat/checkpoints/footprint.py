"""What a model's parts weigh: parameters and bytes, from configs alone, no weight read.

The parts are built on torch's meta device, so the numbers are those of the modules themselves and
not of formulas that follow them about: a 7B model takes a second and no memory. Quantized layers
are counted as bitsandbytes lays them out.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoChatConfig

PartName = Literal["encoder", "context", "concepts", "bridge", "llm", "lora"]
Quantization = Literal["nf4", "int8"]

NF4_BLOCK = 64
"""Weights that share one scale."""
SCALE_BLOCK = 256
"""Scales that share one scale of their own, where they are quantized too."""
CODE_BYTES = 16 * 4
SCALE_CODE_BYTES = 256 * 4 + 4
"""The 256 values of an 8-bit scale, and the scales' mean."""


@dataclass(frozen=True)
class Part:
    """One part of a model; ``bytes`` holds its buffers and the scales of quantized weights too."""

    name: PartName
    parameters: int
    bytes: int


@dataclass(frozen=True)
class LoraSize:
    """An adapter of rank ``r`` on the linear layers whose names end in ``targets``."""

    r: int
    targets: tuple[str, ...]
    dtype: torch.dtype = torch.float32


def parts(
    config: MicoChatConfig,
    llm_config: PreTrainedConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    llm_dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    double_quantization: bool = True,
    lora: LoraSize | None = None,
) -> tuple[Part, ...]:
    """The parts of a chat model, in the order the data take through them.

    Args:
        config: the model's.
        llm_config: its language model's; default: ``config.llm_config``.
        dtype: of everything but the language model.
        llm_dtype: of the language model, or of what of it is not quantized; default: ``dtype``.
        quantization: of the language model's linear layers. Its token table and vocabulary head
            keep ``llm_dtype``.
        double_quantization: whether nf4's scales are quantized as well.
        lora: an adapter beside the language model, not merged into it.

    Raises:
        ConfigError: no layer of the language model has the name of a LoRA target.
    """
    model, llm = meta_chat(config), meta_llm(llm_config or config.llm_config)
    found = [
        Part(cast(PartName, name), _count(module), module_bytes(module, dtype))
        for name, module in model.named_children()
    ]
    size = llm_bytes(llm, llm_dtype or dtype, quantization, double_quantization)
    found.append(Part("llm", _count(llm), size))
    if lora is not None:
        n = _lora_parameters(llm, lora)
        found.append(Part("lora", n, n * lora.dtype.itemsize))
    return tuple(found)


def meta_chat(config: MicoChatConfig) -> MicoChatForConditionalGeneration:
    """The model without its language model, on the meta device."""
    config = copy.deepcopy(config)
    config.base_llm = config.base_llm or "elsewhere"  # so that it is not built here
    with torch.device("meta"), warnings.catch_warnings():
        # A config without names has a head of no rows.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return MicoChatForConditionalGeneration(config)


def meta_llm(config: Any) -> PreTrainedModel:
    """A language model on the meta device."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def module_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a module in a precision; its buffers keep theirs."""
    return _count(module) * dtype.itemsize + _buffer_bytes(module)


def llm_bytes(
    llm: PreTrainedModel,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    double_quantization: bool = True,
) -> int:
    """Bytes of a language model, quantized or not."""
    linear = [] if quantization is None else [layer.weight for layer in quantized_layers(llm)]
    rest = (_count(llm) - sum(weight.numel() for weight in linear)) * dtype.itemsize
    if quantization == "nf4":
        packed = sum(nf4_bytes(weight, double_quantization) for weight in linear)
    else:
        packed = sum(int8_bytes(weight) for weight in linear)
    return rest + packed + _buffer_bytes(llm)


def quantized_layers(llm: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that bitsandbytes replaces: all but the vocabulary head."""
    head = llm.get_output_embeddings()
    return [m for m in llm.modules() if isinstance(m, nn.Linear) and m is not head]


def nf4_bytes(weight: Tensor, double_quantization: bool = True) -> int:
    """Bytes of an nf4 weight: two values a byte, a scale a block, the scales' own scales."""
    blocks = math.ceil(weight.numel() / NF4_BLOCK)
    packed = math.ceil(weight.numel() / 2) + CODE_BYTES
    if not double_quantization:
        return packed + blocks * 4
    return packed + blocks + math.ceil(blocks / SCALE_BLOCK) * 4 + SCALE_CODE_BYTES


def int8_bytes(weight: Tensor) -> int:
    """Bytes of an int8 weight (out, in): a byte a value, a float32 scale a row."""
    return weight.numel() + weight.shape[0] * 4


def kv_bytes_per_token(llm_config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of keys and values that one token of one sequence leaves in the cache."""
    config = llm_config.get_text_config().to_dict()
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]  # none: no groups
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * 2 * heads * width * dtype.itemsize)


def _lora_parameters(llm: nn.Module, lora: LoraSize) -> int:
    n, hit = 0, set()
    for name, module in llm.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in lora.targets:
            n += lora.r * (module.in_features + module.out_features)
            hit.add(last)
    for target in lora.targets:
        if target not in hit:
            raise ConfigError(f"lora.targets: the language model lacks the layer {target!r}")
    return n


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _buffer_bytes(module: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())

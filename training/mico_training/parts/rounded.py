"""Quantization-aware training: a language model learns with the weights that will be served.

A GGUF file of Q4_0 holds blocks of 32 numbers of a row as one step (float16) and 4-bit multiples of
it. Here each linear layer, its adapter merged, computes with what such a file gives back, and the
gradient goes to the weights that are rounded (straight-through). What was trained is saved as it
is, unrounded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ConfigError

BLOCK = 32


def q4_0(weight: Tensor) -> Tensor:
    """Weights (rows, columns) as llama.cpp's Q4_0 holds them; columns are a multiple of 32."""
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    inverse = torch.where(step == 0, 0, 1 / step)
    multiples = (blocks * inverse + 8.5).floor().clamp(0, 15) - 8
    rounded: Tensor = (multiples * step.half().float()).flatten(-2).to(weight.dtype)
    return rounded


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"Q4_0": q4_0}


def round_layers(llm: Any, quantization: str, key: str) -> int:
    """Have the linear layers of a language model compute with rounded weights; gives their number.

    The layer that predicts tokens is left alone, as llama.cpp keeps it finer.

    Raises:
        ConfigError: for a layer with columns that no blocks of 32 hold, or with weights that are
            quantized already; ``key`` of the recipe asked for it.
    """
    rounded = ROUNDINGS[quantization]
    head = llm.get_output_embeddings() if hasattr(llm, "get_output_embeddings") else None
    inside = {id(m.base_layer) for m in llm.modules() if isinstance(m, LoraLinear)}
    layers = [
        (name, layer)
        for name, layer in llm.named_modules()
        if isinstance(layer, LoraLinear) or type(layer) is nn.Linear
        if layer is not head and id(layer) not in inside and "lora_" not in name
    ]
    for name, layer in layers:
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        if type(base) is not nn.Linear:
            kind = type(base).__name__
            raise ConfigError(f"{key} {quantization}: {name} is a {kind}, not a plain linear layer")
        if base.in_features % BLOCK:
            reason = f"{name} has {base.in_features} columns, no multiple of {BLOCK}"
            raise ConfigError(f"{key} {quantization}: {reason}; leave {key} out")
        if isinstance(layer, LoraLinear):
            forward = partial(_merged, layer, rounded)
        elif layer.weight.requires_grad:
            forward = partial(_learning, layer, rounded)
        else:  # once is enough
            layer.register_buffer("rounded", rounded(layer.weight.detach()), persistent=False)
            forward = partial(_frozen, layer)
        setattr(layer, "forward", forward)  # noqa: B010  a method, for mypy
    return len(layers)


def _merged(layer: LoraLinear, rounded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer with its adapters: ``x`` (.., columns) -> (.., rows)."""
    base = cast(nn.Linear, layer.base_layer)
    weight: Tensor = base.weight
    for adapter in () if layer.disable_adapters else layer.active_adapters:
        down, up = (cast(nn.Linear, part[adapter]) for part in (layer.lora_A, layer.lora_B))
        weight = weight + (up.weight @ down.weight * layer.scaling[adapter]).to(weight.dtype)
    return F.linear(x, _straight_through(weight, rounded), base.bias)


def _learning(layer: nn.Linear, rounded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.linear(x, _straight_through(layer.weight, rounded), layer.bias)


def _frozen(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, cast(Tensor, layer.rounded), layer.bias)


def _straight_through(weight: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The rounded weight exactly, with the gradient of the weight."""
    return rounded(weight.detach()) + (weight - weight.detach())

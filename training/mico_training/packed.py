"""A quantized linear layer as the rehearsal of a step sees it: packed weights, unpacked for use.

It does what bitsandbytes' layers do to memory and arithmetic: the weight is unpacked to the input's
precision before each product, forward and backward, and dropped after it. Measured for nf4 on a CPU
(benchmarks/results/training-memory.md); int8 and GPUs are not.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mico_chat.checkpoints.footprint import Quantization, int8_bytes, nf4_bytes, quantized_layers


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n_out: int) -> Tensor:
        ctx.shape = (n_out, x.shape[-1])
        unpacked = x.new_empty(ctx.shape)
        return nn.functional.linear(x, unpacked)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        unpacked = gradient.new_empty(ctx.shape)
        return gradient @ unpacked, None


class PackedLinear(nn.Linear):
    """A linear layer that holds bytes and computes in bfloat16."""

    def __init__(self, source: nn.Linear, quantization: Quantization) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        weight = source.weight
        size = nf4_bytes(weight) if quantization == "nf4" else int8_bytes(weight)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
        self.bias = source.bias

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear."""
        product = cast(Any, _Product).apply(input.to(torch.bfloat16), self.out_features)
        if self.bias is not None:
            product = product + self.bias
        return cast(Tensor, product.to(input.dtype))


def pack(llm: PreTrainedModel, quantization: Quantization) -> None:
    """Put packed layers where bitsandbytes would put its own."""
    chosen = {id(layer) for layer in quantized_layers(llm)}
    for module in list(llm.modules()):
        for name, child in module.named_children():
            if id(child) in chosen:
                setattr(module, name, PackedLinear(cast(nn.Linear, child), quantization))


def more_than_packed(module: nn.Module) -> int:
    """How many more weights packed layers stand for than they hold bytes."""
    return sum(
        layer.in_features * layer.out_features - layer.weight.numel()
        for layer in module.modules()
        if isinstance(layer, PackedLinear)
    )

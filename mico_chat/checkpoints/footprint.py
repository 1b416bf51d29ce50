"""The memory that a model takes, found without its weights: the real modules run on fake tensors.

A fake tensor has a shape and a precision but no numbers. A step of a 7B model takes seconds and no
memory, and allocates and frees exactly the tensors of a real step.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedModel

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.model.config import MicoChatConfig

Quantization = Literal["nf4", "int8"]

WORKING = "working memory"

PROGRAM = 600_000_000
"""Bytes of the program without weights, keys and values: 0.55 GB were measured with the mini in
transformers and 0.4 GB with llama.cpp. The process that decodes media takes 0.1 GB more."""

BATCH = 512
"""A step has at most these tokens. llama.cpp may keep the logits of each (``max_batch``)."""


def meta_chat(config: MicoChatConfig) -> MicoChatForConditionalGeneration:
    """The model without its language model, on the meta device."""
    config = copy.deepcopy(config)
    config.base_llm = config.base_llm or "elsewhere"  # so that the model does not build it
    with torch.device("meta"), warnings.catch_warnings():
        # A config without names has a head of no rows.
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return MicoChatForConditionalGeneration(config)


def meta_llm(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        llm: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for parameter in llm.parameters():  # the buffers keep their precision
        parameter.data = parameter.data.to(dtype)
    return llm


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module; a quantized weight counts the numbers that it stands for."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    hidden = sum(x.in_features * x.out_features - x.weight.numel() for x in layers)
    return hidden + sum(parameter.numel() for parameter in module.parameters())


def held_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def module_bytes(module: nn.Module) -> int:
    return held_bytes([*module.parameters(), *module.buffers()])


# --- quantized weights ----------------------------------------------------------------------------


def quantized_layers(llm: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers that bitsandbytes replaces: all but the vocabulary head."""
    head = llm.get_output_embeddings()
    return [m for m in llm.modules() if isinstance(m, nn.Linear) and m is not head]


def quantized_bytes(weight: Tensor, quantization: Quantization, double: bool = True) -> int:
    """Bytes of a weight (out, in) that bitsandbytes has quantized; ``double``: nf4's scales too."""
    n = weight.numel()
    if quantization == "int8":
        return n + weight.shape[0] * 4  # a float32 scale a row
    blocks = math.ceil(n / 64)  # of weights that share a scale
    packed = math.ceil(n / 2) + 16 * 4  # and the 16 values of the code
    if not double:
        return packed + blocks * 4
    # 256 scales share a scale; their code has 256 values, and there is one mean.
    return packed + blocks + math.ceil(blocks / 256) * 4 + 256 * 4 + 4


class _Product(torch.autograd.Function):
    """A product with a weight that is unpacked before each use and dropped after it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n_out: int) -> Tensor:
        ctx.shape = (n_out, x.shape[-1])
        return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None


class QuantizedLinear(nn.Linear):
    """A layer of bitsandbytes without its numbers, for its memory and arithmetic.

    Measured for nf4 on a CPU (benchmarks/results/training-memory.md), not for int8 and GPUs.
    """

    def __init__(self, source: nn.Linear, quantization: Quantization) -> None:
        super().__init__(source.in_features, source.out_features, bias=False, device="meta")
        size = quantized_bytes(source.weight, quantization)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
        self.bias = source.bias

    def forward(self, input: Tensor) -> Tensor:
        product = cast(Any, _Product).apply(input.to(torch.bfloat16), self.out_features)
        product = product if self.bias is None else product + self.bias
        return cast(Tensor, product.to(input.dtype))


def quantize(llm: PreTrainedModel, quantization: Quantization) -> None:
    replaced = {id(layer) for layer in quantized_layers(llm)}
    for module in list(llm.modules()):
        for name, child in module.named_children():
            if id(child) in replaced:
                setattr(module, name, QuantizedLinear(cast(nn.Linear, child), quantization))


GGUF_BITS = {"F32": (32.0, 32.0), "F16": (16.0, 16.0), "BF16": (16.0, 16.0)}
GGUF_BITS |= {"Q8_0": (8.5, 8.5), "Q4_K_M": (4.8, 6.56), "Q4_0": (4.5, 6.56)}
"""Bits that llama.cpp takes for a weight of a layer, and of the tables of tokens and words."""

_NARROW_BITS = {"Q4_K_M": (5.9, 8.5), "Q4_0": (4.5, 8.5)}
"""The same where the model's width is no multiple of 256, which K-quants need."""


def gguf_bytes(llm: PreTrainedModel, quantization: str) -> int:
    """Bytes of a language model's GGUF file, all of which is mapped into memory."""
    layers, tables = GGUF_BITS[quantization]
    if cast(nn.Embedding, llm.get_input_embeddings()).embedding_dim % 256:
        layers, tables = _NARROW_BITS.get(quantization, (layers, tables))
    inside = sum(layer.weight.numel() for layer in quantized_layers(llm))
    vectors = sum(weight.numel() for weight in llm.parameters() if weight.ndim == 1)
    rest = parameter_count(llm) - inside - vectors
    return int(inside * layers + rest * tables + vectors * 32) // 8


# --- fake tensors ---------------------------------------------------------------------------------


_ATEN: Any = torch.ops.aten
_FUSED = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        _ATEN._scaled_dot_product_flash_attention_backward
    ),
}
"""The fused attention of a CPU, which torch does not count, and a GPU's with as many products."""


class Flops(TorchDispatchMode):
    """Counts the FLOPs of the products; a multiplication and an addition are two."""

    def __init__(self) -> None:
        cast(Any, super()).__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(_FUSED.get(func.overloadpacket, func.overloadpacket))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


class LiveMemory(Flops):
    """Records when each storage begins and ends, beside the FLOPs.

    Numbers that are not fake (token ids, masks) are computed for real. Where a choice depends on
    fake numbers, all of them are chosen: the estimate is then the largest that can be.
    """

    def __init__(self) -> None:
        super().__init__()
        self._living: dict[int, tuple[int, weakref.ref[Any]]] = {}  # id of a storage -> number
        self._bytes: list[int] = []  # by number
        self._uses: dict[int, str] = {}
        self._events: list[int] = []  # a number begins; -1 - number: it ends

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake_mask(args[0]):
            return True
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            args = (torch.ones(args[0].shape, dtype=torch.bool),)
        if func is torch.ops.aten.unique_dim.default and isinstance(args[0], FakeTensor):
            return args[0], torch.arange(len(args[0])), torch.ones(len(args[0]), dtype=torch.long)
        if func.overloadpacket in _INDEXED:
            args = (args[0], _as_numbers(args[1]), *args[2:])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def name(self, use: str, tensors: Iterable[Tensor | None]) -> None:
        for tensor in tensors:
            if tensor is not None and (number := self._see(tensor)) is not None:
                self._uses[number] = use

    def name_others(self, use: str) -> int:
        """Give all living storages without a name the name ``use``; returns their bytes."""
        others = [number for number, _ in self._living.values() if number not in self._uses]
        self._uses |= dict.fromkeys(others, use)
        return sum(self._bytes[number] for number in others)

    def forget_the_past(self) -> None:
        self._events = sorted(number for number, _ in self._living.values())

    def peak(self) -> Counter[str]:
        """Bytes by use at the moment when most are alive."""
        now = most = at = 0
        for index, event in enumerate(self._events):
            now += self._bytes[event] if event >= 0 else -self._bytes[-1 - event]
            if now > most:
                most, at = now, index
        past = self._events[: at + 1]
        found: Counter[str] = Counter()
        for number in set(past) - {-1 - event for event in past if event < 0}:
            if number >= 0:
                found[self._uses.get(number, WORKING)] += self._bytes[number]
        return found

    def _see(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._living:
            if not storage.nbytes():
                return None
            number = len(self._bytes)
            self._bytes.append(storage.nbytes())
            self._events.append(number)
            self._living[key] = number, weakref.ref(storage, partial(self._end, key))
        return self._living[key][0]

    def _end(self, key: int, ref: object) -> None:
        self._events.append(-1 - self._living.pop(key)[0])


_INDEXING = "index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put"
_INDEXED = {getattr(torch.ops.aten, name) for name in _INDEXING.split()}


def _is_fake_mask(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.dtype == torch.bool


def _as_numbers(indices: Any) -> list[Tensor | None]:
    """Indices without masks: the number of indices that a fake mask stands for is unknown."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            mask = torch.ones(index.shape, dtype=torch.bool) if _is_fake_mask(index) else index
            found += mask.nonzero(as_tuple=True)
    return found


def fake(module: nn.Module) -> FakeTensorMode:
    """Give a module from the meta device fake weights on the CPU, and return its inputs' mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    with mode:
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if id(parameter) not in made:
                    value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
                inner._parameters[name] = made[id(parameter)]
            for name, buffer in inner.named_buffers(recurse=False):
                inner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return mode


# --- serving --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """The parameters of a chat model's parts, and the bytes that serving it takes.

    ``parts``: parameters and bytes of each part but the language model. ``llm``: bytes of the
    language model by dtype and quantization. ``kv_per_token``: keys and values of a token.
    ``working``: bytes of a step of :data:`BATCH` tokens beside weights, keys and values.
    ``gguf``: the quantization that the model was trained for.
    """

    parts: dict[str, tuple[int, int]]
    llm: dict[str, int]
    llm_parameters: int
    kv_per_token: int
    working: int
    context: int
    dtype: torch.dtype
    table: torch.Size
    gguf: str | None

    @classmethod
    def of(cls, chat: MicoChatForConditionalGeneration, dtype: torch.dtype) -> Serving:
        """The needs of a model on the meta device, in ``dtype`` where it is not quantized."""
        llm = meta_llm(chat.config.llm_config, dtype)
        plain, n = module_bytes(llm), parameter_count(llm)
        linear = [layer.weight for layer in quantized_layers(llm)]
        rest = plain - held_bytes(linear)
        sizes = {
            str(dtype).removeprefix("torch."): plain,
            "int8": rest + sum(quantized_bytes(weight, "int8") for weight in linear),
            "nf4": rest + sum(quantized_bytes(weight, "nf4", double=False) for weight in linear),
            **{name: gguf_bytes(llm, name) for name in GGUF_BITS},
        }
        parts = {
            name: (parameter_count(module), module_bytes(module.to(dtype)))
            for name, module in chat.named_children()
        }
        table = cast(nn.Embedding, llm.get_input_embeddings()).weight.shape
        length = int(llm.config.get_text_config().max_position_embeddings)
        kv, working = _prefill(llm.eval())
        gguf = chat.config.gguf_quantization
        return cls(parts, sizes, n, kv // BATCH, working, length, dtype, table, gguf)

    @property
    def beside(self) -> int:
        """Bytes of all parts but the language model."""
        return sum(size for _, size in self.parts.values())


def serving(config: MicoChatConfig, dtype: str | None) -> Serving:
    """What a model takes by its config; bfloat16 is the default."""
    return Serving.of(meta_chat(config), getattr(torch, dtype or "bfloat16"))


@torch.no_grad()
def _prefill(llm: PreTrainedModel) -> tuple[int, int]:
    """Bytes of the keys and values of :data:`BATCH` tokens, and of working memory meanwhile."""
    fake(llm)
    ids = torch.zeros(1, BATCH, dtype=torch.long)
    with LiveMemory() as live:
        live.name("weights", [*llm.parameters(), *llm.buffers()])
        _, cache = llm(input_ids=ids, use_cache=True, logits_to_keep=1).to_tuple()
    kept = [kv for layer in cache.layers for kv in (layer.keys, layer.values)]
    live.name("keys and values", kept)
    return held_bytes(kept), live.peak()[WORKING]

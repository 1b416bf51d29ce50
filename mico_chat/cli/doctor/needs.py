"""What a model needs to be served, and whether the memory at hand holds it.

Weights come from ``checkpoints.footprint``, thus from the modules themselves; the rest is what the
engines take: keys and values of the longest context, llama.cpp's logits, the program itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn
from transformers import PreTrainedModel

from mico_chat.checkpoints.footprint import (
    kv_bytes_per_token,
    llm_bytes,
    meta_llm,
    module_bytes,
    quantized_layers,
)
from mico_chat.cli.doctor.finding import Finding, gigabytes

PROGRAM = 600_000_000
"""Bytes of the program without weights, keys and values: 0.55 GB were measured with the mini in
transformers, 0.4 with llama.cpp, and a decoder's process takes 0.1."""

BATCH = 512
"""Tokens of a step, of each of which llama.cpp may keep the logits (EngineOptions.max_batch)."""

LLAMACPP_CACHE = 512 << 20
"""Bytes of keys and values that llama.cpp's engine takes at least
(:data:`mico_chat.engine.llamacpp.DEFAULT_CACHE_BYTES`, which needs llama.cpp to be imported)."""

SHOWN = ("bfloat16", "int8", "nf4", "Q8_0", "Q4_0")
"""Precisions of the language model in the table."""

_K_QUANT_ROW = 256
"""Weights of a row that a K-quant needs; narrower ones get a larger type instead."""


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of one of a model's parts."""

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Needs:
    """What a model weighs and takes, in bytes; ``llm`` by dtype and quantization.

    ``number``: bytes of a number of ``kv_per_token``.
    """

    parts: tuple[Size, ...]
    llm: dict[str, int]
    llm_parameters: int
    token_table: int
    kv_per_token: int
    number: int
    context: int
    vocabulary: int

    @classmethod
    def of(cls, chat: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Needs:
        """Of a model on the meta device (:func:`mico_chat.checkpoints.footprint.meta_chat`).

        ``dtype`` is that of all parts, and of what is not quantized.
        """
        llm = meta_llm(chat.config.llm_config)
        table = llm.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return cls(
            parts=tuple(
                Size(name, _parameters(module), module_bytes(module, dtype))
                for name, module in chat.named_children()
            ),
            llm={
                _name(dtype): llm_bytes(llm, dtype),
                "int8": llm_bytes(llm, dtype, "int8"),
                "nf4": llm_bytes(llm, dtype, "nf4", double_quantization=False),
                **{name: gguf_bytes(llm, name) for name in _GGUF},
            },
            llm_parameters=_parameters(llm),
            token_table=table.weight.numel() * dtype.itemsize,
            kv_per_token=kv_bytes_per_token(llm.config, dtype),
            number=dtype.itemsize,
            context=int(llm.config.get_text_config().max_position_embeddings),
            vocabulary=table.num_embeddings,
        )

    @property
    def beside(self) -> int:
        """All but the language model."""
        return sum(part.bytes for part in self.parts)

    def total(self, engine: str, precision: str) -> int:
        """Bytes to serve the model with one longest conversation.

        ``precision``: the dtype or quantization of the language model, a key of ``llm``.
        """
        fixed = PROGRAM + self.beside + self.llm[precision]
        context = self.context * self.kv_per_token
        if engine == "llamacpp":
            logits = BATCH * self.vocabulary * 4
            halves = context * 2 // self.number  # its keys and values are float16
            return fixed + self.token_table + logits + max(halves, LLAMACPP_CACHE)
        return fixed + context

    def rows(self) -> Iterator[tuple[str, ...]]:
        """A table: the parts, and the whole in each precision."""
        shown = [name for name in self.llm if name in SHOWN or name not in _GGUF]
        yield ("part", "parameters", *shown)
        for part in self.parts:
            same = [""] * (len(shown) - 1)  # whatever the language model's precision
            yield (part.name, count(part.parameters), gigabytes(part.bytes), *same)
        sizes = [self.llm[name] for name in shown]
        yield ("llm", count(self.llm_parameters), *map(gigabytes, sizes))
        n = self.llm_parameters + sum(part.parameters for part in self.parts)
        yield ("together", count(n), *(gigabytes(self.beside + size) for size in sizes))


@dataclass(frozen=True)
class Memory:
    """Where a model would be held: ``free`` of ``most`` bytes, which others may use in part."""

    name: str
    free: int
    most: int


@dataclass(frozen=True)
class Way:
    """One way to run a model: its engine, the language model's precision, the options for it."""

    engine: str
    precision: str
    options: str


def fit_finding(
    needs: Needs, model: str, taken: Way, others: Sequence[Way], memory: Memory
) -> Finding:
    """Whether a model fits as it would be run, or else how it would."""
    n = needs.total(taken.engine, taken.precision)
    facts = {
        "needed": n,
        "free": memory.free,
        "engine": taken.engine,
        "precision": taken.precision,
        "by_way": {
            f"{way.engine} {way.precision}": needs.total(way.engine, way.precision)
            for way in (taken, *others)
        },
    }
    how = f"{taken.precision} with {taken.engine} needs {gigabytes(n)}"
    has = f"{gigabytes(memory.free)} of {memory.name} are free"
    if n <= memory.free:
        return Finding("fit", "ok", f"fits: {how}, {has}", facts=facts)
    text = f"does not fit: {how}, {has}"
    if n <= memory.most:
        text += f" of {gigabytes(memory.most)}: other programs have the rest"
    smaller = [way for way in others if needs.total(way.engine, way.precision) <= memory.free]
    if smaller:
        # The most precise of those that fit.
        best = max(smaller, key=lambda way: needs.total(way.engine, way.precision))
        fits = gigabytes(needs.total(best.engine, best.precision))
        bits = {"nf4": "4 bit, ", "Q4_0": "4 bit, ", "int8": "8 bit, ", "Q8_0": "8 bit, "}
        text += f"; fits in {bits.get(best.precision, '')}{best.precision}: {fits}"
        mend = f"mico-chat serve --model {model} {best.options}"
        return Finding("fit", "problem", text, mend, facts)
    least = min((needs.total(way.engine, way.precision) for way in (taken, *others)), default=n)
    if least < n:
        text += f"; the least, in 4 bit, is {gigabytes(least)}"
    return Finding("fit", "problem", text, "a machine with more memory, or a smaller model", facts)


def loading_findings(needs: Needs, precision: str, memory: Memory) -> Iterator[Finding]:
    """A problem where weights for a card do not fit the machine's memory that they go through."""
    n = PROGRAM + needs.beside + needs.llm[precision]
    if n > memory.free:
        text = (
            f"on their way to the card the weights need {gigabytes(n)} of {memory.name}, "
            f"of which {gigabytes(memory.free)} are free"
        )
        mend = "--quantization nf4, or a machine with more memory"
        yield Finding("loading", "problem", text, mend, {"needed": n, "free": memory.free})


def context_finding(needs: Needs, engine: str) -> Finding:
    """What a conversation takes as it grows."""
    whole = needs.kv_per_token * needs.context
    text = (
        f"{gigabytes(needs.kv_per_token)} of keys and values a token, "
        f"{gigabytes(whole)} for {needs.context} tokens, the longest context"
    )
    if engine == "llamacpp" and whole < LLAMACPP_CACHE:
        text += f"; llamacpp takes {gigabytes(LLAMACPP_CACHE)} at once, for several conversations"
    facts = {"bytes_per_token": needs.kv_per_token, "context": needs.context, "bytes": whole}
    return Finding("context", "note", text, facts=facts)


def weights_finding(needs: Needs) -> Finding:
    """The table of the parts."""
    n = needs.llm_parameters + sum(part.parameters for part in needs.parts)
    facts = {
        "parameters": {part.name: part.parameters for part in needs.parts}
        | {"llm": needs.llm_parameters},
        "bytes": {part.name: part.bytes for part in needs.parts} | {"llm": needs.llm},
    }
    text = f"{count(n)} parameters; in memory, by the precision of the language model:"
    return Finding("weights", "note", text, facts=facts, rows=tuple(needs.rows()))


def gguf_bytes(llm: PreTrainedModel, quantization: str) -> int:
    """Bytes of a language model's GGUF file, which is mapped into memory whole.

    llama.cpp mixes types: vectors stay float32, and the table that gives the words gets a finer
    type in the 4-bit ones.
    """
    linear, head, table = _GGUF[quantization]
    total = 0.0
    layers = {id(layer.weight) for layer in quantized_layers(llm)}
    embedding = llm.get_input_embeddings().weight
    output = llm.get_output_embeddings()
    gives_words = embedding if output is None else output.weight
    for weight in {id(weight): weight for weight in llm.parameters()}.values():
        if weight.ndim == 1:
            total += weight.numel() * 4
        elif id(weight) in layers:
            total += weight.numel() * _bytes_each(linear, weight.shape[-1])
        else:
            total += weight.numel() * _bytes_each(
                head if weight is gives_words else table, weight.shape[-1]
            )
    return int(total)


_GGUF: dict[str, tuple[str, str, str]] = {
    "F32": ("F32", "F32", "F32"),
    "F16": ("F16", "F16", "F16"),
    "BF16": ("BF16", "BF16", "BF16"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q4_K"),
    "Q4_0": ("Q4_0", "Q6_K", "Q4_0"),
}
"""Types of the layers, of the table that gives words, and of a token table of its own."""

_WIDER = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What a K-quant becomes where rows are too narrow for it."""

_FINER_SHARE = 0.13
"""Of the weights of a Q4_K_M, those that get Q6_K: half of the values and of the projections down,
which makes 4.8 bits a weight of 4.5."""


def _bytes_each(name: str, row: int) -> float:
    exact = {one: size / block for one, (block, size) in GGML_QUANT_SIZES.items()}

    def of(kind: str) -> float:
        kind = _WIDER.get(kind, kind) if row % _K_QUANT_ROW else kind
        return exact[GGMLQuantizationType[kind]]

    if name == "Q4_K":
        return of("Q4_K") * (1 - _FINER_SHARE) + of("Q6_K") * _FINER_SHARE
    return of(name)


def count(n: int) -> str:
    """``"6.74 B"``, ``"134.5 M"``, ``"12.3 K"``."""
    for size, unit, digits in ((1e9, "B", 2), (1e6, "M", 1), (1e3, "K", 1)):
        if n >= size:
            return f"{n / size:.{digits}f} {unit}"
    return str(n)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

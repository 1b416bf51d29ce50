"""GGUF files of a chat model's language model, for llama.cpp.

The file holds the language model with its adapter merged, and its tokenizer. It is text only:
encoder and bridge stay in the checkpoint, and their context tokens reach llama.cpp as embeddings.

Architecture: ``llama`` of llama.cpp (``src/models/llama.cpp``), so Hugging Face's LlamaConfig:
grouped-query attention, tied or untied embeddings, biases, and every rotary scaling that does not
depend on the length of the text.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mico_chat.checkpoints.configs import chat_config, digest_of, named_folder
from mico_chat.checkpoints.folders import built_once
from mico_chat.checkpoints.gguf_files import DEFAULT_QUANTIZATION, QUANTIZATIONS, QUANTIZED
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.llamacpp_tokenizer import add_tokenizer
from mico_chat.errors import ConfigError, ModelError
from mico_chat.late import late
from mico_chat.model.auto import AutoTokenizer
from mico_chat.model.config import MicoChatConfig
from mico_chat.settings import cache_dir

# Importing it brings transformers' models: a file that was built before needs none.
with late():
    from mico_chat.checkpoints import pretrained

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

    from mico_chat.checkpoints.lora import Lora

logger = logging.getLogger(__name__)

DEFAULT_CACHE_BYTES = 512 << 20
"""Bytes of keys and values, unless the model's longest context needs more."""

_TURNED = ("llama", "granite", "smollm3", "arcee")
"""Architectures whose rows of queries and keys have another order (:func:`_turned`)."""

_ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")


def export_gguf(model: str | Path, output: Path, quantization: str = "F16") -> Path:
    """Write the language model of a chat model as a GGUF file, whole or not at all.

    Raises:
        ConfigError, MissingExtraError: for an unknown quantization; if llama.cpp is not installed.
        ModelError: for a model or tokenizer that llama.cpp's ``llama`` architecture cannot hold.
    """
    _check(quantization)
    if output.is_dir():
        raise ConfigError(f"{output} is a folder: name the file to write in it")
    name, folder = named_folder(model)
    llm = pretrained.load_llm(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=output.parent) as temporary:
        written = Path(temporary) / "plain.gguf"
        stored = {torch.float32: "F32", torch.bfloat16: "BF16"}.get(llm.dtype, "F16")
        plain = stored if quantization in QUANTIZED else quantization
        _write(llm, tokenizer, written, plain, name)
        del llm
        if quantization in QUANTIZED:
            plain_file, written = written, Path(temporary) / "quantized.gguf"
            _quantize(plain_file, written, quantization)
        written.replace(output)
    return output


def gguf_of(model: str | Path = "mini", quantization: str | None = None) -> Path:
    """The GGUF file of a chat model's language model, built once in the cache folder.

    Its name has a digest of the model. Errors are those of :func:`export_gguf`.
    """
    quantization = quantization or usual_quantization(model)
    _check(quantization)
    file = gguf_path(model, quantization)
    return built_once(file, lambda path: export_gguf(model, path, quantization))


def gguf_path(model: str | Path = "mini", quantization: str | None = None) -> Path:
    """The path of the file of :func:`gguf_of`, which may not be there yet."""
    name, folder = named_folder(model)
    quantization = quantization or usual_quantization(folder)
    return cache_dir() / "gguf" / f"{name}-{digest_of(folder)}-{quantization}.gguf"


def usual_quantization(model: str | Path) -> str:
    """The quantization that a chat model was trained for, as its config says, or Q8_0."""
    folder = named_folder(model)[1]
    config = MicoChatConfig.without_llm(folder) or chat_config(folder)
    return config.gguf_quantization or DEFAULT_QUANTIZATION


def _check(quantization: str) -> None:
    """Refuse an impossible quantization before minutes of loading and merging."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ConfigError(f"quantization {quantization!r} is unknown; choose one of {known}")
    if quantization in QUANTIZED:
        llama_cpp.llama_backend_init()


def _write(
    llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, plain: str, name: str
) -> None:
    """Write metadata, then tensors one after another: no second copy of the model in memory."""
    config = check_llama(llm.config)
    rope = cast(dict[str, Any], config.rope_parameters)
    head_dim, n_kv_heads = cast(int, config.head_dim), cast(int, config.num_key_value_heads)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    try:
        writer.add_name(name)
        writer.add_description("Language model of a mico-chat checkpoint, its adapter merged")
        kind = "ALL_F32" if plain == "F32" else f"MOSTLY_{plain}"
        writer.add_file_type(gguf.LlamaFileType[kind])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(n_kv_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        tensors = {**_weights(llm, config), **_rope(writer, config)}
        add_tokenizer(writer, tokenizer, config.vocab_size)
        # llama.cpp computes with norms, biases and rotary factors in float32.
        types = {name: "F32" if t.ndim == 1 else plain for name, t in tensors.items()}
        for name, tensor in tensors.items():
            n_bytes = tensor.numel() * (4 if types[name] == "F32" else 2)
            raw = gguf.GGMLQuantizationType[types[name]]  # the type that counts for gguf
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), n_bytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_numbers(name, tensor, types[name]))
    finally:
        writer.close()


def check_llama(config: PreTrainedConfig) -> LlamaConfig:
    """The config of a language model that llama.cpp's ``llama`` computes; else a ModelError."""
    from transformers import LlamaConfig

    if not isinstance(config, LlamaConfig) or config.model_type != "llama":
        raise ModelError(
            f"GGUF export supports models of type 'llama', not {config.model_type!r}: use "
            "--engine transformers or --engine vllm"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"GGUF export supports the activation 'silu', not {config.hidden_act!r}")
    rope_type = cast(dict[str, Any], config.rope_parameters)["rope_type"]
    if rope_type not in _ROPE_SCALINGS:
        known = ", ".join(_ROPE_SCALINGS)
        raise ModelError(f"GGUF export supports the rotary scalings {known}, not {rope_type!r}")
    return config


def _rope(writer: gguf.GGUFWriter, config: LlamaConfig) -> dict[str, Tensor]:
    """The divisor of each of the head_dim / 2 rotary frequencies: one tensor for any scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = cast(dict[str, Any], config.rope_parameters)
    if parameters["rope_type"] == "default":
        return {}
    head_dim = cast(int, config.head_dim)
    scaled, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if len(scaled) != len(exponents):
        raise ModelError(
            f"the rotary embedding turns {2 * len(scaled)} of the {head_dim} numbers of a "
            "head, but llama.cpp's llama models turn all of them: use --engine transformers"
        )
    if attention_factor != 1.0:
        writer.add_rope_scaling_attn_factors(attention_factor)
    return {"rope_freqs.weight": parameters["rope_theta"] ** -exponents / scaled}


def _weights(llm: PreTrainedModel, config: LlamaConfig) -> dict[str, Tensor]:
    """The model's tensors under llama.cpp's names, query and key rows in its order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = llm.state_dict()
    if state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr():
        del state["lm_head.weight"]  # without it llama.cpp uses the token table
    tensors = {}
    for name, tensor in state.items():
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            reason = f"a llama GGUF file has no place for {name}"
            raise ModelError(f"{reason}: use --engine transformers")
        if not tensor.is_floating_point():
            reason = f"{name} is quantized ({tensor.dtype})"
            raise ModelError(f"{reason}: export the checkpoint before quantizing")
        if (n_heads := heads.get(name.split(".")[-2])) is not None:
            tensor = _turned(tensor, n_heads)
        tensors[ours] = tensor
    return tensors


def export_lora(lora: Lora, model: int, file: Path) -> None:
    """Write an adapter for llama.cpp's ``model``, its matrices under the names of that file."""
    text = ctypes.create_string_buffer(64)
    llama_cpp.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
    arch = text.value.decode()
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, llama_cpp.llama_model_n_layer(model))
    heads = {
        "q_proj": llama_cpp.llama_model_n_head(model),
        "k_proj": llama_cpp.llama_model_n_head_kv(model),
    }
    turned = llama_cpp.llama_model_rope_type(model) == llama_cpp.LLAMA_ROPE_TYPE_NORM
    if turned and arch not in _TURNED:
        raise lora.misfit(f"llama.cpp's models of the architecture {arch!r} take none here")
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)  # B is scaled already
    for path, (down, up) in lora.parts().items():
        ours = names.get_name(re.sub(r"^.*(?=\blayers\.\d)", "model.", path))
        if ours is None:
            raise lora.misfit(f"it adapts {path}, a layer that {lora.base} lacks")
        if turned and (n_heads := heads.get(path.split(".")[-1])) is not None:
            up = _turned(up, n_heads)
        for end, half in (("a", down), ("b", up)):
            writer.add_tensor(f"{ours}.weight.lora_{end}", half.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _turned(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: Hugging Face rotates number i of a head with
    number i + head_dim / 2, llama.cpp's llama models 2 i with 2 i + 1.
    """
    halves: Tensor = rows.unflatten(0, (n_heads, 2, -1))  # (n_heads, 2, head_dim / 2, ..)
    return halves.transpose(1, 2).flatten(0, 2)


def _numbers(name: str, tensor: Tensor, stored: str) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if stored == "BF16":  # numpy lacks it
        return tensor.bfloat16().view(torch.int16).numpy()
    if stored == "F32":
        return tensor.float().numpy()
    numbers = tensor.half()
    if not bool(numbers.isfinite().all()):
        raise ModelError(f"{name} has numbers above 65504, the largest number of F16: use BF16")
    return numbers.numpy()


def _quantize(source: Path, target: Path, quantization: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(gguf.LlamaFileType[f"MOSTLY_{quantization}"])
    parameters.nthread = torch.get_num_threads()
    logger.info("quantizing to %s", quantization)
    llama_cpp.llama_backend_init()
    with llama_cpp.errors() as errors:
        failed = llama_cpp.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    if failed:
        reason = errors[-1] if errors else f"it returned the error code {failed}"
        raise ModelError(f"llama.cpp could not quantize to {quantization}: {reason}")

"""Models and processors, loaded from a folder, a hub name or ``mini``.

An engine that runs the language model itself needs only the media path and the token vectors
(:func:`load_encoder`). They are read without transformers' models, because importing those takes
longer than loading the mini.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mico_chat.checkpoints.configs import chat_config, read_part
from mico_chat.checkpoints.folders import (
    PRETRAINING,
    generation_of,
    llm_source,
    local_folder,
    model_folder,
)
from mico_chat.errors import ModelError
from mico_chat.late import late
from mico_chat.model.auto import AutoConfig, AutoTokenizer
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaModel, MediaPath, TokenTable
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor

# Importing these brings transformers' models, which takes longer than to load the mini.
with late():
    from transformers import AutoModelForCausalLM

    from mico_chat.checkpoints import pretrained
    from mico_chat.model import pretraining

WEIGHTS = "model.safetensors"
TABLE = "model.embed_tokens.weight"
"""A Llama's weights have the token vectors under this name."""

TEXT_PARTS = (
    *("text.", "media_projection.", "text_projection.", "names.", "matching_head."),
    *("media_sampling.", "temperature"),
)
"""Weights of a stage 1 model beside those that a chat model has too."""

_IF_THERE: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
"""For transformers' ``cached_file``: None where the file is missing."""

STEM_PREPROCESSING = Preprocessing(image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3)
"""The EfficientNet-Lite stem was trained on (x - 127) / 128 of 8-bit values."""


def load_chat(
    name_or_dir: str | Path = "mini",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    **options: Any,
) -> tuple[pretrained.MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model ready to answer, and its processor.

    ``name_or_dir`` is ``mini``, a folder or a hub name. The default ``dtype`` is bfloat16, which
    halves the memory and is faster on recent CPUs too; the default ``device`` is ``cuda`` where
    there is one. ``options`` are those of ``from_pretrained``, such as ``quantization_config``.
    """
    folder = local_folder(model_folder(name_or_dir))
    options["dtype"] = dtype or torch.bfloat16
    model = pretrained.MicoChatForConditionalGeneration.from_pretrained(folder, **options)
    nn.Module.to(model, device or _device())
    return model.train(False), MicoChatProcessor.from_pretrained(folder)


def load_encoder(
    name_or_dir: str | Path = "mini",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> tuple[MediaModel, MicoChatProcessor]:
    """A model that gives context tokens, without its language model, and its processor."""
    folder = local_folder(model_folder(name_or_dir))
    held = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16
    model = read_media_model(folder, held)
    model.generation = generation_of(folder)
    if model.config.base_llm is None:
        model.attach_llm(read_token_table(folder, held, "llm."))
    else:
        model.attach_llm(read_token_table(llm_source(folder, model.config), held))
    nn.Module.to(model, device or _device())
    return model, MicoChatProcessor.from_pretrained(folder)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_media_model(folder: Path, dtype: torch.dtype) -> MediaModel:
    """The media path of a folder, on the CPU, without a language model's token vectors.

    A :class:`ModelError` names a weight that is not one of the config's.
    """
    config = MicoChatConfig.without_llm(folder) or chat_config(folder)
    # As in Hugging Face, the model is made without memory and then takes the files' tensors.
    with torch.device("meta"), _Unfilled():
        model = MediaModel(config)
    nn.Module.to(model, dtype)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.startswith("llm.")]  # noqa: SIM118
            state |= {name: tensors.get_tensor(name) for name in names}
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    load_strict(model, state, f"{folder / WEIGHTS}: not the weights of its config", assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        init_buffers(module)
    return model


def read_token_table(name_or_dir: str | Path, dtype: torch.dtype, inside: str = "") -> TokenTable:
    """The token vectors of the language model in a folder or of a hub name.

    ``inside`` stands before its weights' names where it is a part of a chat model.
    """

    def config() -> PreTrainedConfig:
        found: Any = AutoConfig.from_pretrained(name_or_dir)
        return cast(PreTrainedConfig, found.llm_config if inside else found)

    settings, _ = PreTrainedConfig.get_config_dict(name_or_dir)
    names, scale = [TABLE], 1.0
    if (settings["llm_config"] if inside else settings).get("model_type") != "llama":
        with torch.device("meta"):
            llm: Any = AutoModelForCausalLM.from_config(config())
        table = llm.get_input_embeddings()
        scale = getattr(table, "scalar_embed_scale", 1.0)  # Gemma's multiplies its vectors
        parameters = llm.named_parameters(remove_duplicate=False)  # a tied one has two names
        names = [name for name, weight in parameters if weight is table.weight]
        names += [name.removeprefix(f"{llm.base_model_prefix}.") for name in names]
    vectors = _read_table(name_or_dir, [inside + name for name in names], dtype)
    return TokenTable(vectors if scale == 1 else vectors * scale, config)


def _read_table(name_or_dir: str | Path, names: list[str], dtype: torch.dtype) -> Tensor:
    for file in (WEIGHTS, "pytorch_model.bin"):
        index = cached_file(name_or_dir, f"{file}.index.json", **_IF_THERE)
        held = [file]
        if index is not None:
            shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            held = [shards[name] for name in names if name in shards] or held
        if (found := cached_file(name_or_dir, held[0], **_IF_THERE)) is not None:
            if (weight := _tensor_in(found, names)) is None:
                raise ModelError(f"{name_or_dir}: no {' or '.join(names)} in {file}")
            return weight.to(dtype)
    files = f"{WEIGHTS} or pytorch_model.bin"
    raise ModelError(f"{name_or_dir}: no {files} with the token table")


def _tensor_in(file: str, names: list[str]) -> Tensor | None:
    if file.endswith(".bin"):  # of torch.save, such as Vicuna's; the other tensors stay on disk
        state: dict[str, Tensor] = torch.load(file, "cpu", weights_only=True, mmap=True)
        return next((state[name] for name in names if name in state), None)
    with safe_open(file, framework="pt") as tensors:
        there = [name for name in names if name in tensors.keys()]  # noqa: SIM118  # not a mapping
        return cast(Tensor, tensors.get_tensor(there[0])) if there else None


class _Unfilled(TorchFunctionMode):
    """On the meta device, skips the functions that fill tensors.

    There is no memory to fill, and torch would import its compiler for them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else named["tensor"]
        if name in ("rand", "randn"):
            return torch.empty(*args, **named)
        if name == "linspace" and "device" not in named:
            return torch.empty(args[2] if len(args) > 2 else named["steps"])
        return func(*args, **named)


def has_text_branch(name_or_dir: str | Path) -> bool:
    return (local_folder(model_folder(name_or_dir)) / PRETRAINING).is_dir()


def load_pretraining(
    name_or_dir: str | Path = "mini", chat: MediaPath | None = None
) -> tuple[pretraining.MicoForPretraining, PreTrainedTokenizerBase]:
    """The pretrained encoder with its text branch, in float32, and the branch's tokenizer.

    ``name_or_dir`` is a stage 1 folder, or a chat model's folder that keeps the text branch. With
    ``chat``, the model loaded from that folder, the encoder, context and concepts are shared as
    they are, and only the text branch is loaded, to the same device.
    """
    folder = local_folder(model_folder(name_or_dir))
    beside = folder / PRETRAINING
    if not beside.is_dir():
        if not isinstance(read_part(AutoConfig, folder, "configuration"), MicoConfig):
            raise ModelError(f"{name_or_dir}: no text branch there (no folder {PRETRAINING!r})")
        tokenizer = text_tokenizer(folder)
        model = pretraining.MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        return model.train(False), tokenizer
    model = pretraining.MicoForPretraining(MicoConfig.from_pretrained(beside), chat)
    state = load_file(beside / WEIGHTS)
    own = load_file(folder / WEIGHTS) if chat is None else model.state_dict()
    shared = ("encoder.", "context.", "concepts.")
    state |= {name: tensor for name, tensor in own.items() if name.startswith(shared)}
    if model.concepts is not None:
        state["concepts.name_ids"] = model.concepts.name_ids
    load_strict(model, state, f"{beside}: not the text branch of this model")
    if chat is not None:
        nn.Module.to(model, chat.device)
    return model.train(False), text_tokenizer(beside)


def load_strict(
    module: nn.Module, state: dict[str, Tensor], wrong: str, assign: bool = False
) -> None:
    """Load a state dict; the error says ``wrong`` and names the first tensors that do not fit."""
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:  # torch has no error of its own for it
        first = shorten(str(error).splitlines()[1], 200)
        raise ModelError(f"{wrong}: {first}") from error


def text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        advice = "save it there, or convert the checkpoint with --tokenizer"
        raise ModelError(f"{folder}: no tokenizer for its text branch; {advice}") from error

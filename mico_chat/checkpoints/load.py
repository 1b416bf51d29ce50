"""Models and processors, loaded from a folder, a hub name or ``mini``.

An engine that runs the language model itself needs only the media path and the token vectors
(:func:`load_encoder`). They are read without transformers' models, because importing those takes
longer than loading the mini.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from mico_chat.checkpoints.folders import (
    PRETRAINING,
    generation_of,
    llm_source,
    local_folder,
    model_folder,
)
from mico_chat.errors import ModelError
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaModel, TokenTable
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor

if TYPE_CHECKING:
    # Importing these brings transformers' models, which takes longer than to load the mini.
    from transformers import PreTrainedModel

    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
    from mico_chat.model.pretraining import MicoForPretraining

WEIGHTS = "model.safetensors"
TABLE = "model.embed_tokens.weight"
"""The token vectors in a language model's weights."""

TEXT_PARTS = ("text.", "media_projection.", "text_projection.", "matching_head.", "temperature")
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
) -> tuple[MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model ready to answer, and its processor.

    ``name_or_dir`` is ``mini``, a folder or a hub name. The default ``dtype`` is bfloat16, which
    halves the memory and is faster on recent CPUs too; the default ``device`` is ``cuda`` where
    there is one. ``options`` are those of ``from_pretrained``, such as ``quantization_config``.
    """
    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration

    folder = local_folder(model_folder(name_or_dir))
    dtype = dtype or torch.bfloat16
    model = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options)
    nn.Module.to(model, device or _device())
    return model.train(False), MicoChatProcessor.from_pretrained(folder)


def load_encoder(
    name_or_dir: str | Path = "mini",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> tuple[MediaModel | MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model that gives context tokens, without its language model, and its processor."""
    folder = local_folder(model_folder(name_or_dir))
    held = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16
    if (found := read_media_model(folder, held)) is not None:
        nn.Module.to(found, device or _device())
        return found, MicoChatProcessor.from_pretrained(folder)
    model, processor = load_chat(folder, dtype, device, without_base_llm=True)
    if model.llm is None:
        source = llm_source(folder, model.config)
        model.attach_llm(read_token_table(source, model.dtype).to(model.device))
    else:
        table, llm_config = cast(nn.Embedding, model.get_input_embeddings()), model.llm.config
        model.llm = TokenTable(table.weight, lambda: llm_config)
    return model.train(False), processor


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_media_model(folder: Path, dtype: torch.dtype) -> MediaModel | None:
    """The media path of a folder, on the CPU.

    None where the weights are in several files or include the language model's: only transformers
    reads those. A :class:`ModelError` names a weight that is not one of the config's.
    """
    config = MicoChatConfig.without_llm(folder)
    if config is None or config.base_llm is None or not (folder / WEIGHTS).is_file():
        return None
    # As Hugging Face loads a model: without memory first, then with the file's tensors.
    with torch.device("meta"), _Unfilled(), _default_dtype(dtype):
        model = MediaModel(config)
    own = model.state_dict()
    state = load_file(folder / WEIGHTS)
    wrong = [name for name in own if name not in state or own[name].shape != state[name].shape]
    if wrong := [*wrong, *(name for name in state if name not in own)]:
        raise ModelError(f"{folder / WEIGHTS}: not the weights of its config: {wrong[0]}")
    state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        init_buffers(module)
    model.generation = generation_of(folder)
    model.llm = read_token_table(llm_source(folder, config), dtype)
    width = model.llm.embed_tokens.embedding_dim
    if width != config.llm_width:
        said = f"the language model is {width} wide but the bridge gives {config.llm_width}"
        raise ModelError(said)
    return model


def read_token_table(name_or_dir: str | Path, dtype: torch.dtype) -> TokenTable:
    """The token vectors of the language model in a folder or of a hub name."""
    for file in (WEIGHTS, "pytorch_model.bin"):
        index = cached_file(name_or_dir, f"{file}.index.json", **_IF_THERE)
        if index is not None:
            shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            file = shards.get(TABLE, file)
        found = cached_file(name_or_dir, file, **_IF_THERE)
        if found is None:
            continue
        weight = _table_in(found)
        if weight is None:
            raise ModelError(f"{name_or_dir}: no {TABLE} in {file}")
        return TokenTable(weight.to(dtype), partial(AutoConfig.from_pretrained, name_or_dir))
    files = f"{WEIGHTS} or pytorch_model.bin"
    raise ModelError(f"{name_or_dir}: no {files} with the token table")


def _table_in(file: str) -> Tensor | None:
    if file.endswith(".bin"):  # of torch.save, such as Vicuna's; the other tensors stay on disk
        table = torch.load(file, "cpu", weights_only=True, mmap=True).get(TABLE)
        return cast(Tensor | None, table)
    with safe_open(file, framework="pt") as tensors:
        there = TABLE in tensors.keys()  # noqa: SIM118  # not a mapping
        return cast(Tensor, tensors.get_tensor(TABLE)) if there else None


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


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_llm(
    name_or_dir: str | Path = "mini", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The language model of a chat model alone, its adapter merged, on the CPU.

    The default ``dtype`` is the one that the weights are stored in.
    """
    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_base_llm

    folder = local_folder(model_folder(name_or_dir))
    config = chat_config(folder)
    if config.base_llm is not None:
        llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
    else:
        llm = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype).llm
    return cast("PreTrainedModel", llm.eval())


def chat_config(folder: str | Path) -> MicoChatConfig:
    """The config of a chat model's folder or hub name; a :class:`ModelError` if it is another's."""
    place = local_folder(folder, "config.json")  # with an error of its own for the hub's
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no config to read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, MicoChatConfig):
        raise ModelError(f"{folder}: a model of type {config.model_type!r}, expected 'mico_chat'")
    return config


def has_text_branch(name_or_dir: str | Path) -> bool:
    return (local_folder(model_folder(name_or_dir)) / PRETRAINING).is_dir()


def load_pretraining(
    name_or_dir: str | Path = "mini",
    chat: MediaModel | MicoChatForConditionalGeneration | None = None,
) -> tuple[MicoForPretraining, PreTrainedTokenizerBase]:
    """The pretrained encoder with its text branch, in float32, and the branch's tokenizer.

    ``name_or_dir`` is a stage 1 folder, or a chat model's folder that keeps the text branch. With
    ``chat``, the model loaded from that folder, the encoder, context and concepts are shared as
    they are, and only the text branch is loaded, to the same device.
    """
    from mico_chat.model.pretraining import MicoForPretraining

    folder = local_folder(model_folder(name_or_dir))
    beside = folder / PRETRAINING
    if not beside.is_dir():
        known = (folder / "config.json").is_file()
        if not known or not isinstance(AutoConfig.from_pretrained(folder), MicoConfig):
            raise ModelError(f"{name_or_dir}: no text branch there (no folder {PRETRAINING!r})")
        tokenizer = text_tokenizer(folder)
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        return model.train(False), tokenizer
    model = MicoForPretraining(MicoConfig.from_pretrained(beside), chat)
    state = load_file(beside / WEIGHTS)
    own = load_file(folder / WEIGHTS) if chat is None else model.state_dict()
    shared = ("encoder.", "context.", "concepts.")
    state |= {name: tensor for name, tensor in own.items() if name.startswith(shared)}
    if model.concepts is not None:
        state["concepts.name_ids"] = model.concepts.name_ids
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch has no error of its own for it
        first = str(error).splitlines()[1].strip()
        raise ModelError(f"{beside}: not the text branch of this model: {first}") from error
    if chat is not None:
        nn.Module.to(model, chat.device)
    return model.train(False), text_tokenizer(beside)


def text_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no tokenizer for its text branch; save it there, or convert the checkpoint "
            "with --tokenizer"
        ) from error

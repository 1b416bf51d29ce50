"""Models and processors, loaded from a folder, a hub name or ``mini``.

An engine that runs the language model itself needs only the media path and the token vectors
(:func:`load_encoder`). These are read without transformers' models, whose import takes longer than
to load the mini.
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
    IF_THERE,
    MODELS,
    PRETRAINING,
    generation_of,
    llm_source,
    local_folder,
    model_folder,
    part_of,
)
from mico_chat.errors import ModelError
from mico_chat.model.config import ChatParts, MicoChatConfig, MicoConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaModel, TokenTable
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor

if TYPE_CHECKING:
    # Importing these brings transformers' models, which takes longer than to load the mini.
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
    from mico_chat.model.pretraining import MicoForPretraining

__all__ = [
    "MODELS",
    "chat_config",
    "has_text_branch",
    "llm_source",
    "load_chat",
    "load_encoder",
    "load_llm",
    "load_pretraining",
    "model_folder",
]

WEIGHTS = "model.safetensors"
TABLE = "model.embed_tokens.weight"
"""The token vectors in a language model's weights."""

TEXT_PARTS = ("text.", "media_projection.", "text_projection.", "matching_head.", "temperature")
"""Weights that a stage 1 model has beside the chat model's encoder, context and concepts."""

STEM_PREPROCESSING = Preprocessing(image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3)
"""The EfficientNet-Lite stem was trained on (x - 127) / 128 of 8-bit values."""


def load_chat(
    name_or_dir: str | Path = "mini",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> tuple[MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model ready to answer, and its processor.

    Args:
        name_or_dir: ``mini``, a folder, or a hub name.
        dtype: bfloat16 where not given: half the memory, and faster on recent CPUs too.
        device: ``cuda`` where there is one, else ``cpu``.
        quantization_config: of the language model.
    """
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
    return _load(name_or_dir, dtype, device, **quantized)


def load_encoder(
    name_or_dir: str | Path = "mini",
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> tuple[MediaModel | MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model that gives context tokens, without its language model, and its processor.

    Arguments as those of :func:`load_chat`.
    """
    folder = Path(model_folder(name_or_dir))
    held = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16
    found = read_media_model(folder, held) if folder.is_dir() else None
    if found is not None:
        nn.Module.to(found, device or _device())
        return found, MicoChatProcessor.from_pretrained(folder)
    model, processor = _load(name_or_dir, dtype, device, without_base_llm=True)
    if model.llm is None:
        source = llm_source(model_folder(name_or_dir), model.config)
        model.attach_llm(read_token_table(source, model.dtype).to(model.device))
    else:
        table, llm_config = cast(nn.Embedding, model.get_input_embeddings()), model.llm.config
        model.llm = TokenTable(table.weight, lambda: llm_config)
    return model.train(False), processor


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(
    name_or_dir: str | Path, dtype: torch.dtype | str | None, device: str | None, **kwargs: Any
) -> tuple[MicoChatForConditionalGeneration, MicoChatProcessor]:
    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration

    folder = model_folder(name_or_dir)
    dtype = dtype or torch.bfloat16
    model = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype, **kwargs)
    processor = MicoChatProcessor.from_pretrained(folder)
    nn.Module.to(model, device or _device())
    return model.train(False), processor


def read_media_model(folder: Path, dtype: torch.dtype) -> MediaModel | None:
    """The media path of a folder, on the CPU.

    None where the weights are in several files, or the language model's are among them:
    :meth:`MicoChatForConditionalGeneration.from_pretrained` reads those.

    Raises:
        ModelError: for weights that are not those of the config.
    """
    parts = ChatParts.read(folder)
    if parts is None or parts.base_llm is None or not (folder / WEIGHTS).is_file():
        return None
    # As Hugging Face loads a model: without memory first, then with the file's tensors.
    with torch.device("meta"), _Unfilled(), _default_dtype(dtype):
        model = MediaModel(parts)
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
    model.llm = read_token_table(llm_source(folder, parts), dtype)
    width = model.llm.embed_tokens.embedding_dim
    if width != parts.llm_width:
        raise ModelError(
            f"the language model is {width} wide but the bridge gives {parts.llm_width}"
        )
    return model


def read_token_table(name_or_dir: str | Path, dtype: torch.dtype) -> TokenTable:
    """The token vectors of a folder's or hub name's language model.

    Raises:
        ModelError: for weights without a token table where Llama models have it.
    """
    for file, read in (
        ("model.safetensors", _read_safetensors),
        ("pytorch_model.bin", _read_pickled),
    ):
        index = cached_file(name_or_dir, f"{file}.index.json", **IF_THERE)
        if index is not None:
            shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            file = shards.get(TABLE, file)
        found = cached_file(name_or_dir, file, **IF_THERE)
        if found is None:
            continue
        weight = read(found)
        if weight is None:
            raise ModelError(f"{name_or_dir}: no {TABLE} in {file}")
        return TokenTable(weight.to(dtype), partial(AutoConfig.from_pretrained, name_or_dir))
    raise ModelError(
        f"{name_or_dir}: no model.safetensors or pytorch_model.bin with the token table"
    )


def _read_safetensors(file: str) -> Tensor | None:
    with safe_open(file, framework="pt") as tensors:
        if TABLE not in tensors.keys():  # noqa: SIM118  # not a mapping
            return None
        return cast(Tensor, tensors.get_tensor(TABLE))


def _read_pickled(file: str) -> Tensor | None:
    """From a file of ``torch.save``, such as Vicuna's; the other tensors stay on disk."""
    weight: Tensor | None = torch.load(file, "cpu", weights_only=True, mmap=True).get(TABLE)
    return weight


class _Unfilled(TorchFunctionMode):
    """On the meta device, skips the functions that fill tensors.

    There is no memory to fill, and torch would import its compiler for them.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place:
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

    Args:
        name_or_dir: ``mini``, a folder, or a hub name.
        dtype: as it is stored where not given.

    Raises:
        ModelError: if the name leads nowhere or to something else than a chat model.
    """
    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_base_llm

    folder = model_folder(name_or_dir)
    config = chat_config(folder)
    llm: PreTrainedModel
    if config.base_llm is not None:
        llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
    else:
        llm = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype).llm
    llm.eval()
    return llm


def chat_config(folder: str | Path) -> MicoChatConfig:
    """The config of a chat model's folder or hub name.

    Raises:
        ModelError: if it is something else than a chat model, or nothing.
    """
    place = local_folder(folder, "config.json")  # with an error of its own for the hub's
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no config to read: {str(error).splitlines()[0]}") from error
    if not isinstance(config, MicoChatConfig):
        raise ModelError(f"{folder}: a model of type {config.model_type!r}, expected 'mico_chat'")
    return config


def has_text_branch(name_or_dir: str | Path) -> bool:
    """Whether a chat model's folder keeps the text branch of its pretraining."""
    return part_of(model_folder(name_or_dir), PRETRAINING) is not None


def load_pretraining(
    name_or_dir: str | Path = "mini",
    chat: MediaModel | MicoChatForConditionalGeneration | None = None,
) -> tuple[MicoForPretraining, PreTrainedTokenizerBase]:
    """The pretrained encoder with its text branch, in float32, and the branch's tokenizer.

    Args:
        name_or_dir: a stage 1 folder, or a chat model's folder that keeps the text branch.
        chat: the model loaded from that folder. Its encoder, context and concepts are shared, as
            they are, and only the text branch is loaded, to the same device.

    Raises:
        ModelError: the folder has no text branch, or one of another model.
    """
    from mico_chat.model.pretraining import MicoForPretraining

    folder = local_folder(model_folder(name_or_dir))
    beside = folder / PRETRAINING
    if not beside.is_dir():
        if not (folder / "config.json").is_file() or not isinstance(
            AutoConfig.from_pretrained(folder), MicoConfig
        ):
            raise ModelError(f"{name_or_dir}: no text branch there (no folder {PRETRAINING!r})")
        tokenizer = text_tokenizer(folder)
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        return model.train(False), tokenizer
    model = MicoForPretraining(MicoConfig.from_pretrained(beside), chat)
    state = load_file(beside / "model.safetensors")
    own = load_file(folder / "model.safetensors") if chat is None else model.state_dict()
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
    """The tokenizer of the text branch in a folder.

    Raises:
        ModelError: there is none, as after a conversion without one.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder}: no tokenizer for its text branch; save it there, or convert the checkpoint "
            "with --tokenizer"
        ) from error
    return tokenizer

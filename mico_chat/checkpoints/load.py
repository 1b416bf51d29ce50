"""Folders: where a name leads, and a model with its processor out of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mico_chat.checkpoints.folders import (
    MODELS,
    PRETRAINING,
    llm_source,
    local_folder,
    model_folder,
    part_of,
)
from mico_chat.errors import ModelError
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.media_path import MediaModel
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor

if TYPE_CHECKING:
    # For those who need transformers' models: their import takes longer than to load the mini.
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from mico_chat.model.chat import MicoChatForConditionalGeneration, MicoForPretraining

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

TEXT_PARTS = ("text.", "media_projection.", "text_projection.", "matching_head.", "temperature")
"""What stage 1's model has beside the encoder, context and concepts of the chat model."""

STEM_PREPROCESSING = Preprocessing(image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3)
"""What the EfficientNet-Lite stem was trained on: (x - 127) / 128 of 8-bit values."""


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
    model = MediaModel.load(folder, held) if folder.is_dir() else None
    if model is None:
        return _load(name_or_dir, dtype, device, token_table_only=True)
    nn.Module.to(model, device or _device())
    return model, MicoChatProcessor.from_pretrained(folder)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(
    name_or_dir: str | Path, dtype: torch.dtype | str | None, device: str | None, **kwargs: Any
) -> tuple[MicoChatForConditionalGeneration, MicoChatProcessor]:
    from mico_chat.model.chat import MicoChatForConditionalGeneration

    folder = model_folder(name_or_dir)
    model = MicoChatForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or torch.bfloat16, **kwargs
    )
    processor = MicoChatProcessor.from_pretrained(folder)
    nn.Module.to(model, device or _device())
    return model.train(False), processor


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
    from mico_chat.model.chat import MicoChatForConditionalGeneration, load_base_llm

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
    """The pretrained encoder with its text branch, and the branch's tokenizer; float32.

    Takes a stage 1 folder, or a chat model's folder that keeps the text branch beside its own
    encoder. For contrastive features and matching scores. With ``chat``, the model loaded from
    that folder, its encoder, context and concepts are shared, as they are; only the text branch
    is loaded, to the same device.

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

"""A chat model in one folder that serves anywhere: ``llm/`` holds its language model, merged.

``llm/`` is a plain Hugging Face folder (weights, config, tokenizer, chat template), so that
``AutoModelForCausalLM``, vLLM and GGUF converters read it as it is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mico_chat.checkpoints.folders import (
    LLM,
    LORA,
    PRETRAINING,
    llm_source,
    local_folder,
    part_of,
    whole_folder,
)
from mico_chat.checkpoints.load import chat_config, model_folder
from mico_chat.errors import ModelError
from mico_chat.model.chat import MicoChatForConditionalGeneration, load_base_llm
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor

SHARD = "5GB"
"""Files of weights are at most so large: a smaller one is read sooner where memory is tight."""


def merge(name_or_dir: str | Path, output: Path, dtype: torch.dtype | str = "auto") -> Path:
    """Write a chat model with its adapter merged and its language model inside, in ``llm/``.

    Takes memory for one language model. Encoder, bridge, processor and text branch stay as they
    are.

    Args:
        name_or_dir: ``mini``, a folder, or a hub name.
        output: the folder to write; it appears whole or not at all.
        dtype: of the language model; as it is stored where not given.

    Returns:
        ``output``.

    Raises:
        ConfigError: if the output is there already.
        ModelError: if the name leads nowhere, to something else than a chat model, or to one that
            is merged already.
    """
    with whole_folder(output) as written:
        folder = local_folder(model_folder(name_or_dir))
        config = chat_config(folder)
        if config.base_llm == LLM and part_of(folder, LORA) is None:
            raise ModelError(
                f"{name_or_dir}: nothing to merge: the folder has {LLM}/ but no {LORA}/"
            )
        processor = MicoChatProcessor.from_pretrained(folder)
        if config.base_llm is None:
            model = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype)
            save_with_llm(model, processor, written)
        else:
            llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
            save_llm(llm, processor, written / LLM)
            _copy_rest(folder, written)
        if (branch := part_of(folder, PRETRAINING)) is not None:
            shutil.copytree(branch, written / PRETRAINING)
    return output


def save_with_llm(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor, folder: Path
) -> None:
    """Write a model whose language model is its own: no longer that which its config named."""
    save_llm(model.llm, processor, folder / LLM)
    cast(MicoChatConfig, model.config).base_llm = str(folder / LLM)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_llm(llm: PreTrainedModel, processor: MicoChatProcessor, folder: Path) -> None:
    """Write a language model's folder, with the processor's tokenizer and chat template."""
    generation = llm.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's: a temperature, but not that it is for sampling
        generation.do_sample = True
    llm.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer = cast(PreTrainedTokenizerBase, processor.tokenizer)
    own, tokenizer.chat_template = tokenizer.chat_template, processor.chat_template
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def _copy_rest(folder: Path, written: Path) -> None:
    """All files of a checkpoint but its adapter, the config pointing at ``llm/``."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, written / path.name)
    config = written / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"base_llm": LLM}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

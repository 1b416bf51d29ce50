"""A chat model's language model as a plain Hugging Face folder, with the adapter merged.

vLLM is not given an adapter beside the base. Where a batch mixes prompts with and without media,
vLLM 0.32 looks up the adapter of its token table for another number of tokens than it embeds, which
ends the engine (``vllm/lora/layers/vocab_parallel_embedding.py``).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from mico_chat.checkpoints.folders import (
    LLM,
    LORA,
    PRETRAINING,
    built_once,
    llm_source,
    local_folder,
    model_folder,
    whole_folder,
)
from mico_chat.checkpoints.gguf_export import digest_of, named_folder
from mico_chat.checkpoints.load import chat_config, load_llm
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_base_llm
from mico_chat.errors import ModelError
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.settings import cache_dir


def merge(name_or_dir: str | Path, output: Path, dtype: torch.dtype | str = "auto") -> Path:
    """Write a chat model with its adapter merged and its language model inside, in ``llm/``.

    Encoder, bridge, processor and text branch stay as they are; ``dtype`` is of the language model.
    The output folder appears whole or not at all. Errors: ConfigError, ModelError.
    """
    with whole_folder(output) as written:
        folder = local_folder(model_folder(name_or_dir))
        config = chat_config(folder)
        if config.base_llm == LLM and not (folder / LORA).is_dir():
            raise ModelError(
                f"{name_or_dir}: nothing to merge: the folder has {LLM}/ but no {LORA}/"
            )
        processor = MicoChatProcessor.from_pretrained(folder)
        if config.base_llm is None:
            model = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype)
            save_with_llm(model, processor, written)
        else:
            llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
            _save_llm(llm, processor, written / LLM)
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, written / path.name)
            file = written / "config.json"
            content = json.loads(file.read_text(encoding="utf-8")) | {"base_llm": LLM}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if (folder / PRETRAINING).is_dir():
            shutil.copytree(folder / PRETRAINING, written / PRETRAINING)
    return output


def save_with_llm(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor, folder: Path
) -> None:
    """Write a model with its language model in ``llm/``, which the config names from now on."""
    _save_llm(model.llm, processor, folder / LLM)
    model.config.base_llm = str(folder / LLM)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _save_llm(llm: PreTrainedModel, processor: MicoChatProcessor, folder: Path) -> None:
    generation = llm.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's has a temperature, but does not say that it samples
        generation.do_sample = True
    llm.save_pretrained(folder, max_shard_size="5GB")  # small ones need less memory to load
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)


def plain_llm(model: str | Path) -> str | Path:
    """The folder or hub name of a chat model's language model, its adapter merged.

    Where there is none yet, it is built at ``llm/<name>-<digest>`` in the cache folder.
    """
    name, folder = named_folder(model)
    config = chat_config(folder)
    if config.base_llm is not None:
        base = llm_source(folder, config)
        if not (folder / LORA).is_dir():
            return base
        if hasattr(AutoConfig.from_pretrained(base), "quantization_config"):
            raise ModelError(
                f"{folder}: its adapter cannot be merged into {base}, because {base} is "
                "quantized: merge the adapter into the language model before it is quantized, "
                "then quantize the result"
            )

    def build(path: Path) -> None:
        with whole_folder(path) as written:
            _save_llm(load_llm(folder), MicoChatProcessor.from_pretrained(folder), written)

    return built_once(cache_dir() / "llm" / f"{name}-{digest_of(folder)}", build)

"""A chat model's language model as a folder of its own, with the adapter merged.

Such a folder is a plain Hugging Face folder (weights, config, tokenizer, chat template):
``AutoModelForCausalLM``, vLLM and GGUF converters read it as it is. :func:`merge` writes a
checkpoint that holds one in ``llm/`` and so serves anywhere; :func:`plain_llm` builds one in the
cache folder where a checkpoint neither names nor holds one.

vLLM is not given an adapter beside the base. Where a batch mixes prompts with and without media,
vLLM 0.32 looks up the adapter of its token table for another number of tokens than it embeds, which
ends the engine (``vllm/lora/layers/vocab_parallel_embedding.py``).
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mico_chat.checkpoints.folders import (
    LLM,
    LORA,
    PRETRAINING,
    llm_source,
    local_folder,
    model_folder,
    part_of,
    whole_folder,
)
from mico_chat.checkpoints.gguf_export import digest_of, named_folder
from mico_chat.checkpoints.load import chat_config, load_llm
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_base_llm
from mico_chat.errors import ModelError
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.settings import cache_dir

logger = logging.getLogger(__name__)

SHARD = "5GB"
"""The largest size of a weights file: small ones load sooner where memory is tight."""


def merge(name_or_dir: str | Path, output: Path, dtype: torch.dtype | str = "auto") -> Path:
    """Write a chat model with its adapter merged and its language model inside, in ``llm/``.

    Takes memory for one language model. Encoder, bridge, processor and text branch stay as they
    are.

    Args:
        name_or_dir: ``mini``, a folder, or a hub name.
        output: the folder to write; it appears whole or not at all.
        dtype: of the language model; as it is stored where not given.

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
            _save_llm(llm, processor, written / LLM)
            _copy_rest(folder, written)
        if (branch := part_of(folder, PRETRAINING)) is not None:
            shutil.copytree(branch, written / PRETRAINING)
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
    """Write a language model's folder, with the processor's tokenizer and chat template."""
    generation = llm.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's has a temperature, but does not say that it samples
        generation.do_sample = True
    llm.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer = cast(PreTrainedTokenizerBase, processor.tokenizer)
    own, tokenizer.chat_template = tokenizer.chat_template, processor.chat_template
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def _copy_rest(folder: Path, written: Path) -> None:
    """Copy all files of a checkpoint but its adapter; the config then names ``llm/``."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, written / path.name)
    config = written / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"base_llm": LLM}
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plain_llm(model: str | Path) -> str | Path:
    """The folder or hub name of a chat model's language model, its adapter merged.

    Where there is none yet, it is built at ``llm/<name>-<digest>`` in the cache folder. Safe
    against several processes at once: one builds, the others wait.

    Raises:
        ModelError: if the name leads nowhere or to something else than a chat model, or for an
            adapter of a quantized language model, which cannot be merged.
    """
    from filelock import FileLock

    name, folder = named_folder(model)
    config = chat_config(folder)
    if config.base_llm is not None:
        base = llm_source(folder, config)
        if part_of(folder, LORA) is None:
            return base
        if hasattr(AutoConfig.from_pretrained(base), "quantization_config"):
            raise ModelError(
                f"{folder}: its adapter cannot be merged into {base}, because {base} is "
                "quantized: merge the adapter into the language model before it is quantized, "
                "then quantize the result"
            )
    path = cache_dir() / "llm" / f"{name}-{digest_of(folder)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_dir():
            logger.info("building %s", path)
            _build(folder, path)
    return path


def _build(folder: Path, path: Path) -> None:
    """Write weights, config and tokenizer; the folder appears whole or not at all."""
    llm = load_llm(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix=".llm-", dir=path.parent) as temporary:
        whole = Path(temporary) / path.name
        llm.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(path)

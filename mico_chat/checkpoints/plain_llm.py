"""A chat model's language model as programs know it that know nothing of chat models.

vLLM reads a Hugging Face folder of a causal LM. Most checkpoints name or hold one (``llm/``); of
one with a LoRA adapter, or with its language model among its own weights, such a folder is built
once in the cache folder.

An adapter is merged, and not given to vLLM beside the base: where a batch mixes prompts with and
without media, vLLM 0.32 looks up the adapter of its token table for another number of tokens than
it embeds, which ends the engine (``vllm/lora/layers/vocab_parallel_embedding.py``).
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from mico_chat.checkpoints.folders import LORA, llm_source, part_of
from mico_chat.checkpoints.gguf_export import digest_of, named_folder
from mico_chat.checkpoints.load import chat_config, load_llm
from mico_chat.errors import ModelError
from mico_chat.settings import cache_dir

logger = logging.getLogger(__name__)


def plain_llm(model: str | Path) -> str | Path:
    """Where a chat model's language model lies, its adapter merged: a folder, or a hub name.

    What is built lies at ``llm/<name>-<digest>`` in the cache folder, as ``mico-chat setup``'s
    base LLM does. Safe against several processes at once: one builds, the others wait.

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
        _check_mergeable(base, folder)
    path = cache_dir() / "llm" / f"{name}-{digest_of(folder)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_dir():
            logger.info("building %s", path)
            _build(folder, path)
    return path


def _check_mergeable(base: str | Path, folder: Path) -> None:
    if hasattr(AutoConfig.from_pretrained(base), "quantization_config"):
        raise ModelError(
            f"{folder}: its adapter cannot be merged into {base}, because {base} is "
            "quantized: merge the adapter into the language model before it is quantized, "
            "then quantize the result"
        )


def _build(folder: Path, path: Path) -> None:
    """Write weights, config and tokenizer; the folder appears whole or not at all."""
    llm = load_llm(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory(prefix=".llm-", dir=path.parent) as temporary:
        whole = Path(temporary) / path.name
        llm.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(path)

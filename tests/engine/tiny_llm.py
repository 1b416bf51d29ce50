"""A tiny random Llama, prompts, and the answers of Hugging Face's ``generate``."""

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Chunk, Model, Sampled, Scheduler, Sequence
from mico_chat.engine.transformers import TransformersModel
from mico_chat.media.medium import ContextBlock
from mico_chat.model.config import MicoChatConfig
from tests.support.tiny import byte_level

VOCABULARY = 300
WIDTH = 32
LENGTHS = (1, 2, 5, 17, 40, 3, 90, 8)


def tiny_llm(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        initializer_range=0.5,
        **{**sizes, **changes},
    )
    llm = LlamaForCausalLM(config)
    llm.train(False)
    return llm


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())


def block(length: int, seed: int = 0) -> ContextBlock:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(length, WIDTH, generator=generator)
    return ContextBlock(tokens, key=bytes([seed, length]))


def prompts() -> list[Prompt]:
    """Ragged prompts; every other one has context tokens among its text."""
    plain = [Prompt((text(n, seed=n),)) for n in LENGTHS]
    mixed = [Prompt((text(n, seed=n), block(n + 3, seed=n), text(2, seed=n))) for n in LENGTHS]
    return [prompt for pair in zip(plain, mixed, strict=True) for prompt in pair]


def embed(llm: Any, prompt: Prompt) -> Tensor:
    table = llm.get_input_embeddings()
    rows = [
        segment.tokens if isinstance(segment, ContextBlock) else table(torch.tensor(segment))
        for segment in prompt.segments
    ]
    return torch.cat([row.to(table.weight.dtype) for row in rows])[None]


def generated(llm: Any, prompt: Prompt, n: int = 12) -> list[int]:
    embeds = embed(llm, prompt)
    with torch.inference_mode():
        output = llm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
        )
    tokens: list[int] = output[0].tolist()
    return tokens


def feed(model: Any, slot: int, start: int, ids: Many[int], *context: Tensor) -> Tensor:
    """The logits (V,) of either engine's model after some tokens."""
    (found,) = model.run([Chunk(slot, start, ids, 1, context)])
    if isinstance(model, TransformersModel):
        assert isinstance(found, Tensor)
        return found
    pointer = llama_cpp.llama_get_logits_ith(model._context, found)
    return torch.from_numpy(np.ctypeslib.as_array(pointer, (model.n_vocab,))).clone()


def whole(llm: Any, ids: Many[int]) -> Tensor:
    with torch.inference_mode():
        logits = llm(input_ids=torch.tensor([list(ids)])).logits[0, -1]
    assert isinstance(logits, Tensor)
    return logits


def answer(
    model: Model,
    batch: Many[Prompt],
    options: GenerationOptions | None = None,
    scheduler: Scheduler | None = None,
) -> list[list[int]]:
    own = scheduler or Scheduler(model, (), max_running=model.n_slots)
    options = options or GenerationOptions(max_tokens=12)
    sequences = [Sequence(prompt, options) for prompt in batch]
    for sequence in sequences:
        own.add(sequence)
    while not own.idle:
        own.step()
    if scheduler is None:
        own.forget()
    return [sequence.tokens for sequence in sequences]


def steps(model: Model, prompt: Prompt, options: GenerationOptions) -> list[Sampled]:
    scheduler = Scheduler(model, (), max_running=1)
    scheduler.add(Sequence(prompt, options))
    found = []
    while not scheduler.idle:
        found += [s.result for s in scheduler.step() if isinstance(s.result, Sampled)]
    scheduler.forget()
    return found


def exported(llm: LlamaForCausalLM, folder: Path, quantization: str = "F32") -> Path:
    from mico_chat.engine.llamacpp_export import export_gguf

    save_llm(folder, llm).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return export_gguf(folder, folder / "tiny.gguf", quantization)


def save_llm(folder: Path, llm: Any) -> MicoChatConfig:
    """Save a language model in ``folder / "llm"``; returns the config of its chat model."""
    llm.save_pretrained(folder / "llm")
    config = MicoChatConfig.tiny()
    config.llm_config, config.base_llm = llm.config, str(folder / "llm")
    return config

"""Seeded tiny models, a tokenizer of letters, and small media, for tests of the model."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mico_chat.checkpoints.folders import PREPROCESSING_FILE
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.media import Audio, Depth, Image, Medium, Normal, Video
from mico_chat.messages import Message
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
T = TypeVar("T")
SIDE = 64
"""Side of a unit of the tiny configurations."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine in a new event loop; one that hangs fails."""

    async def within() -> T:
        async with asyncio.timeout(30):
            return await work

    return asyncio.run(within())


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def within_loop(**fixtures: Any) -> None:
        run(test(**fixtures))

    return within_loop


def command(*words: str, code: int = 0) -> None:
    """Run ``mico-chat`` with these words; it ends with the exit status ``code``."""
    from mico_chat.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert (ended.value.code or 0) == code


def letters() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(
        WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )


_CORPUS = ["The cat and the hat, the cat and the dog: Käse, naïve café, 猫と犬と猫, User: END."] * 4


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes and merges of several, as in GPT-2's vocabulary; a special token at the end."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        chat_template=TEMPLATE,
    )


def processor_for(config: MicoChatConfig, max_slices: int = 4) -> MicoChatProcessor:
    preprocessing = Preprocessing(image_size=SIDE, max_slices=max_slices)
    return MicoChatProcessor.for_config(config, letters(), preprocessing)


def chat_model(config: MicoChatConfig | None = None) -> MicoChatForConditionalGeneration:
    torch.manual_seed(0)
    model = MicoChatForConditionalGeneration(config or MicoChatConfig.tiny())
    if model.concepts is not None:
        ids = torch.tensor([[10, -1], [11, -1], [12, 13], [14, -1], [11, -1]])
        model.concepts.name_ids.copy_(ids)
    return model.train(False)


def pretraining_model(
    concepts: bool = True, config: MicoConfig | None = None
) -> MicoForPretraining:
    torch.manual_seed(0)
    model = MicoForPretraining(config or MicoConfig.tiny(concepts))
    model.train(False)
    return model


def saved(folder: Path, model: MicoChatForConditionalGeneration | None = None) -> Path:
    """A chat model and its processor in a folder; by default the language model is inside."""
    model = model or chat_model()
    model.save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    return folder


def stage1_folder(folder: Path) -> Path:
    """A pretraining model with a tokenizer and its preprocessing."""
    pretraining_model().save_pretrained(folder)
    letters().save_pretrained(folder)
    content = Preprocessing(image_size=SIDE, max_slices=4).model_dump_json()
    (folder / PREPROCESSING_FILE).write_text(content)
    return folder


def llm_folder(folder: Path) -> Path:
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(MicoChatConfig.tiny().llm_config).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def beside(folder: Path, llm: Path) -> Path:
    """A chat model whose language model lies in the folder ``llm``."""
    config = MicoChatConfig.tiny()
    config.base_llm = str(llm)
    return saved(folder, chat_model(config))


def picture(seed: int = 0) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def normals(seed: int = 0) -> Normal:
    return Normal(picture(seed).pixels)


def sound(seconds: float = 0.5, hertz: float = 440.0) -> Audio:
    time = np.arange(int(16_000 * seconds)) / 16_000
    return Audio((0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32))


def clip(frames: int = 3, track: bool = False, seed: int = 0) -> Video:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 40, 40, 3), dtype=np.uint8)
    return Video(pixels, np.arange(frames, dtype=np.float64), sound(1.5) if track else None)


def depth(metric: bool = True) -> Depth:
    row = np.linspace(1.0, 5.0, 32) if metric else np.linspace(0.0, 1.0, 32)
    values = np.tile(row, (32, 1)).astype(np.float32)
    values[:8, :8] = np.nan
    return Depth(values, metric=metric)


def one_of_each() -> list[Medium]:
    return [picture(), sound(), clip(), depth(), normals(), clip(2, track=True)]


def shown(*content: str | Medium) -> Message:
    """A user's message of texts and media in order."""
    return Message.user(*content)


def captions(n: int = 3, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 128, (n, length), generator=generator)
    return ids, torch.ones_like(ids)

"""Shards of drawn squares and tones, small enough to be made for every test run."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.model.config import MicoChatConfig, MicoConceptConfig, MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_training.build_model import Chat, Pretraining, learn_vocabulary
from mico_training.data.sources.written import Sample, Turn, write_shard
from tests.support.tiny import letters, llm_folder

SIZE = {"width": 0.5, "height": 0.5}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}


def picture(colour: str, side: int = 32) -> bytes:
    """A square of one colour on grey, as PNG."""
    pixels = np.full((side, side, 3), 128, dtype=np.uint8)
    pixels[8:24, 8:24] = COLOURS[colour]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tone(hertz: float, seconds: float = 0.5) -> bytes:
    """A sine as 16-bit WAV."""
    time = np.arange(int(16000 * seconds)) / 16000
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes((np.sin(2 * np.pi * hertz * time) * 20000).astype("<i2").tobytes())
    return file.getvalue()


def scene(number: int) -> Sample:
    """A coloured square and a tone, captioned, with questions about either and both."""
    colour = list(COLOURS)[number % 3]
    return Sample(
        id=f"scene{number:03d}",
        split="train",
        files={"image.png": picture(colour), "audio.wav": tone(200 + 50 * number)},
        captions={
            "image.png": (f"a {colour} square", f"a square, {colour}"),
            "audio.wav": ("a tone",),
        },
        turns=(
            Turn("What colour is it?", colour, "colour", ("image.png",)),
            Turn("What do you hear?", "A tone.", "name", ("audio.wav",)),
            Turn("Do they belong together?", "Yes.", "belong", ("image.png", "audio.wav")),
            Turn("What is two and two?", "Four.", "text", ()),
        ),
        concepts={"image.png": "red ball", "audio.wav": "bell"},
        truth={"things": [{"name": "square", "colour": colour, "x": 0.5, "y": 0.5} | SIZE]},
    )


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two shards of six scenes each."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        samples = [scene(number) for number in range(6 * shard, 6 * shard + 6)]
        write_shard(folder / f"train-{shard:06d}.tar", samples)
    return folder


def set_pretrained(config: MicoConfig | MicoChatConfig) -> None:
    """Two of the three visual names are the stem's own, one is learnt."""
    concepts = config.concept_config
    assert isinstance(concepts, MicoConceptConfig)
    concepts.n_pretrained = 2


@pytest.fixture(scope="session")
def tiny_pretraining(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random stage 1 model with a vocabulary of its own."""
    torch.manual_seed(0)
    captions = [caption for number in range(12) for caption in scene(number).captions["image.png"]]
    tokenizer = learn_vocabulary(captions, size=128)
    config = MicoConfig.tiny()
    config.context_config.max_units = 16
    set_pretrained(config)
    folder = tmp_path_factory.mktemp("models") / "pretraining"
    preprocessing = Preprocessing(image_size=64)
    Pretraining(MicoForPretraining(config), tokenizer, preprocessing).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random chat model that holds its language model."""
    torch.manual_seed(0)
    config = MicoChatConfig.tiny()
    set_pretrained(config)
    preprocessing = Preprocessing(image_size=64)
    processor = MicoChatProcessor.for_config(config, letters(), preprocessing)
    folder = tmp_path_factory.mktemp("models") / "chat"
    Chat(MicoChatForConditionalGeneration(config), processor).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random language model of its own."""
    return llm_folder(tmp_path_factory.mktemp("models") / "llm")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random language model whose layers bitsandbytes can pack (64 wide)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("models") / "llama"
    llm = AutoModelForCausalLM.from_config(config)
    nn.init.normal_(llm.lm_head.weight, std=0.3)  # from 0.02 no hidden state has much to say
    llm.save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder

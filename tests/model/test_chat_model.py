"""MicoChatForConditionalGeneration: media of any mix through context tokens into the LLM."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
)

from mico_chat.checkpoints.load import load_chat
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ModelError
from mico_chat.media import Medium
from mico_chat.media.kinds import KINDS
from mico_chat.messages import Message
from mico_chat.model.config import MicoChatConfig, MicoEncoderConfig
from mico_chat.model.media_path import TokenTable
from mico_chat.model.processing import MicoChatProcessor
from tests.support.tiny import (
    beside,
    chat_model,
    clip,
    depth,
    llm_folder,
    normals,
    one_of_each,
    picture,
    processor_for,
    saved,
    shown,
    sound,
)

TALK = [
    shown(picture(), sound(1.5), "What are these?"),
    Message.assistant("A picture and a sound."),
    shown(clip(3, track=True), depth(), normals(1), "And these?"),
]
OTHER = [shown(clip(2, seed=3), "What moves?")]


@pytest.fixture(scope="module")
def model() -> MicoChatForConditionalGeneration:
    return chat_model()


@pytest.fixture(scope="module")
def processor(model: MicoChatForConditionalGeneration) -> MicoChatProcessor:
    return processor_for(model.config)


def media_of(*media: Medium) -> dict[str, Any]:
    """Media as ``context_tokens`` takes them."""
    units = [processor_for(MicoChatConfig.tiny()).units(medium) for medium in media]
    return {
        "media_kind": torch.tensor([KINDS.index(medium.kind) for medium in media]),
        "media_units": torch.tensor([len(u) for u in units]),
        "pixel_values": torch.cat(units),
    }


@torch.no_grad()
def logits(model: MicoChatForConditionalGeneration, inputs: Any) -> Tensor:
    """Logits (B, S, V) of a batch of prompts."""
    found = model(**inputs).logits
    assert isinstance(found, Tensor)
    return found


# --- context tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("concepts", [True, False])
def test_every_kind_gives_the_tokens_that_were_promised(concepts: bool) -> None:
    config = MicoChatConfig.tiny(concepts)
    model, processor = chat_model(config), processor_for(config)
    media = [m for m in one_of_each() if getattr(m, "audio", None) is None]
    found = model.context_tokens(**media_of(*media))
    for medium, tokens in zip(media, found, strict=True):
        n = processor.context_length(processor.measured(medium))
        assert tokens.shape == (n, 32), medium.kind
        assert n == config.context_length(medium.kind, len(processor.units(medium)))


def test_media_do_not_depend_on_their_neighbours(model: MicoChatForConditionalGeneration) -> None:
    media: list[Medium] = [clip(3), picture(), sound(1.5), clip(2)]
    media += [depth(), picture(2), normals(), sound(0.3)]
    together = model.context_tokens(**media_of(*media))
    for medium, tokens in zip(media, together, strict=True):
        alone = model.context_tokens(**media_of(medium))[0]
        torch.testing.assert_close(tokens, alone, atol=1e-5, rtol=1e-4)
    turned = model.context_tokens(**media_of(*media[::-1]))
    for tokens, same in zip(together, turned[::-1], strict=True):
        torch.testing.assert_close(tokens, same, atol=1e-5, rtol=1e-4)


def test_paths_can_be_switched_off(model: MicoChatForConditionalGeneration) -> None:
    media = media_of(picture())
    n = 2  # concept tokens
    whole = model.context_tokens(**media)[0]
    try:
        model.use_concepts = False
        without_concepts = model.context_tokens(**media)[0]
        model.use_concepts, model.use_grid = True, False
        without_grid = model.context_tokens(**media)[0]
    finally:
        model.use_concepts = model.use_grid = True
    assert (without_concepts[-n:] == 0).all()
    assert (without_grid[:-n] == 0).all()
    torch.testing.assert_close(without_grid[-n:], whole[-n:])
    assert without_concepts[:-n].abs().sum() > 0


# --- prompts -----------------------------------------------------------------------------------


def test_a_batch_equals_its_samples(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> None:
    together = processor([TALK, OTHER])
    mask = together["attention_mask"]
    assert not mask.all(), "one of them is padded"
    both = logits(model, together)
    for row, talk in enumerate((TALK, OTHER)):
        alone = logits(model, processor([talk]))[0]
        torch.testing.assert_close(both[row][mask[row] == 1], alone, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_next_tokens(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> None:
    batch = processor([[*TALK, Message.assistant("Yes.")]], train=True)
    labels = batch["labels"]
    log_p = logits(model, {k: v for k, v in batch.items() if k != "labels"}).log_softmax(-1)
    places = (labels[0] != -100).nonzero().flatten()
    by_hand = -torch.stack([log_p[0, p - 1, labels[0, p]] for p in places]).mean()
    torch.testing.assert_close(model(**batch).loss.detach(), by_hand)


def test_media_change_what_is_said_after_them_alone(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> None:
    one, other = (
        logits(model, processor([[shown("See", picture(seed), "What?")]]))[0] for seed in (0, 1)
    )
    ids = processor([[shown("See", picture(), "What?")]])["input_ids"][0]
    first = int((ids == 256).nonzero()[0])
    torch.testing.assert_close(one[:first], other[:first])
    assert not torch.allclose(one[first + 5 :], other[first + 5 :])


def test_encoder_stays_in_evaluation_mode() -> None:
    model = chat_model().train()
    assert model.bridge.training
    assert not model.encoder.training
    assert model.concepts is not None
    assert not model.concepts.training


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose language model lies in another folder."""
    llm = llm_folder(tmp_path_factory.mktemp("llm"))
    return beside(tmp_path_factory.mktemp("standing"), llm)


def test_a_folder_brings_the_model_back(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor, tmp_path: Path
) -> None:
    saved(tmp_path, model)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, MicoChatForConditionalGeneration)
    assert not again.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MicoChatConfig)
    batch = processor([TALK])
    torch.testing.assert_close(logits(again, batch), logits(model, batch))
    loaded, _ = load_chat(tmp_path, dtype="float32")
    assert not loaded.training
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch))
    assert load_chat(tmp_path)[0].dtype == torch.bfloat16
    prompts = processor([TALK, OTHER])
    assert len(loaded.generate(**prompts, max_new_tokens=3, do_sample=False, pad_token_id=0)) == 2


def test_a_plain_vit_comes_back_with_its_computed_buffers(tmp_path: Path) -> None:
    """EVA's rotary tables and key biases are in no state dict."""
    config = MicoChatConfig.tiny(concepts=False)
    config.encoder_config = MicoEncoderConfig(architecture="eva02_tiny_patch14_224", image_size=56)
    model = chat_model(config)
    model.save_pretrained(tmp_path)
    again = MicoChatForConditionalGeneration.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(again.encoder(pixels), model.encoder(pixels))


def test_a_base_llms_weights_stay_where_they_are(standing: Path) -> None:
    parts = {name.split(".")[0] for name in load_file(standing / "model.safetensors")}
    assert parts == {"encoder", "context", "concepts", "bridge"}
    model, processor = load_chat(standing, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(str(model.config.base_llm))
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(model.llm.state_dict()[name], tensor)
    before = logits(model, processor([TALK]))
    again = saved(standing.parent / "again", model)
    assert model.llm is not None, "saving takes nothing away"
    torch.testing.assert_close(
        logits(load_chat(again, dtype=torch.float32)[0], processor([TALK])), before
    )


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_a_language_model_inside_is_quantized_alone(tmp_path: Path) -> None:
    config = MicoChatConfig.tiny()
    # bitsandbytes takes 64 weights at a time.
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    config.llm_config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    folder = saved(tmp_path / "chat", chat_model(config))
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantized, plain = (
        MicoChatForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)
        for options in ({"quantization_config": four}, {})
    )
    layer = quantized.llm.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes")
    assert type(quantized.bridge.proj_in) is torch.nn.Linear, "all else keeps its precision"
    batch = processor_for(config)([TALK])
    exact, found = logits(plain, batch), logits(quantized, batch)
    assert F.cosine_similarity(exact, found, dim=-1).min() > 0.9


def test_a_language_model_of_another_width_is_refused() -> None:
    narrow = TokenTable(
        torch.zeros(16, 16), lambda: LlamaConfig(hidden_size=16, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match="16 wide but the bridge gives 32"):
        chat_model().attach_llm(narrow)


def test_without_a_language_model_it_says_so() -> None:
    config = MicoChatConfig.tiny()
    config.base_llm = "somewhere"
    with pytest.raises(ModelError, match="no language model yet"):
        chat_model(config)(input_ids=torch.zeros(1, 2, dtype=torch.long))

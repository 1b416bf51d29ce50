"""Table 1's architectures: each trains in all its parts, and shares what it should and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import KINDS, MODALITIES
from mico_chat.model.config import MicoConfig
from mico_chat.model.context import Units
from mico_chat.model.text_branch import backwards
from mico_research.ablations.grid import ARCHITECTURES, Architecture
from mico_research.ablations.pretrained import PATCH, PIXELS, CoarseStem
from tests.support.tiny import captions

ALL: list[Architecture] = list(ARCHITECTURES)


def model_of(architecture: Architecture) -> Any:
    torch.manual_seed(0)
    config = MicoConfig.tiny(concepts=False)
    if architecture.startswith("text"):
        config.encoder_config.depth = 0
    model = ARCHITECTURES[architecture](config)
    model.objective_weights = {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
    model.encoder.stem = CoarseStem("test_efficientnet", 64, model.encoder.grid)
    model.encoder.stem.requires_grad_(False)
    return model


def batch(kinds: list[int], units: int = 1) -> dict[str, Tensor]:
    """A medium a row, of these kinds."""
    ids, mask = captions(len(kinds))
    torch.manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "media_kind": torch.tensor(kinds),
        "media_units": torch.full((len(kinds),), units),
        "media_row": torch.arange(len(kinds)),
        "pixel_values": torch.randn(len(kinds) * units, 3, 64, 64),
    }


def reached(model: Any) -> set[str]:
    """Names of the parameters with a gradient that is not zero."""
    return {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and bool((p.grad != 0).any())
    }


@pytest.mark.parametrize("architecture", ALL)
def test_every_part_trains(architecture: Architecture) -> None:
    model = model_of(architecture)
    b = batch([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], units=2)
    rows = b["media_kind"] + 1
    b |= {"media_corpus": rows, "caption_corpus": rows.unsqueeze(1).expand_as(b["input_ids"])}
    model(**b).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    left = trained - reached(model)
    assert left <= {"text.bert.embeddings.token_type_embeddings.weight"}, left


def test_encoders_of_each_kind_share_nothing() -> None:
    """A batch of one kind reaches its encoder and no other's; no tensor is in two encoders."""
    model = model_of("per-modality")
    for number, kind in enumerate(MODALITIES):
        model.zero_grad()
        model(**batch([number] * 3)).loss.backward()
        encoders = {
            "image" if name.startswith("encoder.vit") else name.split(".")[1]
            for name in reached(model)
            if name.startswith(("encoder.", "others."))
        }
        assert encoders == {kind}
    vits = [model.encoder.vit, *model.others.values()]
    places = [{p.data_ptr() for p in vit.parameters()} for vit in vits]
    assert sum(map(len, places)) == len(set.union(*places)) == 5 * len(places[0])


def test_each_unit_goes_through_its_own_encoder_in_any_order() -> None:
    model = model_of("per-modality").eval()
    mixed = batch([3, 0, 1, 0, 4, 2])
    with torch.inference_mode():
        features = model.encoder.features(mixed["pixel_values"])
        units = Units.of(mixed["media_kind"], mixed["media_units"])
        tokens = model.unit_tokens(features, units)
        seen = model.encoder.seen(features)
        for row, kind in enumerate(mixed["media_kind"].tolist()):
            vit = model.encoder.vit if kind == 0 else model.others[KINDS[kind]]
            assert torch.allclose(
                tokens[row], vit.forward_features(seen[row : row + 1])[0], atol=1e-5
            )


@pytest.mark.parametrize("architecture", ALL)
def test_without_a_picture_encoder_the_pixels_alone_are_read(architecture: Architecture) -> None:
    """A ViT sees the pretrained stem's channels; the others see the pixels behind them."""
    model = model_of(architecture).eval()
    b = batch([3, 1, 1, 0])
    with torch.inference_mode():
        features = model.encoder.features(b["pixel_values"])
        units = Units.of(b["media_kind"], b["media_units"])
        tokens = model.unit_tokens(features, units)
        reach = []
        for part in (slice(0, -PIXELS), slice(-PIXELS, None)):
            other = features.clone()
            other[:, part] += torch.randn_like(other[:, part])
            reach.append(not torch.allclose(model.unit_tokens(other, units), tokens, atol=1e-5))
    assert reach == ([False, True] if architecture.startswith("text") else [True, False])


def test_the_pixels_of_a_cell_are_the_pictures() -> None:
    stem = CoarseStem("test_efficientnet", 64, 2).eval()
    picture = torch.randn(1, 3, 2 * PATCH, 2 * PATCH)
    large = torch.nn.functional.interpolate(picture, scale_factor=2)
    with torch.inference_mode():
        features = stem(large)
    assert features.shape == (1, stem.seen_dim + PIXELS, 2, 2)
    cell = features[0, -PIXELS:, 0, 1].view(3, PATCH, PATCH)
    assert torch.allclose(cell, picture[0, :, :PATCH, PATCH:], atol=1e-6)


def test_a_decoder_looks_back_alone() -> None:
    """The last cell changes [CLS], which comes after it, and no cell before."""
    moved = {}
    for architecture in ("text-encoder", "text-decoder"):
        model = model_of(architecture).eval()
        with torch.inference_mode():
            features = model.encoder.features(batch([0])["pixel_values"])
            other = features.clone()
            other[:, -PIXELS:, -1, -1] += torch.randn(PIXELS)
            before, after = (model.unit_tokens(x, None) for x in (features, other))
        moved[architecture] = ((before - after).abs().amax(-1) > 1e-6)[0].tolist()
    assert moved["text-encoder"] == [True] * 5
    assert moved["text-decoder"] == [True, False, False, False, True]


@pytest.mark.parametrize("architecture", ["text-decoder", "vit-llm"])
def test_a_decoder_reads_to_the_last_word(architecture: Architecture) -> None:
    model = model_of(architecture).eval()
    ids, mask = captions(1, length=6)
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=ids.dtype)], 1)
    seen = torch.cat([mask, torch.zeros(1, 3, dtype=mask.dtype)], 1)
    other = ids.clone()
    other[0, 5] = ids[0, 5] % 100 + 6
    with torch.inference_mode():
        alone = model.encode_text(ids, mask)
        last = model.text(ids, backwards(mask[:, :0], 6))[:, -1]
        by_hand = torch.nn.functional.normalize(model.text_projection(last), dim=-1)
        assert torch.allclose(alone, by_hand, atol=1e-5)
        assert torch.allclose(alone, model.encode_text(padded, seen), atol=1e-5)
        assert not torch.allclose(alone, model.encode_text(other, mask), atol=1e-3)


def test_one_transformer_has_one_width() -> None:
    config = MicoConfig.tiny(concepts=False)
    with pytest.raises(ConfigError, match="depth must be 0 and embed_dim must be 32"):
        ARCHITECTURES["text-encoder"](config)

"""OmniEncoder: units to tokens, alone or in a batch, from pixels or from cached features."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.model.config import MicoConfig, MicoEncoderConfig
from mico_chat.model.encoder import COLOUR_CELLS, OmniEncoder
from tests.tiny import SIDE


@pytest.fixture(scope="module")
def encoder() -> OmniEncoder:
    torch.manual_seed(0)
    return OmniEncoder(MicoConfig.tiny().encoder_config).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_tokens_are_a_prefix_and_a_grid(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    tokens = encoder(encoder.features(pixels))
    assert tokens.shape == (3, encoder.n_prefix + encoder.grid**2, encoder.embed_dim)
    assert (encoder.n_prefix, encoder.grid, encoder.embed_dim) == (1, 2, 32)


def test_cached_features_equal_pixels(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    units = torch.tensor([1, 2])
    cached = encoder.features(pixels)
    torch.testing.assert_close(encoder.unit_features(pixels, None, units), cached)
    torch.testing.assert_close(encoder.unit_features(None, cached, units), cached)


def test_the_stem_keeps_colours_of_a_cell(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    features = encoder.features(pixels)
    colours = F.pixel_shuffle(features[:, -3 * COLOUR_CELLS**2 :], COLOUR_CELLS)
    torch.testing.assert_close(colours, F.adaptive_avg_pool2d(pixels, encoder.grid * COLOUR_CELLS))
    assert encoder.stem is not None
    assert features.shape[1] == encoder.stem.out_dim


def test_wrong_units_are_refused(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="sum to 4 but there are 3 units"):
        encoder.unit_features(pixels, None, torch.tensor([2, 2]))
    for given, cached in ((pixels, encoder.features(pixels)), (None, None)):
        with pytest.raises(ModelError, match="either"):
            encoder.unit_features(given, cached, torch.tensor([3]))


def test_a_plain_vit_has_no_stem() -> None:
    torch.manual_seed(0)
    config = MicoEncoderConfig(architecture="vit_tiny_patch16_224", image_size=SIDE)
    encoder = OmniEncoder(config).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert encoder.stem is None
    assert encoder.features(pixels) is pixels
    assert encoder(pixels).shape == (1, 1 + 16, 192)

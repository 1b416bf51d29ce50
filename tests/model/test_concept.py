"""ConceptAttention: posteriors mix word embeddings as computed by hand; simulated things."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mico_chat.errors import ModelError
from mico_chat.model.concepts import ConceptAttention, build_concepts
from mico_chat.model.config import MicoChatConfig, MicoEncoderConfig
from mico_chat.model.encoder import OmniEncoder
from tests.tiny import SIDE, chat_model

VISUAL, SOUND, TOKENS = 3, 2, 2


@pytest.fixture
def concepts() -> ConceptAttention:
    found = chat_model().concepts
    assert found is not None
    with torch.no_grad():
        found.log_scale.copy_(torch.tensor([0.3, -0.2, 0.1]))
        found.gain.copy_(torch.tensor([1.5, 0.7]))
    return found


@pytest.fixture
def table() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(256, 8)


def test_visual_tokens_are_the_posterior_mix(
    concepts: ConceptAttention, table: nn.Embedding
) -> None:
    cells = torch.randn(1, 4, VISUAL, generator=torch.Generator().manual_seed(2))
    # Names: (10), (11), (12, 13).
    p = (cells.mean(1) * torch.tensor(0.3).exp()).softmax(-1)[0]
    w = table.weight
    first = p[0] * w[10] + p[1] * w[11] + p[2] * w[12]
    second = p[2] * w[13] / max(float(p[2]), 0.5)  # a token that few names have stays small
    expected = torch.stack([first, second]) * 1.5
    torch.testing.assert_close(concepts.visual_tokens(cells, table)[0], expected)


def test_sound_tokens_use_the_sound_names(concepts: ConceptAttention, table: nn.Embedding) -> None:
    logits = torch.tensor([[1.0, -1.0]])
    p = (logits * torch.tensor(0.1).exp()).softmax(-1)[0]
    tokens = concepts.sound_tokens(logits, table)[0]
    torch.testing.assert_close(tokens[0], (p[0] * table.weight[14] + p[1] * table.weight[11]) * 1.5)
    torch.testing.assert_close(tokens[1], torch.zeros(8))  # no sound name has a second token


def test_cell_values_say_what_stands_in_each_cell(
    concepts: ConceptAttention, table: nn.Embedding
) -> None:
    cells = torch.randn(1, 4, VISUAL, generator=torch.Generator().manual_seed(3))
    p = (cells * torch.tensor(-0.2).exp()).softmax(-1)[0]
    names = torch.stack([table.weight[10], table.weight[11], table.weight[[12, 13]].mean(0)])
    torch.testing.assert_close(concepts.cell_values(cells, table)[0], p @ names * 0.7)


def test_each_sound_of_a_batch_equals_itself_alone(concepts: ConceptAttention) -> None:
    torch.manual_seed(0)
    features = torch.randn(5, concepts.last_dim + concepts.mid_dim, 2, 2)
    together = concepts.sound_logits(features, torch.tensor([2, 3]))
    alone = [
        concepts.sound_logits(features[:2], torch.tensor([2])),
        concepts.sound_logits(features[2:], torch.tensor([3])),
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_concepts_need_a_stem() -> None:
    config = MicoEncoderConfig(architecture="vit_tiny_patch16_224", image_size=SIDE)
    with pytest.raises(ModelError, match="stem"):
        build_concepts(MicoChatConfig.tiny().concept_config, OmniEncoder(config))
    assert build_concepts(None, OmniEncoder(config)) is None

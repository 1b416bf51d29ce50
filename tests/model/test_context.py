"""MultimodalContext: which rows of which tables are added to which tokens."""

from __future__ import annotations

import pytest
import torch

from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoContextConfig
from mico_chat.model.context import MultimodalContext


@pytest.fixture
def context() -> MultimodalContext:
    torch.manual_seed(0)
    return MultimodalContext(MicoContextConfig(max_units=3, n_corpus_pairs=2), embed_dim=4)


def test_modality_and_unit_are_added_to_every_token(context: MultimodalContext) -> None:
    image, video = KINDS.index("image"), KINDS.index("video")
    tokens = torch.zeros(3, 5, 4)
    out = context(tokens, torch.tensor([image, video]), torch.tensor([1, 2]))
    for unit, (kind, number) in enumerate([(image, 0), (video, 0), (video, 1)]):
        row = context.modality.weight[kind] + context.context.weight[kind * 3 + number]
        torch.testing.assert_close(out[unit], row.expand(5, 4))  # eq. (1) and E_M


def test_units_beyond_the_table_share_its_last_row(context: MultimodalContext) -> None:
    out = context(torch.zeros(5, 1, 4), torch.tensor([2]), torch.tensor([5]))
    assert not torch.equal(out[1], out[2])
    torch.testing.assert_close(out[3], out[2])
    torch.testing.assert_close(out[4], out[2])


def test_tables_start_small(context: MultimodalContext) -> None:
    for table in (context.modality, context.context, context.sampling):
        assert table.weight.std() < 0.04

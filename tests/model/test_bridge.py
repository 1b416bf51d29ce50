"""PerceiverBridge: context tokens of each layout; places; frames and their values."""

from __future__ import annotations

import pytest
import torch

from mico_chat.model.bridge import PerceiverBridge
from mico_chat.model.config import MediaLayout, MicoBridgeConfig
from mico_chat.model.encoder import cell_centres

GRID, PREFIX, WIDTH, LLM = 4, 1, 16, 12
TOKENS = PREFIX + GRID**2


@pytest.fixture
def bridge() -> PerceiverBridge:
    torch.manual_seed(0)
    config = MicoBridgeConfig(
        hidden_size=16, num_heads=2, depth=1, still_grid=3, still_global=2, frame_grid=2
    )
    return PerceiverBridge(config, WIDTH, GRID, PREFIX, LLM).eval()


@pytest.mark.parametrize(
    ("layout", "kind", "units", "length"),
    [("still", 0, 1, 11), ("slices", 1, 3, 11), ("frames", 2, 5, 20)],
)
def test_lengths(
    bridge: PerceiverBridge, layout: MediaLayout, kind: int, units: int, length: int
) -> None:
    tokens = torch.randn(2, units, TOKENS, WIDTH)
    assert bridge(tokens, torch.tensor([kind, kind]), layout).shape == (2, length, LLM)


def test_a_frames_queries_look_at_their_frame(bridge: PerceiverBridge) -> None:
    torch.nn.init.zeros_(bridge.change.weight)  # which tells how all frames differ from their mean
    tokens = torch.randn(1, 3, TOKENS, WIDTH)
    changed = tokens.clone()
    changed[:, 1] += 1.0 * torch.randn(TOKENS, WIDTH)
    kind = torch.tensor([2])
    before, after = (bridge(t, kind, "frames").unflatten(1, (3, 4))[0] for t in (tokens, changed))
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_change_is_of_what_moves(bridge: PerceiverBridge) -> None:
    still = torch.randn(1, 1, TOKENS, WIDTH).expand(-1, 3, -1, -1)
    moving, kind = torch.randn(1, 3, TOKENS, WIDTH), torch.tensor([2])
    before = [bridge(tokens, kind, "frames") for tokens in (still, moving)]
    with torch.no_grad():
        bridge.change.weight.mul_(-2.0)
    after = [bridge(tokens, kind, "frames") for tokens in (still, moving)]
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_frames_know_when_they_are(bridge: PerceiverBridge) -> None:
    still = torch.randn(1, 1, TOKENS, WIDTH).expand(-1, 2, -1, -1)  # one frame, shown twice
    first, second = bridge(still, torch.tensor([2]), "frames").unflatten(1, (2, 4))[0]
    assert not torch.allclose(first, second)


def test_queries_look_around_their_place(bridge: PerceiverBridge) -> None:
    """A value in one corner reaches the query anchored there most."""
    values = torch.zeros(1, 1, TOKENS, LLM)
    values[0, 0, PREFIX] = 1.0  # the upper left cell
    tokens = torch.zeros(1, 1, TOKENS, WIDTH)
    kind = torch.tensor([0])
    added = bridge(tokens, kind, "still", values) - bridge(tokens, kind, "still")
    reached = added[0, :9, 0]
    assert reached.argmax() == 0
    assert reached[0] > 10 * reached[8]  # lower right


def test_cell_centres() -> None:
    torch.testing.assert_close(
        cell_centres(2), torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    )


def test_queries_start_apart() -> None:
    torch.manual_seed(0)
    config = MicoBridgeConfig(hidden_size=64, num_heads=2, depth=2, still_grid=3, still_global=2)
    bridge = PerceiverBridge(config, encoder_dim=48, grid=7, n_prefix=1, llm_dim=32)
    out = bridge(torch.randn(4, 1, 50, 48), torch.zeros(4, dtype=torch.long), "still")
    apart = out.std(dim=1).mean() / out.pow(2).mean().sqrt()
    assert float(apart.detach()) > 0.5  # 0.05 where all queries have become one


def test_a_place_may_have_a_token_for_its_name_and_one_for_the_rest() -> None:
    """What is looked up stands before what is true of it; the global queries keep one token."""
    torch.manual_seed(0)
    config = MicoBridgeConfig(
        hidden_size=16, num_heads=2, depth=1, still_grid=3, still_global=2, place_tokens=2
    )
    bridge = PerceiverBridge(config, WIDTH, GRID, PREFIX, LLM).eval()
    tokens, kind = torch.randn(1, 1, TOKENS, WIDTH), torch.tensor([0])
    values = torch.randn(1, 1, TOKENS, LLM)
    plain, looked = bridge(tokens, kind, "still"), bridge(tokens, kind, "still", values)
    assert plain.shape == (1, config.n_still, LLM)
    moved = (plain != looked).any(-1)[0].tolist()
    assert moved == [True, False] * 9 + [True, True]

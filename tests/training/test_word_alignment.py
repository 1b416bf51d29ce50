"""Stage 2's word objective: context tokens near the vectors of the caption's words."""

from __future__ import annotations

from pathlib import Path

import torch

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_training.stages import train_stage2
from mico_training.word_alignment import word_loss
from tests.training.test_runs import logged, moved, write_recipe

TABLE = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)) * 0.1
LABELS = torch.tensor([[-100, 3, 4, -100], [-100, 5, 5, 6]])
ROWS = torch.tensor([0, 0, 1, 1, 1])
ONE = torch.tensor(1.0)


def loss(words: list[int], rows: torch.Tensor = ROWS, labels: torch.Tensor = LABELS) -> float:
    return float(word_loss(TABLE[words], rows, labels, TABLE, ONE))


def test_tokens_that_are_the_right_words_cost_least() -> None:
    right, swapped = loss([3, 4, 5, 6, 6]), loss([5, 6, 3, 4, 4])
    assert right < loss([9, 9, 9, 9, 9]) < swapped
    assert right < 1.0


def test_the_order_of_tokens_and_rows_does_not_count() -> None:
    turn = torch.tensor([4, 1, 0, 3, 2])
    words = torch.tensor([3, 4, 5, 6, 6])[turn].tolist()
    assert abs(loss(words, ROWS[turn]) - loss([3, 4, 5, 6, 6])) < 1e-5


def test_a_row_without_media_has_no_loss() -> None:
    more = torch.cat([LABELS, torch.tensor([[-100, 3, 6, -100]])])
    context = TABLE[[3, 4, 5, 6, 6]].clone().requires_grad_(True)
    value = word_loss(context, ROWS, more, TABLE, ONE)
    value.backward()
    assert torch.isfinite(value)
    assert context.grad is not None
    assert torch.isfinite(context.grad).all()


def test_a_word_that_all_captions_have_counts_less() -> None:
    labels = torch.tensor([[3, 4], [3, 5]])
    rows = torch.tensor([0, 1])
    common, own = loss([3, 3], rows, labels), loss([4, 5], rows, labels)
    assert own < common


def test_the_stage_trains_the_bridge_alone(tmp_path: Path, shards: Path, tiny_chat: Path) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat, stage2={"objective": "words"})
    train_stage2(recipe)
    history = logged(tmp_path)
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    for entry in history:
        assert entry["region_loss"] > 0
        assert abs(entry["loss"] - entry["word_loss"] - entry["region_loss"]) < 1e-4
    changed = moved(MicoChatForConditionalGeneration, tiny_chat, tmp_path / "out")
    assert changed
    assert all(name.startswith("bridge.") for name in changed)

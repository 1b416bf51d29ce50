"""The text branch's fused attention gives what plain attention gives, under every mask."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mico_chat.model import text_branch
from mico_chat.model.config import MicoContextConfig, MicoTextConfig
from mico_chat.model.text_branch import TextBranch, attention_on, backwards

WIDTH, TEXT, CONTEXT = 32, 9, 21


@pytest.fixture
def branch() -> TextBranch:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 64}
    config = MicoTextConfig(**sizes, num_attention_heads=4, num_hidden_layers=2)
    return TextBranch(config, WIDTH, MicoContextConfig())


def padded(length: int, *lengths: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths).unsqueeze(1)


PREFIXES = padded(0, 0, 0, 0), padded(4, 4, 2, 1)
OVER = padded(CONTEXT, CONTEXT, 4, 0)
"""The last sample has no media at all."""


def hidden(
    branch: TextBranch, mask: Tensor, over: Tensor | None, *, half: bool = False
) -> tuple[Tensor, Tensor]:
    """The hidden states, and the gradient of the word vectors."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (3, TEXT), generator=generator)
    context = torch.randn(3, CONTEXT, WIDTH, generator=generator)
    media = () if over is None else (context, over)
    branch.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        found = branch(ids, mask, *media)
    found.square().mean().backward()
    assert branch.table.weight.grad is not None
    return found.detach(), branch.table.weight.grad.clone()


@pytest.mark.parametrize("over", [None, OVER])
@pytest.mark.parametrize(
    "mask",
    [padded(TEXT, TEXT, 5, 1), *(backwards(x, TEXT) for x in PREFIXES)],
)
def test_fused_attention_equals_plain_attention(
    branch: TextBranch, monkeypatch: pytest.MonkeyPatch, mask: Tensor, over: Tensor | None
) -> None:
    used = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def noted(*given: Tensor, **options: object) -> Tensor:
        used.append(given)
        return fused(*given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    plain, in_half = hidden(branch, mask, over), hidden(branch, mask, over, half=True)
    assert not used
    monkeypatch.setattr(text_branch, "attention_on", lambda device: "sdpa")
    torch.testing.assert_close(hidden(branch, mask, over), plain, rtol=0, atol=1e-5)
    assert len(used) == 2 * (1 if over is None else 2), "in each layer, for words and for media"
    half = hidden(branch, mask, over, half=True)
    torch.testing.assert_close(half, in_half, rtol=0, atol=0.05)


def test_attention_is_fused_but_on_a_cpu() -> None:
    on = {name: attention_on(torch.device(name)) for name in ("cuda", "mps", "cpu")}
    assert on == {"cuda": "sdpa", "mps": "sdpa", "cpu": "eager"}

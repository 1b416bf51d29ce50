"""The objectives over two processes, and in chunks: negatives, losses and gradients are of all."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoConfig
from mico_chat.model.losses import (
    Context,
    caption_key,
    contrastive,
    fetch_rows,
    gather_rows,
    matching,
    of_one_length,
)
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import Corpora
from mico_training.build_model import compile_layers
from mico_training.parallel import layers
from mico_training.parts import chunks
from mico_training.parts.chunks import run_by_chunks
from tests.mico_training.test_parallel import likeliest, run
from tests.support.tiny import SIDE, pretraining_model

pytestmark = pytest.mark.slow

IMAGE, VIDEO = KINDS.index("image"), KINDS.index("video")
UNITS = [1, 1, 2, 1]
LENGTHS = [4, 3, 6, 5]
"""Rank 0 has the shorter captions and contexts."""


def batch(rows: slice, equal: int = 0, corpora: Sequence[int] = (0, 0, 0, 0)) -> dict[str, Tensor]:
    """Some ``rows`` of a batch of four media with their captions, of which the first are equal."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 2, 3, SIDE, SIDE, generator=generator)
    ids = torch.randint(5, 30, (4, 6), generator=generator)
    ids[:equal] = ids[0].clone()
    lengths = torch.tensor([3] * equal + LENGTHS[equal:])[rows]
    units = UNITS[rows]
    longest = int(lengths.max())
    corpus = torch.tensor(corpora)[rows]
    mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
    return {
        "pixel_values": torch.cat([p[:n] for p, n in zip(pixels[rows], units, strict=True)]),
        "media_kind": torch.tensor([IMAGE if n == 1 else VIDEO for n in units]),
        "media_units": torch.tensor(units),
        "media_row": torch.arange(len(units)),
        "input_ids": ids[rows, :longest] * mask,
        "attention_mask": mask,
        "caption_corpus": corpus.unsqueeze(1) * mask,
        "media_corpus": corpus,
    }


def found(model: MicoForPretraining, rows: slice, **chosen: Any) -> dict[str, Tensor]:
    """The loss of the three objectives, and its gradients."""
    loss = model(**batch(rows, **chosen)).loss
    loss.backward()
    of = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return of | {"loss": loss.detach()}


def new_model(chunk: int = 0) -> MicoForPretraining:
    config = MicoConfig.tiny()
    config.context_config.contrastive_sampling, config.text_config.projection = True, "mlp"
    model = pretraining_model(config=config)
    model.train(False)
    model.objective_weights = {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
    model.config.mask_probability = 1.0  # no chance, too
    model.smoothing = 0.1
    if chunk:
        model.encoder.requires_grad_(False).vit.blocks.requires_grad_(True)  # no batch norm
        run_by_chunks(model, chunk)
        model.requires_grad_(True)
    return model


CASES: list[dict[str, Any]] = [
    {},
    {"corpora": (1, 2, 3, 1)},  # two samples have a corpus of their own each
    {"equal": 4},  # no negative anywhere
    {"equal": 2, "corpora": (1, 1, 0, 0)},  # none on rank 0
]


def in_halves(answer: Path) -> None:
    """The losses and mean gradients of two processes with half of each batch."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.multinomial = likeliest  # type: ignore[assignment]
    results = []
    for chunk, case in product((0, 1), CASES):
        half = found(new_model(chunk), slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2), **case)
        for value in half.values():
            dist.all_reduce(value)
            value /= 2
        results.append(half)
    if dist.get_rank() == 0:
        torch.save(results, answer)


def test_two_ranks_learn_as_one_process_with_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(2, in_halves, tmp_path / "answer.pt")
    drawn: list[Tensor] = []

    def noted(weights: Tensor, n: int) -> Tensor:
        drawn.append(likeliest(weights, n).squeeze(1))
        return drawn[-1].unsqueeze(1)

    monkeypatch.setattr(torch, "multinomial", noted)
    whole = [found(new_model(), slice(0, 4), **case) for case in CASES]
    other = [bool((chosen[:2] >= 2).any() or (chosen[2:] < 2).any()) for chosen in drawn]
    assert all(other[:4]), "some negatives are on the other rank"
    for ours, expected in zip(torch.load(tmp_path / "answer.pt"), whole * 2, strict=True):
        assert set(ours) == set(expected)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_chunks_have_the_gradients_of_the_whole_batch(case: dict[str, Any]) -> None:
    whole, *chunked = (of_seed(new_model(chunk).double(), **case) for chunk in (0, 1, 2, 3, 9))
    for one in chunked:
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-6)


def of_seed(model: MicoForPretraining, **case: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)  # of the negatives
    return found(model, slice(0, 4), **case)


def dropped(chunk: int) -> dict[str, Tensor]:
    model = new_model(chunk)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
            module.train()
    torch.manual_seed(2)
    return found(model, slice(0, 4))


def test_a_chunk_that_runs_again_drops_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    again = dropped(2)
    monkeypatch.setattr(chunks, "checkpoint", lambda work, *given, use_reentrant: work(*given))
    kept = dropped(2)
    torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(kept["loss"], found(new_model(2), slice(0, 4))["loss"]), "it drops"


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are those that the C++ compiler would take minutes for."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = MicoConfig.tiny()
    config.encoder_config.depth = config.text_config.num_hidden_layers = 1
    both = []
    for compiled in (False, True):
        model = pretraining_model(config=config)
        model.train(False)
        model.objective_weights = {"contrastive": 1.0, "caption": 1.0}
        if compiled:
            compile_layers(model, "compile")
            assert all(layer._compiled_call_impl is not None for layer in layers(model))
        both.append(of_seed(model))
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-4)


def test_a_smoothed_target_is_spread_over_all_but_equal_captions() -> None:
    generator = torch.Generator().manual_seed(3)
    media, text = (torch.randn(4, 8, generator=generator) for _ in range(2))
    media, text = (torch.nn.functional.normalize(x, dim=1) for x in (media, text))
    temperature = torch.tensor(0.07)
    scores = media @ text.T / temperature
    both = [
        torch.nn.functional.cross_entropy(x, torch.arange(4), label_smoothing=0.1)
        for x in (scores, scores.T)
    ]
    found, *_ = contrastive(media, text, torch.arange(4), temperature, 0.1)
    torch.testing.assert_close(found, sum(both) / 2)
    key = caption_key(*(batch(slice(0, 4), 2)[name] for name in ("input_ids", "attention_mask")))
    with_equal, *_ = contrastive(media, text, key, temperature, 0.1)
    plain, *_ = contrastive(media, text, key, temperature)
    others = [
        (scores[i][key != key[i]], scores.T[i][key != key[i]], scores[i, i]) for i in range(4)
    ]
    spread = [
        (torch.cat([own, one.view(1)]).log_softmax(0).mean()) / -2
        for *two, one in others
        for own in two
    ]
    expected = 0.9 * plain + 0.1 * sum(spread) / 4
    torch.testing.assert_close(with_equal, expected)


def of_other_rank(answer: Path) -> None:
    """What rank 0 matches, where all that is similar is on rank 1; and how rows travel."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    model, rank = new_model(), dist.get_rank()
    calls: list[tuple[Any, ...]] = []

    def noted(*given: Any) -> Tensor:
        calls.append(given)
        return model.match(*given)

    width = model.config.text_config.hidden_size
    rows = torch.arange(2) + 2 * rank
    ids = (rows + 10).unsqueeze(1).expand(2, 3 + rank)
    context = (rows + 1.0).view(2, 1, 1).expand(2, 5 - rank, width).clone().requires_grad_()
    similarity = torch.zeros(2, 4)
    similarity[:, 2 * (1 - rank)] = 40.0  # the first row of the other rank
    seen = torch.ones(context.shape[:2], dtype=torch.bool)
    corpora = Corpora(torch.zeros_like(ids), torch.zeros(seen.shape, dtype=torch.long))
    captions = (ids, torch.ones_like(ids))
    shown = Context(context, seen, corpora)
    matching(noted, captions, shown, [similarity] * 2, 1.0, 6).backward()
    assert context.grad is not None
    dist.barrier()

    table = torch.arange(6.0).view(3, 2) + 10 * rank
    table.requires_grad_()
    wanted = torch.tensor([[5, 0, 5], [1, 0, 0]])[rank]  # nobody wants rows 2 to 4
    (fetched,) = fetch_rows(wanted, table)
    fetched.mul(torch.tensor([1.0, 2.0, 4.0]).view(3, 1) * (rank + 1)).sum().backward()
    summed = gather_rows(table)
    (padded,) = of_one_length(torch.ones(2, 1 + rank, 3))
    kept = {"ids": calls[0][0], "context": calls[0][2], "seen": calls[0][3], "grad": context.grad}
    kept |= {"fetched": fetched, "table_grad": table.grad, "all": summed, "padded": padded}
    torch.save({name: value.detach() for name, value in kept.items()}, answer / str(rank))


def test_the_hardest_negative_is_taken_from_another_rank(tmp_path: Path) -> None:
    run(2, of_other_rank, tmp_path)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for rank, one in enumerate(ranks):
        own, far = [10 + 2 * rank, 11 + 2 * rank], 12 - 2 * rank
        assert one["ids"][:, 0].tolist() == [*own, far, far, *own]
        assert one["context"][:, 0, 0].tolist() == [n - 9 for n in (*own, *own, far, far)]
        assert one["ids"].shape == (6, 4)
        assert one["context"].shape[1] == 5
        assert one["seen"].sum(1).tolist() == [5 - rank] * 4 + [4 + rank] * 2
    # Its medium learns from the other rank's pairs as well.
    assert (ranks[0]["grad"][0].abs().sum() > 0).all()
    assert ranks[0]["fetched"][:, 0].tolist() == [14, 0, 14]
    assert ranks[1]["fetched"][:, 0].tolist() == [2, 0, 0]
    assert ranks[0]["table_grad"][:, 0].tolist() == [2 + 4 + 8, 2, 0]
    assert ranks[1]["table_grad"][:, 0].tolist() == [0, 0, 1 + 4]
    assert ranks[0]["all"][:, 0].tolist() == [0, 2, 4, 10, 12, 14]
    assert ranks[0]["padded"].sum(2).tolist() == [[3, 0]] * 2

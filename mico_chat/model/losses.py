"""The objectives of paper 3.4, eq. (4) to (6), over the batches of all processes.

Every rank has ``n`` rows. Rows are counted over all ranks: row ``r · n + i`` is row ``i`` of rank
``r``. On one process nothing is sent. All ranks must make the same calls in the same order.

Legend: B samples of a rank, S text length, N context tokens, d text width, P contrastive width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mico_chat.model.text_branch import Corpora, TextBranch, backwards

Captions = tuple[Tensor, Tensor]
"""They are token ids (B, S) and their mask."""


class Context(NamedTuple):
    """Contexts (B, N, d), filled where ``mask`` (B, N) is true, with the rows of E_Sam of both
    sides."""

    tokens: Tensor
    mask: Tensor
    corpora: Corpora


def caption_key(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A number per caption (B,), equal for equal captions whatever their padding."""
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    words = (input_ids + 1) * attention_mask * (position * 2654435761 % 1000003)
    return words.sum(1)


def all_at_once(compute: Callable[[slice], Any], n: int) -> list[Any]:
    """What a function makes of ``n`` rows; training may run them a few at a time instead."""
    return [compute(slice(0, n))]


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """Rows (n, L, ...) one part after the other, padded with zeros to the largest L."""
    if len(parts) == 1:
        return parts[0]
    longest = max(x.shape[1] for x in parts)
    pads = ((*(0, 0) * (x.dim() - 2), 0, longest - x.shape[1]) for x in parts)
    return torch.cat([F.pad(x, pad) for x, pad in zip(parts, pads, strict=True)])


def contrastive(
    media: Tensor, text: Tensor, key: Tensor, temperature: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (4): symmetric InfoNCE of unit-length vectors (B, P); equal captions, by their keys (B,),
    are no negatives. The share ``smoothing`` of a target is spread evenly over the unequal ones.

    Returns the loss and, for the local rows, the similarities to all texts and media.
    """
    all_media, all_text, all_keys = (gather_rows(x) for x in (media, text, key))
    n = len(media)
    target = torch.arange(n, device=media.device) + ranks()[0] * n
    same = key.unsqueeze(1) == all_keys.unsqueeze(0)
    same[torch.arange(n), target] = False
    temperature = temperature.clamp(0.01, 0.5)
    to_text = (media @ all_text.T / temperature).masked_fill(same, float("-inf"))
    to_media = (text @ all_media.T / temperature).masked_fill(same, float("-inf"))
    loss = (F.cross_entropy(to_text, target) + F.cross_entropy(to_media, target)) / 2
    if smoothing > 0:  # -inf, for the equal ones, is no number to sum up
        likely = (to_text.float().log_softmax(1) + to_media.float().log_softmax(1)) / 2
        likely = likely.masked_fill(same, 0.0).sum(1) / (~same).sum(1)
        loss = (1 - smoothing) * loss - smoothing * likely.mean()
    return loss, to_text.detach(), to_media.detach()


def matching(
    match: Callable[..., Tensor],
    captions: Captions,
    media: Context,
    near: Sequence[Tensor],
    hardness: float,
    n_corpora: int,
    by_rows: Any = all_at_once,
) -> Tensor:
    """Eq. (5): pairs, and negatives drawn in proportion to exp(similarity · hardness).

    ``match`` gives the logits of captions and contexts; ``near`` are the similarities of local
    media to all texts and of local texts to all media; E_Sam has ``n_corpora`` rows. A negative may
    be of any rank. It is of the same corpora as its pair, so that E_Sam gives no answer away. A
    joint sample that is alone with its corpora counts as one without E_Sam.
    """
    n, world = len(media.tokens), ranks()[1]
    corpora, alike = shared_corpora(media.corpora, n_corpora)
    if n * world == 1:  # no negative to draw
        logits = match(*captions, media.tokens, media.mask, corpora)
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    (wrong_text, has_text), (wrong_media, has_media) = (
        hard_negatives(hardness * x.masked_fill(~alike, float("-inf"))) for x in near
    )
    text = torch.stack([*captions, corpora.text], -1)  # (B, S, 3)
    about = torch.stack([media.mask.to(text.dtype), corpora.context], -1)  # (B, N, 2)
    text, context, about = of_one_length(text, media.tokens, about)

    def wrongness(rows: slice) -> Tensor:
        (negative_text,) = fetch_rows(wrong_text[rows], text)
        negative, about_negative = fetch_rows(wrong_media[rows], context, about)
        ids, mask, in_text = torch.cat([text[rows], negative_text, text[rows]]).unbind(-1)
        seen, in_context = torch.cat([about[rows], about[rows], about_negative]).unbind(-1)
        shown = torch.cat([context[rows], context[rows], negative])
        logits = match(ids, mask, shown, seen.bool(), Corpora(in_text, in_context))
        labels = torch.zeros_like(logits)
        labels[: len(negative)] = 1.0
        known = torch.cat([torch.ones_like(has_text[rows]), has_text[rows], has_media[rows]])
        return F.binary_cross_entropy_with_logits(logits[known], labels[known], reduction="sum")

    known = n + has_text.sum() + has_media.sum()
    return mean_over_ranks(by_rows(wrongness, n), known)


def mean_over_ranks(sums: Sequence[Tensor], n: Tensor) -> Tensor:
    """A loss from sums over ``n`` terms: its mean over ranks is that of all ranks' terms."""
    return torch.stack([*sums]).sum() / gather_rows(n.view(1)).float().mean()


def hard_negatives(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """A row of all ranks drawn for each local one (B,), from similarities (B, ranks · B), and
    whether there was one to draw: -inf is none."""
    n, rank = len(similarity), ranks()[0]
    other = torch.ones_like(similarity)
    other[:, rank * n : (rank + 1) * n].fill_diagonal_(0.0)
    weights = similarity.softmax(1).nan_to_num() + 1e-6
    weights = weights.masked_fill(similarity == float("-inf"), 0.0) * other
    none = weights.sum(1, keepdim=True) == 0  # all other captions are the same
    return torch.multinomial(weights + none * other, 1).squeeze(1), ~none.squeeze(1)


def shared_corpora(corpora: Corpora, n: int) -> tuple[Corpora, Tensor]:
    """The rows, of ``n``, without those of samples alone with their corpora; who of all ranks'
    samples has the same (B, ranks · B)."""
    rows = torch.arange(1, n, device=corpora.text.device)
    there = gather_rows((corpora.context.unsqueeze(-1) == rows).any(1).byte())  # (.., rows)
    shared = (there.unsqueeze(1) == there).all(-1).sum(1, keepdim=True) > 1
    there = there * shared
    rank, n = ranks()[0], len(corpora.text)
    own = slice(rank * n, (rank + 1) * n)
    corpora = Corpora(corpora.text * shared[own], corpora.context * shared[own])
    return corpora, (there[own].unsqueeze(1) == there).all(-1)


def captioning(
    text: TextBranch,
    questions: Captions,
    captions: Captions,
    media: Context,
    probability: float,
    mask_token_id: int,
    by_rows: Any = all_at_once,
) -> Tensor:
    """Eq. (6): a share of the words masked, causal attention, media by cross-attention.

    Questions (B, P) are a prefix, P may be 0 (appendix B.2).
    """
    (question_ids, question_mask), (input_ids, attention_mask) = questions, captions
    p = question_ids.shape[1]
    can = attention_mask.bool().clone()
    can[:, 0] = False  # [CLS]
    masked = can & (torch.rand(input_ids.shape, device=input_ids.device) < probability)
    if not bool(masked.any()):
        masked = can
    given = torch.cat([question_ids, input_ids.masked_fill(masked, mask_token_id)], 1)
    seen = backwards(question_mask, given.shape[1])  # a caption's padding is at its end
    in_text = F.pad(media.corpora.text, (p, 0))

    def wrongness(rows: slice) -> Tensor:
        corpora = Corpora(in_text[rows], media.corpora.context[rows])
        hidden = text(given[rows], seen[rows], media.tokens[rows], media.mask[rows], corpora)
        logits = text.logits(hidden[:, p:][masked[rows]]).float()
        return F.cross_entropy(logits, input_ids[rows][masked[rows]], reduction="sum")

    return mean_over_ranks(by_rows(wrongness, len(given)), masked.sum())


# --- rows of other processes, with gradients to each ---------------------------------------------


_ALONE = ContextVar("_ALONE", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within it a loss is that of this process's batch: all processes have the same batch."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks in rank order; ``x`` itself on one rank."""
    world, n = ranks()[1], len(x)
    if world == 1:
        return x
    copies = x.expand(world, *x.shape).flatten(0, 1)
    return cast(Tensor, cast(Any, _Exchange).apply(copies, [n] * world, [n] * world))


def fetch_rows(wanted: Tensor, *everyones: Tensor) -> list[Tensor]:
    """The ``wanted`` rows (w,) of each tensor (n, ...), whose other rows are on the other ranks.

    Only these rows are sent. Each tensor has the same shape on all ranks.
    """
    rank, world = ranks()
    if world == 1:
        return [rows[wanted] for rows in everyones]
    n, device = len(everyones[0]), wanted.device
    row = gather_rows(wanted).cpu().unflatten(0, (world, len(wanted)))
    owner = row // n
    asked = [row[r, owner[r] == rank] % n for r in range(world)]
    sizes = [len(own) for own in asked], torch.bincount(owner[rank], minlength=world).tolist()
    given = torch.cat(asked).to(device)
    # The rows arrive by owner, and in the order of the asking rows from each.
    place = owner[rank].argsort(stable=True).argsort().to(device)
    exchange = cast(Any, _Exchange).apply
    return [exchange(rows[given], *sizes)[place] for rows in everyones]


def of_one_length(*everyones: Tensor) -> list[Tensor]:
    """Rows (n, L, ...), padded with zeros to the largest L of all ranks."""
    if ranks()[1] == 1:
        return list(everyones)
    lengths = torch.tensor([x.shape[1] for x in everyones], device=everyones[0].device)
    dist.all_reduce(lengths, dist.ReduceOp.MAX)
    return [
        end_to_end([x, x.new_empty(0, length, *x.shape[2:])])
        for x, length in zip(everyones, lengths.tolist(), strict=True)
    ]


class _Exchange(torch.autograd.Function):
    """``sent`` and ``received`` are the numbers of rows to and from each rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        ctx.sizes = sent, received
        return _exchanged(x, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        sent, received = ctx.sizes
        return _exchanged(gradients[0], received, sent), None, None


def _exchanged(x: Tensor, sent: list[int], received: list[int]) -> Tensor:
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.contiguous(), received, sent)
    return found

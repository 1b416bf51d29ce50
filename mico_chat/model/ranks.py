"""What an objective takes from the batches of all processes, with gradients to each.

Every rank has ``n`` rows. Rows are counted over all ranks: row ``r · n + i`` is row ``i`` of rank
``r``. On one process nothing is sent. All ranks must make the same calls in the same order.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def ranks() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_rows(x: Tensor) -> Tensor:
    """Rows (n, ...) of all ranks in rank order; ``x`` itself on one rank."""
    return x if ranks()[1] == 1 else cast(Tensor, cast(Any, _Gather).apply(x))


def fetch_rows(wanted: Tensor, *everyones: Tensor) -> list[Tensor]:
    """The ``wanted`` rows (n,) of each tensor (n, ...), whose other rows are on the other ranks.

    Only these rows are sent. Each tensor has the same shape on all ranks.
    """
    rank, world = ranks()
    if world == 1:
        return [rows[wanted] for rows in everyones]
    n, device = len(wanted), wanted.device
    row = gather_rows(wanted).cpu().unflatten(0, (world, n))
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
        F.pad(x, (*(0, 0) * (x.dim() - 2), 0, length - x.shape[1]))
        for x, length in zip(everyones, lengths.tolist(), strict=True)
    ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.new_empty(ranks()[1] * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(found, x.contiguous())
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        own = torch.empty_like(gradients[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(own, gradients[0].contiguous())
        return cast(Tensor, cast(Any, own).unflatten(0, (ranks()[1], -1)).sum(0))


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

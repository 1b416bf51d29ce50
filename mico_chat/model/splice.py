"""The one place where text and context tokens meet.

A prompt's token ids have a placeholder for each context token. :func:`splice` puts the context
tokens there: the forward pass of training and every engine call it. :func:`segments` keeps the same
order without vectors: it is the prompt that an engine is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING, TypeVar

from mico_chat.errors import ModelError
from mico_chat.media.medium import ContextBlock

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDER = -1
"""Stands for a context token among the token ids that an engine computes."""

Segment = tuple[int, ...] | ContextBlock
"""A part of a prompt is token ids or the context tokens of a medium."""

B = TypeVar("B", bound=Sized)


def splice(
    table: Callable[[Tensor], Tensor],
    ids: Tensor,
    context: Sequence[Tensor],
    placeholder: int = PLACEHOLDER,
) -> Tensor:
    """Embeddings (..., S, L) of token ids (..., S) and context tokens.

    ``table`` gives the token vectors of ids. Each ``placeholder`` among the ids is replaced by a
    context token: ``context`` has those of each medium, (n_i, L), in reading order.
    """
    import torch  # here and not above: prompts are made before torch is imported

    is_context = ids == placeholder
    check_counts(int(is_context.sum()), context)
    embeds = table(ids.masked_fill(is_context, 0))
    if not context:
        return embeds
    rows = torch.cat([tokens.to(embeds.device, embeds.dtype) for tokens in context])
    return embeds.masked_scatter(is_context.unsqueeze(-1).to(embeds.device), rows)


def segments(
    ids: Sequence[int], blocks: Sequence[B], placeholder: int
) -> tuple[tuple[int, ...] | B, ...]:
    """Token ids in which a block of context tokens takes the place of each run of placeholders.

    The blocks may be of media that are not encoded yet: their lengths are enough.
    """
    check_counts(ids.count(placeholder), blocks)
    found: list[tuple[int, ...] | B] = []
    at = 0
    for block in blocks:
        start = ids.index(placeholder, at)
        end = start + len(block)
        check_counts(ids[start:end].count(placeholder), [block])
        if start > at:
            found.append(tuple(ids[at:start]))
        found.append(block)
        at = end
    if at < len(ids):
        found.append(tuple(ids[at:]))
    return tuple(found)


def check_counts(n_placeholders: int, context: Sequence[Sized]) -> None:
    """Raise :class:`ModelError` unless there is a placeholder for each context token."""
    n_tokens = sum(len(tokens) for tokens in context)
    if n_placeholders != n_tokens:
        raise ModelError(
            f"{n_placeholders} context placeholders in the prompt but {n_tokens} context tokens"
        )

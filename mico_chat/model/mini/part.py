"""The one protocol of the mini's parts: what is seen of media becomes context tokens.

Legend: B media of one layout and unit count, U units a medium, T tokens a unit, D encoder width,
C stem channels, G grid side, N context tokens a medium, L LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mico_chat.model.context import AlikeMedia
from mico_chat.model.mini.taught import Taught


@dataclass(frozen=True)
class Seen:
    """What a model sees of B alike media, whose kinds are in ``media``.

    ``tokens`` (B, U, T, D) are the encoder's, with their context; ``features`` (B·U, C, G, G) the
    stem's; ``pixels`` (B·U, 3, H, W) are None where the features come from a cache. ``taught`` are
    the names that somebody taught for each medium; without any it is empty.
    """

    media: AlikeMedia
    tokens: Tensor
    features: Tensor
    pixels: Tensor | None
    taught: Sequence[Taught | None] = ()


class Part(Protocol):
    """One way from media to context tokens; a model's tokens are those of its parts in a row."""

    def __call__(self, seen: Seen) -> Tensor | None:
        """Context tokens (B, N, L); None where the part has none for media of this layout."""
        ...

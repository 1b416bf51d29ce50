"""A medium after the encoder: its context tokens, and what a prompt must know of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContextBlock:
    """Context tokens of a medium: ``tokens`` (n, L) in the language model's embedding space.

    ``key`` names the content: blocks of equal keys hold equal tokens.
    """

    tokens: Tensor
    key: bytes

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class EncodedMedium:
    """Stands for a medium: its kind, frames or slices (``units``), a video's sound track.

    ``block`` has its own context tokens; none where features come from elsewhere (training).
    """

    kind: Kind
    units: int
    audio: EncodedMedium | None = None
    block: ContextBlock | None = None
    report: MediaReport = field(default=MediaReport(name="", kind="image"), repr=False)

    @property
    def blocks(self) -> tuple[ContextBlock, ...]:
        """Its context tokens and those of its sound track, in the order of the prompt."""
        own = () if self.block is None else (self.block,)
        return own if self.audio is None else own + self.audio.blocks

    @property
    def n_tokens(self) -> int:
        """How many context tokens it has, those of its sound track included."""
        return sum(len(block) for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all its context tokens."""
        return sum(block.tokens.nbytes for block in self.blocks)

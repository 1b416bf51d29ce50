"""Embeddings that tell the media of one sample apart (paper 3.3).

:class:`MultimodalContext` adds to the encoder's tokens, whose own position table is the shared
E_Pos:

    z_I = [z_1 .. z_L] + E_C^I            eq. (1), which frame or slice
    z   = [z_I + E_M^I, z_A + E_M^A, ..]  modality

E_Sam (eq. 3) is in the text branch, where captions and media meet.

Legend: M media, U units of all media, T tokens a unit, D encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mico_chat.errors import ConfigError, ModelError
from mico_chat.media.kinds import KINDS, TABLE, Layout
from mico_chat.model.config import KIND_ROWS, MicoContextConfig


class KindRows:
    """The row of each kind of medium in a checkpoint's tables (``context_config.kind_rows``).

    A batch numbers the kinds by their places in :data:`KINDS`. A checkpoint knows them by name, so
    that a new kind leaves its tables as they are. Kinds may share a row.

    Raises:
        ConfigError: the rows are not whole numbers from 0 on.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        # A saved configuration has lost the order of the names; those of old kinds come first.
        ordered = sorted(rows.items(), key=lambda one: (one[1], one[0] not in KIND_ROWS, one[0]))
        self.by_name = dict(ordered)
        self.n = len(set(rows.values()))
        if set(rows.values()) != set(range(self.n)) or self.n == 0:
            raise ConfigError(
                f"context_config.kind_rows: expected rows from 0 on without a gap, but got {rows}"
            )

    def __call__(self, kind: Tensor) -> Tensor:
        """Rows of kinds, whatever the shape; :meth:`check` refuses those without one."""
        rows = [self.by_name.get(name, 0) for name in KINDS]
        return torch.tensor(rows, device=kind.device)[kind]

    def corpora(self, corpus: Tensor) -> Tensor:
        """Rows of E_Sam, for 0 (none) or 1 + the number of the kind that a corpus has."""
        rows = [0, *(1 + self.by_name.get(name, -1) for name in KINDS)]
        return torch.tensor(rows, device=corpus.device)[corpus]

    def check(self, kind: Tensor) -> None:
        """Raise :class:`ModelError` if one of the kinds (M,) has no row."""
        if unknown := {KINDS[number] for number in kind.tolist()} - self.by_name.keys():
            raise ModelError(
                f"this checkpoint does not know media of the kind {min(unknown)!r}, only "
                f"{', '.join(self.by_name)}; context_config.kind_rows can give it the row of one "
                "of them"
            )

    @property
    def names(self) -> list[str]:
        """The first kind of each row."""
        first = {row: name for name, row in reversed(self.by_name.items())}
        return [first[row] for row in range(self.n)]


class Units(NamedTuple):
    """For each of U units: the kind of its medium, its place in it, the medium's unit count."""

    kind: Tensor
    place: Tensor
    total: Tensor

    @classmethod
    def of(cls, media_kind: Tensor, media_units: Tensor) -> Units:
        """Units of media with kinds (M,) and unit counts (M,), medium after medium."""
        kind, total, start = (
            torch.repeat_interleave(x, media_units)
            for x in (media_kind, media_units, torch.cumsum(media_units, 0) - media_units)
        )
        return cls(kind, torch.arange(len(kind), device=kind.device) - start, total)


class AlikeMedia(NamedTuple):
    """Media of a batch that share layout and unit count, and so go together.

    ``media`` are their B places in the batch, ``rows`` (B·units,) those of their units.
    """

    media: list[int]
    rows: Tensor
    kind: Tensor
    layout: Layout
    units: int

    @classmethod
    def groups(cls, media_kind: Tensor, media_units: Tensor) -> Iterator[AlikeMedia]:
        starts = (torch.cumsum(media_units, 0) - media_units).tolist()
        found: dict[tuple[Layout, int], list[int]] = {}
        for m, (kind, n) in enumerate(zip(media_kind.tolist(), media_units.tolist(), strict=True)):
            found.setdefault((TABLE[KINDS[kind]].layout, n), []).append(m)
        for (layout, n), media in found.items():
            rows = torch.tensor([starts[m] + i for m in media for i in range(n)])
            yield cls(media, rows.to(media_kind.device), media_kind[media], layout, n)

    def of(self, units: Tensor) -> Tensor:
        """These media's part of the batch's units (U, ...); not a copy if it is all of them."""
        return units if len(self.rows) == len(units) else units[self.rows]


def side_by_side(x: Tensor, row: Tensor, n: int, most: int | None = None) -> Tensor:
    """What belongs to ``n`` samples or media, (R, ...) in ascending order of their numbers ``row``
    (R,), side by side: (n, most, ...), filled up with zeros.

    By default ``most`` is the largest number that one has; those beyond it are left out.
    """
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if most is None else most
    kept = place < most
    found = x.new_zeros(n, most, *x.shape[1:])
    return found.index_put((row[kept], place[kept]), x[kept])


class MultimodalContext(nn.Module):
    """E_M and E_C, learned absolute embeddings of the encoder's width D."""

    def __init__(self, config: MicoContextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.rows = KindRows(config.kind_rows)
        self.modality = nn.Embedding(self.rows.n, embed_dim)  # E_M
        self.context = nn.Embedding(self.rows.n * config.max_units, embed_dim)  # E_C
        for table in (self.modality, self.context):
            # As E_Pos: PyTorch's 1.0 would drown the tokens.
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, media_kind: Tensor, media_units: Tensor) -> Tensor:
        """Tokens (U, T, D) of media with kinds (M,) and unit counts (M,), embeddings added.

        Units beyond ``max_units`` of one medium share the last row.

        Raises:
            ModelError: a kind that the checkpoint does not know.
        """
        self.rows.check(media_kind)
        units, most = Units.of(media_kind, media_units), self.config.max_units
        kind = self.rows(units.kind)
        row = kind * most + units.place.clamp(max=most - 1)
        context, modality = self.config.context, self.config.modality  # whether each is added
        added: Tensor = self.context(row) * context + self.modality(kind) * modality  # (U, D)
        return tokens + added.unsqueeze(1).to(tokens.dtype)

"""Rows of a table: every column is a token, bound to the column's name.

Legend: B rows, F numeric columns, K categorical ones, D encoder width. As in FT-Transformer a
number scales its column's vector, and a category has its own vector. A missing value has a vector
too. The order of columns in a file does not matter.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from mico_chat.errors import ConfigError
from mico_research.modalities.samples import Array, InputSpec, Sample, Statistics, number, spread

MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
"""Files write a missing value so, in upper or lower case."""

STD = 0.5
"""New vectors have this standard deviation, near that of picture tokens (0.74 in the mini)."""

_MOST_CATEGORIES = 100


class NumberColumn(Statistics):
    name: str
    mean: float
    std: float


class CategoryColumn(Statistics):
    """A column of names; a name that training lacked counts as missing."""

    name: str
    values: tuple[str, ...]


class TableInput(InputSpec):
    kind: Literal["table"] = "table"
    numbers: tuple[NumberColumn, ...]
    categories: tuple[CategoryColumn, ...]

    @classmethod
    def fit(cls, samples: Sequence[Sample], categorical: Iterable[str] = ()) -> Self:
        """Columns of training rows: numeric where every value is a number, or else categorical.

        ``categorical`` lists columns whose numbers are names (codes, postal codes).

        Raises:
            ConfigError: a name in ``categorical`` that is no column.
            DataError: a column of text with nearly as many values as rows (a name, an id).
        """
        rows = [_row(sample) for sample in samples]
        unknown = sorted(set(categorical) - set(rows[0]))
        if unknown:
            raise ConfigError(
                f"categorical: the column {unknown[0]!r} is missing; the columns are "
                f"{', '.join(rows[0])}"
            )
        numbers, categories = [], []
        for name in rows[0]:
            cells = [row.get(name, "") for row in rows]
            known = [cell for cell in cells if not _missing(cell)]
            if not known:
                continue  # nothing to learn from
            values = tuple(sorted(set(known)))
            if name not in categorical and all(number(cell) is not None for cell in values):
                array = np.array([float(cell) for cell in known])
                mean, std = spread(array[np.isfinite(array)])
                numbers.append(NumberColumn(name=name, mean=float(mean), std=float(std)))
                continue
            if len(values) > max(_MOST_CATEGORIES, len(rows) // 2):
                raise samples[0].error(
                    f"column {name!r} has {len(values)} different texts in {len(rows)} rows, so it "
                    "looks like a name or an id: list the columns to use in data.columns"
                )
            categories.append(CategoryColumn(name=name, values=values))
        if not numbers and not categories:
            raise samples[0].error("every column is empty")
        return cls(numbers=tuple(numbers), categories=tuple(categories))

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """Standardised ``numbers`` (F,), NaN if missing, and ``categories`` (K,), 0 if missing."""
        row = _row(sample)
        names = [c.name for c in self.numbers] + [c.name for c in self.categories]
        absent = [name for name in names if name not in row]
        if absent:
            raise sample.error(
                f"the column {absent[0]!r} is missing; the columns are {', '.join(row)}"
            )
        numbers = np.full(len(self.numbers), np.nan, dtype=np.float32)
        for place, column in enumerate(self.numbers):
            cell = row[column.name]
            if _missing(cell):
                continue
            value = number(cell)
            if value is None or not np.isfinite(value):
                raise sample.error(f"column {column.name!r}: {cell!r} is not a finite number")
            numbers[place] = (value - column.mean) / column.std
        known = [{v: n for n, v in enumerate(c.values, 1)} for c in self.categories]
        codes = [k.get(row[c.name], 0) for k, c in zip(known, self.categories, strict=True)]
        return {"numbers": numbers, "categories": np.array(codes, dtype=np.int64)}


class TableTokenizer(nn.Module):
    def __init__(self, spec: TableInput, embed_dim: int) -> None:
        super().__init__()
        n = len(spec.numbers)
        self.scale_embed = nn.Parameter(torch.empty(n, embed_dim))
        self.column_embed = nn.Parameter(torch.empty(n, embed_dim))
        self.missing_embed = nn.Parameter(torch.empty(n, embed_dim))
        for table in (self.scale_embed, self.column_embed, self.missing_embed):
            nn.init.trunc_normal_(table, std=STD)
        sizes = [len(column.values) + 1 for column in spec.categories]
        self.first: list[int] = np.cumsum([0, *sizes[:-1]]).tolist() if sizes else []
        self.values = nn.Embedding(max(sum(sizes), 1), embed_dim)
        nn.init.trunc_normal_(self.values.weight, std=STD)

    def forward(self, numbers: Tensor, categories: Tensor) -> tuple[Tensor, None]:
        """(B, F) and (B, K) -> tokens (B, F + K, D), without a mask: no column is left out."""
        missing = numbers.isnan()[..., None]
        scaled = numbers.nan_to_num(0.0)[..., None] * self.scale_embed + self.column_embed
        tokens = torch.where(missing, self.missing_embed, scaled)
        first = torch.tensor(self.first, dtype=categories.dtype, device=categories.device)
        return torch.cat([tokens, self.values(categories + first)], dim=1), None


def _row(sample: Sample) -> Mapping[str, str]:
    if not isinstance(sample.values, Mapping):
        raise sample.error("expected a row with named columns")
    return sample.values


def _missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING

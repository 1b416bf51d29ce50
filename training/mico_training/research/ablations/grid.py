"""The settings that are trained, and the paper's figures beside them: ``grid.yaml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import yaml

from mico_training.research.ablations.architectures import Architecture

Figure = Literal["video", "audio", "image", "average"]
FIGURES: tuple[Figure, ...] = ("video", "audio", "image", "average")
"""The columns of R@1 that the paper has too."""


@dataclass(frozen=True)
class Cell:
    """One setting: what it changes in the recipe, and how many times its steps it trains."""

    name: str
    overrides: tuple[str, ...] = ()
    architecture: Architecture = "shared"
    longer: int = 1


@dataclass(frozen=True)
class Row:
    """A cell in a table. ``paper``: R@1 in per cent in the order of :data:`FIGURES`, or None."""

    cell: Cell
    letter: str
    label: str
    here: str
    paper: tuple[float, ...] | None


@dataclass(frozen=True)
class Table:
    """Rows that differ in one thing, and the pairs of rows (letters) that the paper compares."""

    name: str
    title: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]

    def row(self, letter: str) -> Row:
        return next(row for row in self.rows if row.letter == letter)

    def compared(self, results: Mapping[str, Sequence[object]]) -> bool:
        """Whether at least two of its cells have results."""
        return sum(bool(results.get(row.cell.name)) for row in self.rows) > 1


def _paper(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The paper's R@1, averaged over its data sets of a kind."""
    if "table7" in row:
        *sets, average = row["table7"]
        return fmean(sets[:4]), fmean(sets[4:6]), fmean(sets[6:]), average
    return (*row["table1"], fmean(row["table1"])) if "table1" in row else None


def _tables() -> tuple[Table, ...]:
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    cells = {
        name: Cell(name, tuple(cell.pop("set", ())), **cell)
        for name, cell in content["cells"].items()
    }
    return tuple(
        Table(
            table["name"],
            table["title"],
            tuple(
                Row(cells[row["cell"]], row["letter"], row["label"], row["here"], _paper(row))
                for row in table["rows"]
            ),
            tuple((before, after) for before, after in table["pairs"]),
        )
        for table in content["tables"]
    )


TABLES = _tables()
TABLE = {table.name: table for table in TABLES}


def cells(tables: tuple[Table, ...]) -> list[Cell]:
    """Every cell of some tables once, in their order."""
    return list(dict.fromkeys(row.cell for table in tables for row in table.rows))

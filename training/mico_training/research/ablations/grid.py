"""What is trained: each cell a recipe's overrides; and the paper's figures beside it.

A cell stands in every table that has it (the default in all of them) and is run once. The paper's
figures are means over its data sets of a modality: Table 7's video MSRVTT, VATEX, DiDeMo and MSVD,
audio AudioCaps and ClothoV2, image COCO and Flickr, R@1 of text to medium; and its own average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from mico_training.research.ablations.architectures import Architecture

Figure = Literal["video", "audio", "image", "average"]
FIGURES: tuple[Figure, ...] = ("video", "audio", "image", "average")
"""The columns that the paper has too."""


@dataclass(frozen=True)
class Cell:
    """One setting: what it changes in the recipe.

    ``longer``: how many times the recipe's steps it trains.
    """

    name: str
    overrides: tuple[str, ...] = ()
    architecture: Architecture = "shared"
    longer: int = 1


@dataclass(frozen=True)
class Row:
    """A cell in a table: the paper's letter and name of it, what stands for it here, its figures.

    ``paper``: R@1 in per cent, in the order of :data:`FIGURES`; None for a row of our own.
    """

    cell: Cell
    letter: str
    label: str
    here: str
    paper: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Table:
    """Rows that differ in one thing, and which of them the paper compares (letters)."""

    name: str
    title: str
    rows: tuple[Row, ...]
    pairs: tuple[tuple[str, str], ...]

    def row(self, letter: str) -> Row:
        """The row with a letter."""
        return next(row for row in self.rows if row.letter == letter)

    def compared(self, results: Mapping[str, Sequence[object]]) -> bool:
        """Whether two of its cells at least have results."""
        return sum(bool(results.get(row.cell.name)) for row in self.rows) > 1


def _means(*r1: float) -> tuple[float, float, float, float]:
    """Table 7's nine columns, in its order, to the columns here."""
    *sets, average = r1
    return fmean(sets[:4]), fmean(sets[4:6]), fmean(sets[6:]), average


def _kinds(*kinds: str) -> tuple[str, ...]:
    return (f"data.0.modalities=[{', '.join(kinds)}]",)


def _blocks(width: int, depth: int) -> tuple[str, ...]:
    return (
        f"model.options.encoder_config.embed_dim={width}",
        f"model.options.encoder_config.num_heads={width // 64}",
        f"model.options.encoder_config.depth={depth}",
    )


DEFAULT = Cell("default")
CON = ("stage1.weights.matching=0", "stage1.weights.caption=0")

MODALITIES = Table(
    "modalities",
    "Pretraining modalities (Table 7 a-f)",
    (
        Row(
            Cell("image", _kinds("image")),
            "a",
            "I",
            "pictures alone",
            _means(39.7, 57.3, 38.4, 39.7, 10.2, 4.4, 50.2, 75.7, 39.4),
        ),
        Row(
            Cell("image-3d", _kinds("image", "depth", "normal")),
            "b",
            "I+3D",
            "pictures, depth and normal maps",
            _means(42.0, 58.5, 38.1, 40.1, 10.8, 4.2, 51.2, 76.9, 40.2),
        ),
        Row(
            Cell("image-audio", _kinds("image", "audio")),
            "c",
            "I+A",
            "pictures and sounds",
            _means(37.6, 56.2, 30.8, 36.2, 22.0, 14.5, 46.8, 71.0, 39.4),
        ),
        Row(
            Cell("image-video", _kinds("image", "video")),
            "d",
            "I+V",
            "pictures and clips",
            _means(41.7, 60.9, 39.2, 42.6, 12.2, 5.1, 51.3, 77.0, 41.3),
        ),
        Row(
            Cell("image-video-audio", _kinds("image", "video", "audio")),
            "e",
            "I+V+A",
            "pictures, clips and sounds",
            _means(42.2, 61.1, 40.1, 41.2, 23.4, 15.4, 48.7, 74.2, 43.2),
        ),
        Row(
            DEFAULT,
            "f",
            "I+V+A+3D",
            "all five kinds",
            _means(45.7, 64.0, 42.7, 42.8, 24.6, 15.9, 49.9, 77.1, 45.3),
        ),
    ),
    (("a", "b"), ("a", "c"), ("a", "d"), ("d", "e"), ("c", "e"), ("e", "f"), ("a", "f")),
)

DATA = Table(
    "data",
    "Data scale (Table 7 h-k)",
    (
        Row(
            Cell("data-64th", ("data.0.fraction=0.015625",)),
            "h",
            "1M",
            "1/64 of the samples",
            _means(44.2, 63.2, 40.1, 40.7, 21.9, 11.2, 48.2, 77.5, 43.4),
        ),
        Row(
            Cell("data-16th", ("data.0.fraction=0.0625",)),
            "i",
            "10M",
            "1/16",
            _means(45.7, 64.0, 42.7, 42.8, 24.6, 15.9, 49.9, 77.1, 45.3),
        ),
        Row(
            Cell("data-4th", ("data.0.fraction=0.25",)),
            "j",
            "110M",
            "1/4",
            _means(48.5, 65.7, 41.7, 43.0, 26.3, 17.1, 49.6, 78.1, 46.3),
        ),
        Row(
            DEFAULT,
            "k",
            "334M",
            "all",
            _means(49.1, 66.3, 43.2, 44.1, 27.0, 17.5, 51.5, 80.9, 47.5),
        ),
    ),
    (("h", "i"), ("i", "j"), ("j", "k"), ("h", "k")),
)

CONTRASTIVE = Cell("contrastive", CON)
CONTRASTIVE_LONG = Cell("contrastive-long", CON, longer=3)

OBJECTIVES = Table(
    "objectives",
    "Pretraining process (Table 7 l-n)",
    (
        Row(
            CONTRASTIVE,
            "l",
            "Con",
            "equation 4",
            _means(40.1, 57.4, 39.1, 41.4, 23.1, 14.4, 47.4, 73.7, 42.1),
        ),
        Row(
            Cell("contrastive-matching", ("stage1.weights.caption=0",)),
            "m",
            "Con+Match",
            "equations 4, 5",
            _means(43.9, 61.4, 38.0, 41.6, 23.6, 15.5, 48.8, 74.3, 43.4),
        ),
        Row(
            DEFAULT,
            "n",
            "Con+Match+Gen",
            "equations 4, 5, 6",
            _means(45.7, 64.0, 42.7, 42.8, 24.6, 15.9, 49.9, 77.1, 45.3),
        ),
        Row(
            CONTRASTIVE_LONG,
            "l'",
            "Con, longer",
            f"equation 4, {CONTRASTIVE_LONG.longer} times the steps",
            None,
        ),
    ),
    (("l", "m"), ("m", "n"), ("l", "n"), ("l'", "n")),
)

SIZE = Table(
    "size",
    "Model scale (Table 7 o-q)",
    (
        Row(
            DEFAULT,
            "o",
            "Base-86M",
            "2 layers of 128 on the stem",
            _means(45.7, 64.0, 42.7, 42.8, 24.6, 15.9, 49.9, 77.1, 45.3),
        ),
        Row(
            Cell("large", _blocks(192, 3)),
            "p",
            "Large-331M",
            "3 layers of 192",
            _means(58.2, 72.0, 57.2, 52.8, 31.6, 18.7, 60.8, 87.5, 54.9),
        ),
        Row(
            Cell("giant", _blocks(256, 4)),
            "q",
            "Giant-1.3B",
            "4 layers of 256",
            _means(62.5, 79.9, 61.1, 56.0, 37.4, 20.8, 67.1, 90.7, 59.4),
        ),
    ),
    (("o", "p"), ("p", "q"), ("o", "q")),
)


def _three(vatex: float, audiocaps: float, flickr: float) -> tuple[float, float, float, float]:
    """Table 1's R@1 figures; its others are CIDEr."""
    return vatex, audiocaps, flickr, fmean((vatex, audiocaps, flickr))


_NO_BLOCKS = ("model.options.encoder_config.depth=0",)

ARCHITECTURE = Table(
    "architecture",
    "Architecture (Table 1)",
    (
        Row(
            Cell("per-modality", architecture="per-modality"),
            "i",
            "Modality-specific",
            "a ViT for each kind",
            _three(73.5, 42.3, 88.4),
        ),
        Row(
            Cell("text-encoder", _NO_BLOCKS, "text-encoder"),
            "ii",
            "Text encoder (BERT)",
            "media through the text branch's layers",
            _three(53.2, 23.1, 51.6),
        ),
        Row(
            Cell("text-decoder", _NO_BLOCKS, "text-decoder"),
            "iii",
            "LLM (decoder)",
            "the same, causal",
            _three(60.3, 14.7, 81.3),
        ),
        Row(
            DEFAULT,
            "iv",
            "ViT + LLM",
            "one ViT, a text branch beside it",
            _three(79.5, 49.7, 90.5),
        ),
    ),
    (("i", "iv"), ("ii", "iv"), ("iii", "iv"), ("ii", "i"), ("iii", "i")),
)

TABLES = (OBJECTIVES, MODALITIES, DATA, SIZE, ARCHITECTURE)
"""The first is what matters most, should the time run out."""


def cells(tables: tuple[Table, ...]) -> list[Cell]:
    """Every cell of some tables once, in their order."""
    return list(dict.fromkeys(row.cell for table in tables for row in table.rows))

"""What the ablations vary: the cells of ``grid.yaml`` beside the paper's figures, and Table 1's
architectures as variations of the pretraining model (paper 3.2).

``shared`` is the paper's choice (iv) and the project's model: one ViT for all knowledge modalities,
beside a language branch. The others differ only in where media become tokens and in how a sentence
becomes one vector:

* ``per-modality`` (i): each kind has its own ViT;
* ``text-encoder`` (ii): no ViT. The stem's cells go through the language branch's layers, which
  look both ways;
* ``text-decoder`` (iii): the same, but each token sees only earlier tokens, as in a language model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import torch
import yaml
from torch import Tensor, nn

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig
from mico_chat.model.context import Units
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import Corpora, backwards
from mico_training.records import markdown_table

Architecture = Literal["shared", "per-modality", "text-encoder", "text-decoder"]


class PerModalityEncoders(MicoForPretraining):
    """Table 1 (i): each kind has its own ViT; only the frozen stem is shared.

    ``encoder`` is the ViT of pictures; ``others`` holds the ViTs of all other kinds.
    """

    def __init__(self, config: MicoConfig) -> None:
        super().__init__(config)
        self.others = nn.ModuleDict()
        for kind in self.rows.names[1:]:
            position = config.context_config.position
            self.others[kind] = OmniEncoder(config.encoder_config, position).vit

    def unit_tokens(self, features: Tensor, units: Units) -> Tensor:
        """Each unit through its kind's ViT, (U, T, D)."""
        vits = [self.encoder.vit, *self.others.values()]
        row = self.rows(units.kind)
        chosen = [(row == number).nonzero().squeeze(1) for number in range(self.rows.n)]
        seen = self.encoder.seen(features)
        made = [
            cast(Tensor, cast(Any, vit).forward_features(seen[mine]))
            for vit, mine in zip(vits, chosen, strict=True)
            if len(mine)
        ]
        return torch.cat(made)[torch.cat(chosen).argsort()]


class TextTransformer(MicoForPretraining):
    """Table 1 (ii) and (iii): media and words go through the transformer of the language branch.

    The encoder has no layers: it brings the stem's cells to the text's width and adds positions.

    Raises:
        ConfigError: the encoder has layers, or another width.
    """

    causal = False

    def __init__(self, config: MicoConfig) -> None:
        encoder, text = config.encoder_config, config.text_config
        if encoder.depth or encoder.embed_dim != text.hidden_size:
            raise ConfigError(
                "in one transformer for media and words, encoder_config.depth must be 0 and "
                f"embed_dim must be {text.hidden_size}, as in the text branch; they are "
                f"{encoder.depth} and {encoder.embed_dim}"
            )
        super().__init__(config)

    def unit_tokens(self, features: Tensor, units: Units) -> Tensor:
        """Cells, and [CLS] before them, through the language branch, (U, T, D)."""
        cells = cast(Tensor, self.encoder(features))
        t = cells.shape[1]
        seen = torch.zeros(len(cells), 1, t, t, dtype=cells.dtype, device=cells.device)
        if self.causal:  # [CLS] has to come last, or it would see nothing
            cells = cells.roll(-self.encoder.n_prefix, dims=1)
            later = torch.ones(t, t, dtype=torch.bool, device=cells.device).triu(1)
            seen = seen.masked_fill(later, torch.finfo(cells.dtype).min)
        hidden = self.text.bert(inputs_embeds=cells, attention_mask=seen).last_hidden_state
        return cast(Tensor, hidden.roll(self.encoder.n_prefix, dims=1) if self.causal else hidden)


class TextDecoder(TextTransformer):
    """Table 1 (iii): a token sees only earlier tokens, so the last word stands for a sentence."""

    causal = True

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, *over: Tensor | Corpora | None
    ) -> Tensor:
        """Captions (B, S) in one vector each: the last word's (B, d)."""
        seen = backwards(attention_mask[:, :0], input_ids.shape[1])
        hidden = self.text(input_ids, seen, *over)
        rows = torch.arange(len(hidden), device=hidden.device)
        return cast(Tensor, hidden[rows, attention_mask.sum(1) - 1])


ARCHITECTURES: dict[Architecture, type[MicoForPretraining]] = {
    "shared": MicoForPretraining,
    "per-modality": PerModalityEncoders,
    "text-encoder": TextTransformer,
    "text-decoder": TextDecoder,
}


Figure = Literal["video", "audio", "image", "average"]
FIGURES: tuple[Figure, ...] = ("video", "audio", "image", "average")
"""These columns of R@1 are in the paper too."""


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
    return list(dict.fromkeys(row.cell for table in tables for row in table.rows))


def listed(chosen: Sequence[Cell]) -> str:
    """A Markdown table of cells: where each stands in the tables, and what it changes."""
    rows = []
    for cell in chosen:
        places = [f"{t.name} {row.letter}" for t in TABLES for row in t.rows if row.cell == cell]
        longer = [f"train.steps x {cell.longer}"] if cell.longer > 1 else []
        changed = [*cell.overrides, *longer, *{cell.architecture} - {"shared"}]
        rows.append([cell.name, ", ".join(places), " ".join(changed)])
    return markdown_table(["cell", "in the tables", "what it changes"], rows, texts=3)

"""What the ablations vary: the cells of ``grid.yaml`` beside the paper's figures, and Table 1's
architectures as variations of the pretraining model (paper 3.2).

``shared`` is the project's model: one ViT for all knowledge modalities, beside a language branch
that looks both ways. The others differ only in where media become tokens, and in how a sentence
becomes one vector:

* ``per-modality`` (i): each kind has its own ViT;
* ``text-encoder`` (ii): no ViT. The pixels go through the language branch's layers;
* ``text-decoder`` (iii): the same, but each token sees only earlier tokens, as in a language model;
* ``vit-llm`` (iv): one ViT, and a language branch whose tokens see only earlier tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

import torch
import yaml
from timm.layers import HybridEmbed
from torch import Tensor, nn

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig
from mico_chat.model.context import Units
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import Corpora, backwards
from mico_research.ablations.pretrained import PIXELS
from mico_training.records import markdown_table

Architecture = Literal["shared", "per-modality", "text-encoder", "text-decoder", "vit-llm"]


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

    @property
    def vits(self) -> list[nn.Module]:
        return [self.encoder.vit, *self.others.values()]

    def unit_tokens(self, features: Tensor, units: Units) -> Tensor:
        """Each unit through its kind's ViT, (U, T, D)."""
        row = self.rows(units.kind)
        chosen = [(row == number).nonzero().squeeze(1) for number in range(self.rows.n)]
        seen = self.encoder.seen(features)
        made = [
            cast(Tensor, cast(Any, vit).forward_features(seen[mine]))
            for vit, mine in zip(self.vits, chosen, strict=True)
            if len(mine)
        ]
        return torch.cat(made)[torch.cat(chosen).argsort()]


class CausalText(MicoForPretraining):
    """Table 1 (iv): one ViT beside a language model, whose tokens see only earlier ones.

    The last word stands for a sentence, as [CLS] does in a BERT.
    """

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, *over: Tensor | Corpora | None
    ) -> Tensor:
        """Captions (B, S) in one vector each: the last word's (B, d)."""
        seen = backwards(attention_mask[:, :0], input_ids.shape[1])
        hidden = self.text(input_ids, seen, *over)
        rows = torch.arange(len(hidden), device=hidden.device)
        return cast(Tensor, hidden[rows, attention_mask.sum(1) - 1])


class TextTransformer(MicoForPretraining):
    """Table 1 (ii): media and words go through the transformer of the language branch.

    The encoder has no layers, and no picture network before it: a linear layer brings the pixels of
    each cell to the text's width, and positions are added.

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
        vit = cast(Any, self.encoder.vit)
        vit.patch_embed = HybridEmbed(
            nn.BatchNorm2d(PIXELS, affine=False),
            img_size=self.encoder.grid,
            feature_size=self.encoder.grid,
            in_chans=PIXELS,
            embed_dim=encoder.embed_dim,
        )

    def unit_tokens(self, features: Tensor, units: Units) -> Tensor:
        """Cells, and [CLS] before them, through the language branch, (U, T, D)."""
        pixels = features[:, -PIXELS:]
        cells = cast(Tensor, cast(Any, self.encoder.vit).forward_features(pixels))
        t = cells.shape[1]
        seen = torch.zeros(len(cells), 1, t, t, dtype=cells.dtype, device=cells.device)
        if self.causal:  # [CLS] has to come last, or it would see nothing
            cells = cells.roll(-self.encoder.n_prefix, dims=1)
            later = torch.ones(t, t, dtype=torch.bool, device=cells.device).triu(1)
            seen = seen.masked_fill(later, torch.finfo(cells.dtype).min)
        hidden = self.text.bert(inputs_embeds=cells, attention_mask=seen).last_hidden_state
        return cast(Tensor, hidden.roll(self.encoder.n_prefix, dims=1) if self.causal else hidden)


class TextDecoder(CausalText, TextTransformer):
    """Table 1 (iii): media go through the language model too, in its causal way."""

    causal = True


ARCHITECTURES: dict[Architecture, type[MicoForPretraining]] = {
    "shared": MicoForPretraining,
    "per-modality": PerModalityEncoders,
    "text-encoder": TextTransformer,
    "text-decoder": TextDecoder,
    "vit-llm": CausalText,
}


Figure = Literal["video", "audio", "image", "average"]
FIGURES: tuple[Figure, ...] = ("video", "audio", "image", "average")
"""These columns of R@1 are in the paper too."""


@dataclass(frozen=True)
class Cell:
    """One setting: what it changes in the recipe, and how many times its steps it trains.

    ``other_seeds`` is added to its seeds: the cell is another one's again, by other chances.
    """

    name: str
    overrides: tuple[str, ...] = ()
    architecture: Architecture = "shared"
    longer: int = 1
    other_seeds: int = 0


@dataclass(frozen=True)
class Row:
    """A cell in a table. ``paper`` and ``cider`` are R@1 and CIDEr in per cent, in the order
    of :data:`FIGURES`, or None."""

    cell: Cell
    letter: str
    label: str
    here: str
    paper: tuple[float, ...] | None
    cider: tuple[float, ...] | None = None


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
    return _averaged(row.get("table1"))


def _averaged(figures: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if figures is None else (*figures, fmean(figures))


def _tables() -> tuple[Table, ...]:
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    cells: dict[str, Cell] = {}
    for name, cell in content["cells"].items():
        like = cells[cell.pop("like")].overrides if "like" in cell else ()
        cells[name] = Cell(name, (*like, *cell.pop("set", ())), **cell)
    return tuple(
        Table(
            table["name"],
            table["title"],
            tuple(
                Row(
                    *(cells[row["cell"]], row["letter"], row["label"], row["here"]),
                    *(_paper(row), _averaged(row.get("cider"))),
                )
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
        seeds = [f"train.seed + {cell.other_seeds}"] if cell.other_seeds else []
        changed = [*cell.overrides, *longer, *seeds, *{cell.architecture} - {"shared"}]
        rows.append([cell.name, ", ".join(places), " ".join(changed)])
    return markdown_table(["cell", "in the tables", "what it changes"], rows, texts=3)

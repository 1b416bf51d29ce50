"""Simulated names and things: what media would say, without a look at their pixels.

A language model learns to put every name into words, also those that no training picture shows. And
it must learn to read the runs of things before it can count or compare them. While it learns that,
found things are often wrong, and the encoder takes a part of each step. So a conversation may have
the runs of the true things, about as unsure as those of found ones.

Legend: R things of a medium, B named things, U units, N context tokens, L LLM width.
"""

from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.media.kinds import KINDS
from mico_chat.model.media_path import MediaPath
from mico_chat.model.mini.concepts import COLOURS, ConceptAttention
from mico_chat.model.mini.regions import RegionBatch, thing_boxes
from mico_chat.model.mini.things import DEPTH, NORMAL, WORDS, Thing, padded, zeros_first

CELLS = 16
"""So many cells of a thing vote for its name."""
MISSED = 0.03
"""The share of things that are not found."""
BESIDE, METRES = 0.02, 0.15
"""The deviations of found boxes, and of log metres, from the true ones."""
FARTHEST = 2.0
"""Unknown log metres are between 0 and this."""
SURE = (3.0, 7.0)
"""The logit of a true colour or way is between these; all logits have noise of deviation 1."""


class GivenThings:
    def __init__(self, chat: MediaPath) -> None:
        concepts = chat.concepts
        assert concepts is not None
        self.chat, self.concepts = chat, concepts
        self.number: dict[tuple[int, ...], int] = {}
        plain = concepts.name_ids[: concepts.n_visual]
        exact = plain if concepts.exact_ids is None else concepts.exact_ids
        for number, ids in [*enumerate(exact.tolist()), *enumerate(plain.tolist())]:
            self.number.setdefault(tuple(n for n in ids if n >= 0), number)
        self.colours = chat.thing_words.word_ids[: len(COLOURS)].tolist()

    def tokens(self, regions: RegionBatch, medium: int, kind: int, pixels: Tensor) -> Tensor:
        """The context tokens (N, L) of medium number ``medium`` of a batch.

        ``pixels`` (U, 3, H, W) tell the halves of a depth map and the length of a clip.
        """
        table = cast(nn.Embedding, self.chat.get_input_embeddings())
        device = pixels.device
        own = ((regions.medium == medium) & ~regions.whole).nonzero().squeeze(1)
        own = own[torch.rand(len(own), device=own.device) >= MISSED]
        metres = regions.distance[own].log()
        metres = torch.where(metres.isnan(), FARTHEST * torch.rand_like(metres), metres)
        metres = metres + METRES * torch.randn_like(metres)
        own, metres = own[metres.argsort()], metres.sort().values
        boxes = thing_boxes(regions.box[own])
        numbers = [self._number(regions.names[r]) for r in own.tolist()]
        said = regions.names[own]
        known = torch.tensor([n is not None for n in numbers], dtype=torch.bool, device=device)
        names = torch.tensor([number or 0 for number in numbers], dtype=torch.long, device=device)
        cells = simulate(Names.of(self.concepts), names, CELLS)
        name = self.concepts.visual_tokens(cells, table)
        name = torch.where(known.view(-1, 1, 1), name, self._words(said, table))
        colours = [self._colour(regions.words[r]) for r in own.tolist()]
        clip = KINDS[kind] == "video"
        thing = Thing(
            boxes=boxes + BESIDE * torch.randn_like(boxes),
            picture=torch.zeros_like(own),
            distance=metres,
            name=name,
            namesakes=(said.unsqueeze(1) == said).all(-1).sum(1),
            colour=_unsure(torch.tensor(colours, device=device).long(), len(COLOURS)),
            way=_unsure(regions.way[own], len(WORDS["way"])) if clip else None,
            surface=torch.full((len(own),), kind in (DEPTH, NORMAL), device=device),
        )
        runs = self.chat.thing_words(thing, table)
        if kind == DEPTH:
            runs = torch.cat([self.chat.thing_words.halves(pixels, table)[0].to(runs), runs])
        assert self.chat.things is not None
        alone = torch.zeros(len(runs), dtype=torch.long, device=device)
        runs = padded(runs, alone, 1, self.chat.things.n)[0]
        config = self.chat.bridge.config
        queries = len(pixels) * config.frame_grid**2 if clip else config.n_still
        nothing = runs.new_zeros(queries, runs.shape[1])
        tokens = torch.cat([nothing, self._whole(cells[known], table), runs])
        return zeros_first(tokens.unsqueeze(0))[0]

    def _whole(self, cells: Tensor, table: nn.Embedding) -> Tensor:
        """The names (n K, L) of the whole medium, in which things of R x C cells vote."""
        votes = cells.flatten(0, 1).unsqueeze(0)
        if not votes.shape[1]:
            votes = votes.new_zeros(1, 1, self.concepts.n_visual)
        return self.concepts.still_names(votes, table)[0]

    def _number(self, ids: Tensor) -> int | None:
        """The number of a visual name with these tokens, if there is one."""
        given = tuple(n for n in ids.tolist() if n >= 0)[: self.concepts.name_ids.shape[1]]
        return self.number.get(given)

    def _words(self, ids: Tensor, table: nn.Embedding) -> Tensor:
        """The words (R, K, L) of names with tokens (R, ..), also of names without a number."""
        width = self.concepts.name_ids.shape[1]
        ids = F.pad(ids[:, :width], (0, max(0, width - ids.shape[1])), value=-1)
        words: Tensor = table(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)
        return words

    def _colour(self, ids: Tensor) -> int:
        return next((self.colours.index(n) for n in ids.tolist() if n in self.colours), -1)


def _unsure(true: Tensor, n: int) -> Tensor:
    """Logits (R, n) of what is ``true`` of each thing (R,), -1 for nothing, with noise."""
    known = F.one_hot(true.clamp(min=0), n) * (true >= 0).unsqueeze(1)
    sure = torch.empty(len(true), 1, device=true.device).uniform_(*SURE)
    return known * sure + torch.randn(len(true), n, device=true.device)


class Names(NamedTuple):
    """The visual names of a model, or those of sounds: their classifier's rows (N, ..), the number
    of each one's plain name (N,), the posterior's inverse temperature, ``sure_above``."""

    rows: Tensor
    plain: Tensor
    scale: Tensor
    sure: float | None

    @classmethod
    def of(cls, concepts: ConceptAttention, sounds: bool = False) -> Self:
        ids, n = concepts.name_ids, concepts.n_visual
        ids = ids[n:] if sounds else ids[:n]
        weights = [concepts.classifier.weight, concepts.learned.weight]
        if sounds:
            weights = [cast(nn.Linear, concepts.sound[-1]).weight]
        sure = None if concepts.sure_above is None else concepts.sure_above[sounds]
        scale = concepts.log_scale.detach().exp()[2 if sounds else 0]
        plain = ids.unique(dim=0, return_inverse=True)[1]
        return cls(torch.cat(weights).detach(), plain, scale, sure)

    def alike(self, chosen: Tensor) -> Tensor:
        """Names (B,) -> how alike the rows of all names are, as cosines (B, N)."""
        rows = F.normalize(self.rows - self.rows.mean(0), dim=-1)
        return rows[chosen] @ rows.T

    def share(self, logits: Tensor, of: Tensor, among: Tensor | None = None) -> Tensor:
        """How likely (B,) the names ``of`` are among others, both (B, N), by logits (B, C, N)."""
        posterior = (logits.mean(1) * self.scale).softmax(-1)
        posterior = posterior if among is None else posterior * among
        return (posterior * of).sum(1) / posterior.sum(1)

    def moved(
        self, logits: Tensor, of: Tensor, share: Tensor, among: Tensor | None = None
    ) -> Tensor:
        """Logits by which the names ``of`` have a ``share`` (B,) among others; nan: as now."""
        more = (share.logit(1e-4) - self.share(logits, of, among).logit(1e-4)) / self.scale
        return logits + (more.nan_to_num(0.0).unsqueeze(1) * of).unsqueeze(1)


def mistaken(concepts: ConceptAttention, n: int = 12) -> list[list[int]]:
    """The names that each name is most likely mistaken for: visual ones, then those of sounds."""
    found: list[list[int]] = []
    for sounds in (False, True):
        names = Names.of(concepts, sounds)
        alike = names.alike(torch.arange(len(names.rows))).fill_diagonal_(-torch.inf)
        near = alike.topk(min(n, len(alike) - 1)).indices
        found += (near + len(found)).tolist()
    return found


def simulate(names: Names, chosen: Tensor, n_cells: int) -> Tensor:
    """Cell logits (B, n_cells, N) as the stem might give them for things ``chosen`` (B,), by name.

    Classes are confused where their classifier rows are alike, the confidence varies, and the
    thing fills some of the cells. So the LLM learns to put a posterior into words for every name,
    pictured in the training data or not.
    """
    alike = names.alike(chosen)
    b, n = alike.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(b, 1, 1, device=alike.device).uniform_(low, high)

    inside = torch.rand(b, n_cells, 1, device=alike.device) < uniform(0.3, 1.0)
    # The pooled logits are the cells' mean: a thing in few cells is surer in each.
    share = inside.float().mean(1, keepdim=True).clamp(min=0.1)
    strength = uniform(6.5, 13.0) / share
    noise = torch.randn(b, n_cells, n, device=alike.device) * uniform(0.3, 2.0)
    shared = torch.randn(b, 1, n, device=alike.device) * uniform(0.0, 0.7)
    return inside * strength * alike.unsqueeze(1) + noise + shared


SECOND = (0.5, 0.95)
"""The second best name of what is unsure has this share of what the best one leaves."""


def settle(names: Names, logits: Tensor, chosen: Tensor, seconds: Tensor) -> Tensor:
    """Simulated logits (B, C, N), moved so that it is plain whether a name is sure.

    Where ``seconds`` (B,) is -1, the plain name of ``chosen`` (B,) is at least as likely as
    ``sure`` asks for; elsewhere it is less likely, and that of ``seconds`` is the second best.
    """
    sure = names.sure
    assert sure is not None

    def drawn(low: Tensor | float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(chosen), device=logits.device)

    first = names.plain == names.plain[chosen].unsqueeze(1)
    other = names.plain == names.plain[seconds].unsqueeze(1)
    beside = drawn(*SECOND) * min(1.0, sure / max(1 - sure, 0.01))
    unsure = drawn(1.02 * beside / (1 + beside), sure)  # more than the second best one gets
    alone = seconds < 0
    logits = names.moved(logits, other, beside.masked_fill(alone, torch.nan), among=~first)
    least = drawn(sure, 1.0).maximum(names.share(logits, first))
    return names.moved(logits, first, torch.where(alone, least, unsure))

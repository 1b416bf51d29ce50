"""Things: learned queries find them in a picture, a closer look names them, words tell the LLM.

The cells of a picture's grid propose boxes (two stages, as in Deformable DETR, arXiv 2010.04159).
The best proposals become queries: layers of self- and cross-attention refine their boxes, and
decide which of them are things, each thing once (set prediction, DETR, arXiv 2005.12872). A closer
look, the box cut out of the picture, shows the name and the colour. Each thing becomes a run of
context tokens near the words that are true of it, the nearest thing first: a language model binds
words that stand together, and hardly binds places. What it cannot work out, a run says: how many
have the name, how many things there are, and where the thing is among the others.

Legend: B pictures, T grid cells, N queries, D width, L LLM width, C stem channels, G grid side,
R looks. Boxes are centre x, centre y, width and height, as fractions of the picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.bridge import BridgeLayer
from mico_chat.model.config import THING_WORDS, MicoBridgeConfig
from mico_chat.model.context import side_by_side
from mico_chat.model.encoder import OmniEncoder, cell_centres
from mico_chat.model.mini.concepts import COLOURS, ConceptAttention
from mico_chat.model.mini.motion import Ways
from mico_chat.model.mini.part import Seen
from mico_chat.model.mini.stem import Stem
from mico_chat.model.mini.taught import root_mean

DEPTH, NORMAL = KINDS.index("depth"), KINDS.index("normal")

LEAST_LOGIT, MOST_OVERLAP = -0.2, 0.45
"""A box is a thing from this logit on, where no surer box overlaps it by more (intersection over
union)."""
LEAST_SIDE = 0.07
"""A narrower box attends as if it had this side, so that a query sees beyond one cell."""
MARGIN = 1.12
"""A look is this much larger than its box."""
SLIMMEST = 0.5
"""The shorter side of a look is at least this share of the longer one."""
MIDDLE = torch.tensor([[0.5, 0.5, side / MARGIN, side / MARGIN] for side in (0.88, 0.64)])
"""Boxes of two looks at the middle of a picture, with so much of its sides."""

WORDS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "side": ("left", "middle", "right"),
    "height": ("top", "center", "bottom"),
    "distance": ("near", "close", "away", "far"),
    "way": ("left", "right", "up", "down", "nearer", "away", "still"),
    "metres": ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "end": (";",),
}
"""The words of a thing's tokens; a mix of them stands where more than one may be true."""
AMONG, LEAST_SPREAD = 0.6, 0.3
"""How far a place or distance moves to where it is among the picture's: of two things on the left,
one is on the right, and of two far ones one is near. Things that are all closer together than the
spread, a share of the picture or log metres, move less."""
SHARED = 0.25
"""A thing has the name of another where its own posterior gives it at least this."""
NEAR_SHARE, NEAR_SCALE = 0.8, 8.0
"""A half of a depth map is as near as this share of its pixels is at most; how sharply two halves
are told apart."""
THIRDS = torch.tensor([0.2, 0.5, 0.8])
DISTANCES = torch.tensor([0.7, 1.5, 3.0, 6.0]).log()
METRES = torch.arange(10.0)


class Found(NamedTuple):
    """What a layer found: logits (B, N) that a query is a thing, boxes (B, N, 4), and log metres
    (B, N) from the camera."""

    logits: Tensor
    boxes: Tensor
    distance: Tensor


class ThingQueries(nn.Module):
    """Grid tokens of pictures -> boxes of things, each with a state that tells more of it."""

    def __init__(self, encoder_dim: int, grid: int, bridge: MicoBridgeConfig) -> None:
        super().__init__()
        dim, heads = bridge.hidden_size, bridge.num_heads
        self.n, self.grid = bridge.things, grid
        self.norm_in = nn.LayerNorm(encoder_dim)
        self.proj_in = nn.Linear(encoder_dim, dim)
        self.propose = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 6))
        self.queries = nn.Parameter(torch.randn(self.n, dim))
        self.place = nn.Sequential(nn.Linear(4, dim), nn.GELU(), nn.Linear(dim, dim))
        self.layers = nn.ModuleList(BridgeLayer(dim, heads) for _ in range(bridge.depth))
        self.norm_out = nn.LayerNorm(dim)
        self.decide = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 6))

    def forward(self, tokens: Tensor) -> list[Found]:
        """Tokens (B, T, D) of a grid's cells -> what was found: by the cells (N = T), then by each
        layer of queries, the last of them the answer."""
        keys = self.proj_in(self.norm_in(tokens))
        centres = cell_centres(self.grid).flip(1).to(keys.device)
        start = torch.cat([_inverse(centres), torch.full_like(centres, -1.0)], -1)
        found = [_read(self.propose(keys), start)]
        best = found[0].logits.topk(self.n).indices.unsqueeze(-1)
        boxes = found[0].boxes.gather(1, best.expand(-1, -1, 4))
        state = keys.gather(1, best.expand(-1, -1, keys.shape[-1])) + self.queries
        for layer in self.layers:
            boxes = boxes.detach()
            reach = boxes[..., None, 2:].clamp(min=LEAST_SIDE) / 2
            distance = ((boxes[..., None, :2] - centres) / reach).pow(2).sum(-1)
            start = _inverse(boxes)
            state = layer(state, keys, distance.to(keys.dtype), self.place(start.to(keys.dtype)))
            found.append(_read(self.decide(self.norm_out(state)), start))
            boxes = found[-1].boxes
        return found


def there(found: Found) -> Tensor:
    """Which boxes (B, N) are things: set prediction alone still finds some things twice."""
    centres, sides = found.boxes.chunk(2, -1)
    low, high = centres - sides / 2, centres + sides / 2
    shared = torch.minimum(high.unsqueeze(2), high.unsqueeze(1))
    shared = shared - torch.maximum(low.unsqueeze(2), low.unsqueeze(1))
    both, area = shared.clamp(min=0).prod(-1), sides.prod(-1)
    overlap = both / (area.unsqueeze(2) + area.unsqueeze(1) - both)
    surer = found.logits.unsqueeze(1) > found.logits.unsqueeze(2)  # [b, n, m]: m is surer than n
    return (found.logits > LEAST_LOGIT) & ~(surer & (overlap > MOST_OVERLAP)).any(-1)


def _read(head: Tensor, start: Tensor) -> Found:
    """A head's output (.., 6): the logit, the change of the box's inverse sigmoid, log metres."""
    head = head.float()
    return Found(head[..., 0], (start + head[..., 1:5]).sigmoid(), head[..., 5])


def _inverse(x: Tensor) -> Tensor:
    return torch.logit(x.float().clamp(1e-3, 1 - 1e-3))


def look_at(pixels: Tensor, picture: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut boxes (R, 4) out of pictures: pixels (B, 3, H, W), their numbers (R,) -> (R, 3, S, S).

    A look shows a margin around the box, and a slim box with what is beside it.
    """
    height, width = pixels.shape[-2:]
    sides = boxes[:, 2:] * MARGIN
    sides = torch.maximum(sides, SLIMMEST * sides.flip(1))
    scale = torch.tensor([width, height], device=boxes.device)
    low = ((boxes[:, :2] - sides / 2).clamp(0, 1) * scale).floor().long()
    high = ((boxes[:, :2] + sides / 2).clamp(0, 1) * scale).ceil().long()
    low = torch.minimum(low, scale - 1)
    high = torch.maximum(high, low + 1)
    places = zip(picture.tolist(), low.tolist(), high.tolist(), strict=True)
    cuts = [pixels[n : n + 1, :, t:b, lo:hi] for n, (lo, t), (hi, b) in places]
    # Half precision lacks this operation.
    looks = [F.interpolate(x.float(), (size, size), mode="bilinear", antialias=True) for x in cuts]
    return torch.cat(looks) if looks else pixels.new_zeros(0, 3, size, size)


def looked(
    encoder: OmniEncoder, seen: Seen, pixels: Tensor, picture: Tensor, boxes: Tensor
) -> Tensor:
    """Stem features (R, C, G, G) of looks at boxes (R, 4) of pictures (R,), see :func:`look_at`."""
    stem = cast(nn.Module, encoder.stem)
    if len(boxes) == 0:  # which some operations of a CNN cannot take
        return seen.tokens.new_zeros(0, *seen.features.shape[1:])
    looks = look_at(pixels, picture, boxes, encoder.image_size)
    return cast(Tensor, stem(looks.to(next(encoder.parameters()).dtype))).to(seen.tokens.dtype)


class Thing(NamedTuple):
    """What is known of R things.

    ``boxes`` (R, 4) in pictures ``picture`` (R,), in order; ``distance`` (R,) in log metres;
    ``name`` (R, K, L), mixes of names' vectors; ``namesakes`` (R,), how many things of its picture
    have a thing's name; ``colour`` (R, 11), logits; ``way`` (R, 7), logits for things of a clip;
    ``surface`` (R,), True for things of a depth or normal map, which has distances and no colours.
    """

    boxes: Tensor
    picture: Tensor
    distance: Tensor
    name: Tensor
    namesakes: Tensor
    colour: Tensor
    way: Tensor | None
    surface: Tensor


class ThingWords(nn.Module):
    """Things of pictures -> runs of context tokens near the words that are true of them."""

    word_ids: Tensor

    def __init__(self, tokens_per_name: int) -> None:
        super().__init__()
        self.length = tokens_per_name + THING_WORDS
        n_words = sum(map(len, WORDS.values()))
        self.register_buffer("word_ids", torch.zeros(n_words, dtype=torch.long))

    def learn_words(self, token: Callable[[str], int]) -> None:
        """Set the language model's token of each word."""
        ids = [token(word) for words in WORDS.values() for word in words]
        self.word_ids.copy_(torch.tensor(ids))

    def forward(self, thing: Thing, table: nn.Embedding) -> Tensor:
        """Things -> their runs (R, ``length``, L), with the vectors of ``table``."""
        word = self._words(table)

        def mix(what: str, share: Tensor) -> Tensor:
            mixed: Tensor = share.to(word[what].dtype) @ word[what]
            return mixed

        metres = mix("metres", _soft_bin(thing.distance.exp().clamp(max=9), METRES, 0.3))
        colour = mix("colour", thing.colour.softmax(-1))
        distance = among(thing.distance.unsqueeze(1), thing.picture, DISTANCES[[0, -1]])
        last = mix("distance", _soft_bin(distance[:, 0], DISTANCES, 0.3))
        if thing.way is not None:
            last = mix("way", thing.way.softmax(-1))
        places = among(thing.boxes[:, :2], thing.picture, torch.tensor([0.0, 1.0]))
        all_of_it = torch.bincount(thing.picture)[thing.picture]
        number = word["number"]
        side, height = (_soft_bin(places[:, axis], THIRDS, 0.1) for axis in (0, 1))
        words = [
            number[thing.namesakes.clamp(max=len(number)) - 1],
            torch.where(thing.surface.unsqueeze(1), metres, colour),
            *(mix("side", side), mix("height", height), last),
            number[all_of_it.clamp(max=len(number)) - 1],
        ]
        return torch.cat([thing.name, torch.stack(words, 1).to(thing.name.dtype)], 1)

    def halves(self, pixels: Tensor, table: nn.Embedding) -> Tensor:
        """Depth maps (B, 3, H, W) -> runs (B, 2, ``length``, L) of their nearer and farther half.

        They say "left near" and "right far". Where things are hard to find in a depth map, how near
        its sides are is still plain from its pixels.
        """
        word = self._words(table)
        side, distance = word["side"], word["distance"]
        # The second channel is nearness on a log scale; a hole is as far as can be.
        sides = pixels[:, 1].float().chunk(2, -1)
        near = torch.stack([half.flatten(1).quantile(NEAR_SHARE, 1) for half in sides], 1)
        first = near.argmax(1)
        sure = (NEAR_SCALE * (near.amax(1) - near.amin(1))).sigmoid().to(side).unsqueeze(1)
        runs = pixels.new_zeros(len(pixels), 2, self.length, side.shape[1], dtype=side.dtype)
        for place, (half, share) in enumerate(((first, sure), (1 - first, 1 - sure))):
            runs[:, place, -4] = side[[0, 2]][half]
            runs[:, place, -2] = share * distance[0] + (1 - share) * distance[-1]
            runs[:, place, -1] = word["end"]
        return runs

    def _words(self, table: nn.Embedding) -> dict[str, Tensor]:
        vectors = table(self.word_ids).split([len(words) for words in WORDS.values()])
        return dict(zip(WORDS, vectors, strict=True))


def _soft_bin(x: Tensor, centres: Tensor, width: float) -> Tensor:
    """Values (R,) to shares (R, n) of the bins around ``centres``, soft at their borders."""
    return ((x.unsqueeze(1) - centres.to(x)).pow(2) / (-2 * width**2)).softmax(-1)


def among(x: Tensor, picture: Tensor, ends: Tensor) -> Tensor:
    """Values (R, C) of things in pictures (R,), moved to where they are among the picture's.

    The least of a picture's moves to the first of the ``ends`` (2,), the largest to the last.
    """
    moved, (first, last) = x.clone(), ends.tolist()
    for number in picture.unique():
        own = picture == number
        if int(own.sum()) > 1:
            low, high = x[own].amin(0), x[own].amax(0)
            relative = 0.5 + (x[own] - (low + high) / 2) / (high - low).clamp(min=LEAST_SPREAD)
            moved[own] += AMONG * (first + relative * (last - first) - x[own])
    return moved


def namesakes(posterior: Tensor, picture: Tensor) -> Tensor:
    """Posteriors (R, P) of things in pictures (R,) -> how many in its picture have a thing's name.

    One has it if it is likely to some degree; the thing itself has it.
    """
    shared = posterior[:, posterior.argmax(1)].T >= SHARED  # [r, q]: q may have the name of r
    shared |= torch.eye(len(picture), dtype=torch.bool, device=picture.device)
    return (shared & (picture.unsqueeze(1) == picture)).sum(1)


def zeros_first(tokens: Tensor) -> Tensor:
    """Tokens (B, N, L) with those that are zero in front: nothing stands between words then."""
    order = tokens.detach().any(-1).int().argsort(dim=1, stable=True)
    return tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))


def padded(runs: Tensor, picture: Tensor, n_pictures: int, n: int) -> Tensor:
    """At most N runs (R, S, L) of each of B pictures (R,), in order -> (B, N·S, L)."""
    return side_by_side(runs, picture, n_pictures, n).flatten(1, 2)


@dataclass(frozen=True)
class Things:
    """The part that says the things of pictures, and of clips' middle frames, in runs of tokens."""

    queries: ThingQueries
    words: ThingWords
    ways: Ways
    concepts: ConceptAttention
    encoder: OmniEncoder
    table: nn.Embedding
    shown: bool = True
    """False: the tokens are zeros, so that an evaluation can do without."""
    look: Callable[..., Tensor] = looked
    """Takes the closer looks."""

    def __call__(self, seen: Seen) -> Tensor | None:
        media = seen.media
        if media.layout == "slices":
            return None
        if seen.pixels is None:
            raise ModelError("things are looked at closely: give pixel_values, not stem_features")
        pixels = seen.pixels.unflatten(0, (-1, media.units))[:, media.units // 2]
        thing = self.found(seen, pixels)
        runs, picture = self.words(thing, self.table), thing.picture
        maps = (media.kind == DEPTH).nonzero().squeeze(1)
        if media.layout == "still" and len(maps):
            halves = self.words.halves(pixels[maps], self.table)
            runs = torch.cat([halves.flatten(0, 1).to(runs.dtype), runs])
            picture = torch.cat([maps.repeat_interleave(2), picture])
            order = picture.argsort(stable=True)
            runs, picture = runs[order], picture[order]
        return padded(runs, picture, len(seen.tokens), self.queries.n) * self.shown

    def found(self, seen: Seen, pixels: Tensor) -> Thing:
        """The things of pictures with pixels (B, 3, H, W), the nearest of each first.

        A language model learns "the nearer of the two" from the order.
        """
        media, prefix = seen.media, self.encoder.n_prefix
        found = self.queries(seen.tokens[:, media.units // 2, prefix:])[-1]
        kept = there(found)
        order = found.distance.masked_fill(~kept, torch.inf).argsort(1)
        picture, place = kept.gather(1, order).nonzero(as_tuple=True)
        query = order[picture, place]
        boxes = found.boxes[picture, query]
        way = None
        if media.layout == "frames":
            frames = cast(Stem, self.encoder.stem).middle(seen.features)
            way = self.ways(frames.unflatten(0, (-1, media.units)), boxes, picture)
        looks = self.look(self.encoder, seen, pixels, picture, boxes)
        cells = self.concepts.cell_features(looks)
        logits = self.concepts.visual(cells)
        name = self.concepts.visual_tokens(logits, self.table)
        if any(seen.taught):
            taught = [seen.taught[n] for n in picture.tolist()]
            name = self.concepts.with_taught(name, root_mean(cells), taught, self.table)
        return Thing(
            boxes=boxes,
            picture=picture,
            distance=found.distance[picture, query],
            name=name,
            namesakes=namesakes(self.concepts.plain_posterior(logits), picture),
            colour=cast(nn.Module, self.concepts.colour)(looks),
            way=way,
            surface=(media.kind == DEPTH)[picture] | (media.kind == NORMAL)[picture],
        )

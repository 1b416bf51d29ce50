"""MediaPath: media to context tokens, through encoder, context, concepts and bridge.

Every engine shares this part of a chat model. It needs none of transformers' models, whose import
takes as long as everything else that a first answer waits for.

Legend: M media of a batch, B media of a group that are alike, U units (stills, frames, mel
slices), T tokens a unit, D encoder width, L LLM width. A batch's media lie flat, sample after
sample: ``media_kind`` and ``media_units`` (M,) are the kind and the unit count of each;
``pixel_values`` (U, 3, H, W) or the stem's ``stem_features`` (U, C, G, G) hold their units in the
same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from mico_chat.errors import ModelError
from mico_chat.model.bridge import PerceiverBridge
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.context import AlikeMedia, KindRows, MultimodalContext
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.mini.concepts import ChangeCells, build_concepts
from mico_chat.model.mini.motion import Ways
from mico_chat.model.mini.part import Part, Seen
from mico_chat.model.mini.taught import Taught
from mico_chat.model.mini.things import (
    MIDDLE,
    WORDS,
    ThingQueries,
    Things,
    ThingWords,
    looked,
    zeros_first,
)


@dataclass(frozen=True)
class Grid:
    """The paper's part: the bridge's queries look at the tokens and at the concepts' values.

    With concepts, the names of the whole medium stand behind the bridge's tokens.
    """

    path: "MediaPath"

    def __call__(self, seen: Seen) -> Tensor:
        named, values = self.named(seen)
        context = self.queried(seen, values)
        return context if named is None else torch.cat([context, named.to(context.dtype)], 1)

    def named(
        self, seen: Seen, change: ChangeCells | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The concepts' tokens (B, K, L) and cells' values (B·U, G², L), of those that there are.

        ``change`` is of the cells' logits.
        """
        path, looks = self.path, self.looks(seen)
        if path.concepts is None:
            return None, None
        table = cast(nn.Embedding, path.get_input_embeddings())
        found = path.concepts(seen.features, seen.media, table, looks, change)
        named, values = (None if x is None else x * path.use_concepts for x in found)
        if named is not None and any(seen.taught):
            examples = path.concepts.examples(seen.features, seen.media, looks)
            named = path.concepts.with_taught(named, examples, seen.taught, table)
        return named, values

    def looks(self, seen: Seen) -> Tensor | None:
        """Features (B·V, C, G, G) of V looks at the middle of stills, whose main thing is there.

        They count for a still's name. Other media have none.
        """
        path = self.path
        if path.things is None or seen.media.layout != "still" or seen.pixels is None:
            return None
        n = len(seen.pixels)
        picture = torch.arange(n).repeat_interleave(len(MIDDLE))
        boxes = MIDDLE.to(seen.pixels.device).repeat(n, 1)
        return looked(path.encoder, seen, seen.pixels, picture, boxes)

    def queried(self, seen: Seen, values: Tensor | None) -> Tensor:
        """The bridge's tokens (B, Q, L), with the values of cells, if any."""
        if values is not None:  # a value at each grid token, zero at the prefix tokens
            values = F.pad(values.to(seen.tokens.dtype), (0, 0, self.path.encoder.n_prefix, 0))
            values = values.unflatten(0, (-1, seen.media.units))
        media = seen.media
        context: Tensor = self.path.bridge(seen.tokens, media.kind, media.layout, values)
        return context * self.path.use_grid


@dataclass(frozen=True)
class Examples:
    """The part that gives, in place of tokens, the features (B, 1, D) by which names are taught."""

    path: "MediaPath"

    def __call__(self, seen: Seen) -> Tensor | None:
        if self.path.concepts is None:
            return None
        looks = Grid(self.path).looks(seen)
        return self.path.concepts.examples(seen.features, seen.media, looks).unsqueeze(1)


class MediaPath(nn.Module):
    """Encoder, context, concepts and bridge of a chat model; :meth:`build` makes them.

    An evaluation switches ``use_concepts`` or ``use_grid`` off to measure the share of the concepts
    or of the bridge. ``generation`` is the content of ``generation_config.json``: an assistant uses
    it, ``generate`` does not.
    """

    def build(self, config: MicoChatConfig) -> None:
        """Make the modules, with random weights, and no language model."""
        self.encoder = OmniEncoder(config.encoder_config, config.context_config.position)
        d, grid = self.encoder.embed_dim, self.encoder.grid
        self.context = MultimodalContext(config.context_config, d)
        self.concepts = build_concepts(config.concept_config, self.encoder)
        bridge, prefix = config.bridge_config, self.encoder.n_prefix
        self.bridge = PerceiverBridge(bridge, self.context.rows, d, grid, prefix, config.llm_width)
        self.things: ThingQueries | None = None
        if bridge.things > 0:
            if self.concepts is None or self.concepts.colour is None:
                raise ModelError("bridge_config.things needs a concept_config with colours")
            self.things = ThingQueries(d, grid, bridge)
            self.thing_words = ThingWords(self.concepts.name_ids.shape[1])
            self.ways = Ways(len(WORDS["way"]))
        self.llm: Any = None
        self.use_concepts = True
        self.use_grid = True
        self.generation: dict[str, Any] | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that the config lists, in the order of their tokens."""
        if self.things is None or self.concepts is None:
            return (Grid(self),)
        table = cast(nn.Embedding, self.get_input_embeddings())
        own = (self.things, self.thing_words, self.ways, self.concepts, self.encoder)
        return Grid(self), Things(*own, table, self.use_grid)

    def context_tokens(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        parts: Sequence[Part] | None = None,
        taught: Sequence[Taught | None] = (),
    ) -> list[Tensor]:
        """Context tokens of each medium, (n_i, L), in the media's order.

        ``parts`` stand in for the model's own. Parts that look closely need ``pixel_values``.
        ``taught`` are the names that somebody taught for each medium.
        """
        tokens, features = self.encoded(media_kind, media_units, pixel_values, stem_features)
        parts = self.parts if parts is None else parts
        found: list[Tensor] = [tokens] * len(media_kind)
        for media in AlikeMedia.groups(media_kind, media_units):
            own = media.of(tokens).unflatten(0, (-1, media.units))
            pixels = None if pixel_values is None else media.of(pixel_values)
            names = [taught[m] for m in media.media] if taught else ()
            seen = Seen(media, own, media.of(features), pixels, names)
            said = [one for part in parts if (one := part(seen)) is not None]
            context = torch.cat([one.to(said[0].dtype) for one in said], 1)
            context = context if self.things is None else zeros_first(context)
            for m, row in zip(media.media, context, strict=True):
                found[m] = row
        return found

    def encoded(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The encoder's tokens (U, T, D) with their context, eq. (1), and the stem's features."""
        media = (media_kind, media_units)
        features = self.encoder.unit_features(*media, pixel_values, stem_features)
        bridge_dtype = self.bridge.norm_in.weight.dtype  # that of a frozen encoder may differ
        # Before the sum: beside a token, bfloat16 rounds a small embedding that still learns to 0.
        tokens = self.encoder(features).to(bridge_dtype)
        return self.context(tokens, *media), features.to(bridge_dtype)

    @property
    def rows(self) -> KindRows:
        """The rows of the kinds that the model knows."""
        return self.context.rows

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def train(self, mode: bool = True) -> Self:
        """Batch norms keep the statistics that their own training left, and dropout stays off."""
        super().train(mode)
        for part in (self.encoder, self.concepts, getattr(self, "ways", None)):
            if part is not None:
                part.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self._llm().get_input_embeddings())

    def attach_llm(self, llm: Any) -> None:
        """Take a causal language model, or its :class:`TokenTable`, from elsewhere."""
        width = llm.get_input_embeddings().embedding_dim
        ours = self.bridge.proj_out.out_features
        if width != ours:
            raise ModelError(f"the language model is {width} wide but the bridge gives {ours}")
        self.llm = llm

    def _llm(self) -> Any:
        if self.llm is None:
            raise ModelError("this model has no language model yet: give it one with attach_llm")
        return self.llm


class MediaModel(MediaPath):
    """The media path with token vectors, for engines that run the language model themselves."""

    def __init__(self, config: MicoChatConfig) -> None:
        super().__init__()
        self.config = config
        self.build(config)
        self.train(False)


class TokenTable(nn.Module):
    """A language model's token vectors (V, L), without the rest of it.

    ``read_config`` gives the language model's config, and is called when that is first needed.
    """

    def __init__(self, weight: Tensor, read_config: Callable[[], PreTrainedConfig]) -> None:
        super().__init__()
        self._read_config = read_config
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(weight)

    @cached_property
    def config(self) -> PreTrainedConfig:
        return self._read_config()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

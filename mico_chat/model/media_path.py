"""MediaPath: media to context tokens, through encoder, context, concepts and bridge.

Every engine shares this part of a chat model. It needs none of transformers' models, whose import
takes as long as everything else that a first answer waits for.

Legend: M media of a batch, B media of a group that are alike, U units (stills, frames, mel
slices), T tokens a unit, D encoder width, L LLM width. A batch's media lie flat, sample after
sample: ``media_kind`` and ``media_units`` (M,) are the kind and the unit count of each;
``pixel_values`` (U, 3, H, W) or the stem's ``stem_features`` (U, C, G, G) hold their units in the
same order.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.bridge import PerceiverBridge
from mico_chat.model.concepts import build_concepts
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.context import AlikeMedia, MultimodalContext
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.motion import Ways
from mico_chat.model.things import (
    MIDDLE,
    WORDS,
    Thing,
    ThingQueries,
    ThingWords,
    look_at,
    namesakes,
    padded,
    there,
    zeros_first,
)

DEPTH, NORMAL = KINDS.index("depth"), KINDS.index("normal")


class MediaPath(nn.Module):
    """Encoder, context, concepts and bridge of a chat model; :meth:`build` makes them.

    An evaluation switches ``use_concepts`` or ``use_grid`` off to measure the share of the concepts
    or of the bridge. ``generation`` is the content of ``generation_config.json``: an assistant uses
    it, ``generate`` does not.
    """

    def build(self, config: MicoChatConfig) -> None:
        """Make the modules, with random weights, and no language model."""
        self.encoder = OmniEncoder(config.encoder_config)
        d = self.encoder.embed_dim
        self.context = MultimodalContext(config.context_config, d)
        self.concepts = build_concepts(config.concept_config, self.encoder)
        self.bridge = PerceiverBridge(
            config.bridge_config, d, self.encoder.grid, self.encoder.n_prefix, config.llm_width
        )
        self.things: ThingQueries | None = None
        bridge = config.bridge_config
        if bridge.things > 0:
            if self.concepts is None or self.concepts.colour is None:
                raise ModelError("bridge_config.things needs a concept_config with colours")
            sizes = (bridge.hidden_size, bridge.num_heads, bridge.depth, bridge.things)
            self.things = ThingQueries(d, self.encoder.grid, *sizes)
            self.thing_words = ThingWords(self.concepts.name_ids.shape[1])
            self.ways = Ways(len(WORDS["way"]))
        self.llm: Any = None
        self.use_concepts = True
        self.use_grid = True
        self.generation: dict[str, Any] | None = None

    def context_tokens(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> list[Tensor]:
        """Context tokens of each medium, (n_i, L), in the media's order."""
        tokens, features = self.encoded(media_kind, media_units, pixel_values, stem_features)
        found: list[Tensor] = [tokens] * len(media_kind)
        for media in AlikeMedia.groups(media_kind, media_units):
            pixels = None if pixel_values is None else media.of(pixel_values)
            group = self.alike_tokens(media.of(tokens), media.of(features), media, pixels)
            for m, context in zip(media.media, group, strict=True):
                found[m] = context
        return found

    def encoded(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The encoder's tokens (U, T, D) with their context, eq. (1), and the stem's features."""
        features = self.encoder.unit_features(pixel_values, stem_features, media_units)
        bridge_dtype = self.bridge.norm_in.weight.dtype  # that of a frozen encoder may differ
        # Before the sum: beside a token, bfloat16 rounds a small embedding that still learns to 0.
        tokens = self.encoder(features).to(bridge_dtype)
        return self.context(tokens, media_kind, media_units), features.to(bridge_dtype)

    def alike_tokens(
        self, tokens: Tensor, features: Tensor, media: AlikeMedia, pixels: Tensor | None = None
    ) -> Tensor:
        """Tokens (B·U, T, D) and stem features of alike media -> context tokens (B, N, L).

        A model with queries for things needs the ``pixels`` (B·U, 3, H, W) of pictures and clips.
        """
        named = values = None
        if self.concepts is not None:
            table = cast(nn.Embedding, self.get_input_embeddings())
            looks = self._whole_looks(media, pixels)
            named, values = self.concepts(features, media, table, looks)
        if values is not None:  # a value at each grid token, zero at the prefix tokens
            values = values.to(tokens.dtype) * self.use_concepts
            values = F.pad(values, (0, 0, self.encoder.n_prefix, 0)).unflatten(0, (-1, media.units))
        tokens = tokens.unflatten(0, (-1, media.units))  # (B, U, T, D)
        context: Tensor = self.bridge(tokens, media.kind, media.layout, values) * self.use_grid
        parts = [context] if named is None else [context, named * self.use_concepts]
        if self.things is not None and media.layout != "slices":
            found = self._things(self.things, tokens, features, media, pixels)
            parts.append(found * self.use_grid)
        said = torch.cat([part.to(context.dtype) for part in parts], dim=1)
        return said if self.things is None else zeros_first(said)

    def _whole_looks(self, media: AlikeMedia, pixels: Tensor | None) -> Tensor | None:
        """Stem features of closer looks at the middle of stills, whose main thing is there."""
        if self.things is None or media.layout != "still" or pixels is None:
            return None
        picture = torch.arange(len(pixels)).repeat_interleave(len(MIDDLE))
        return self._looked(pixels, picture, MIDDLE.to(pixels.device).repeat(len(pixels), 1))

    def _looked(self, pixels: Tensor, picture: Tensor, boxes: Tensor) -> Tensor:
        """Stem features of looks at boxes (R, 4) of the pictures (R,)."""
        bridge, stem = self.bridge.norm_in.weight, self.encoder.stem
        assert stem is not None
        if len(boxes) == 0:  # which some operations of a CNN cannot take
            return bridge.new_zeros(0, stem.out_dim, self.encoder.grid, self.encoder.grid)
        looks = look_at(pixels, picture, boxes, self.encoder.image_size)
        return cast(Tensor, stem(looks.to(self.dtype))).to(bridge.dtype)

    def _things(
        self,
        queries: ThingQueries,
        tokens: Tensor,
        features: Tensor,
        media: AlikeMedia,
        pixels: Tensor | None,
    ) -> Tensor:
        """Tokens (B, U, T, D) of alike pictures or clips -> the runs (B, N, L) of their things.

        Of a clip these are the things of its middle frame.
        """
        concepts, stem = self.concepts, self.encoder.stem
        if pixels is None:
            raise ModelError("things are looked at closely: give pixel_values, not stem_features")
        assert concepts is not None
        assert concepts.colour is not None
        assert stem is not None
        middle = media.units // 2
        found = queries(tokens[:, middle, self.encoder.n_prefix :])[-1]
        kept = there(found)
        # The nearest first: a language model learns "the nearer of the two" from the order.
        order = found.distance.masked_fill(~kept, torch.inf).argsort(1)
        picture, place = kept.gather(1, order).nonzero(as_tuple=True)
        query = order[picture, place]
        boxes = found.boxes[picture, query]
        pixels = pixels.unflatten(0, (-1, media.units))[:, middle]
        way = None
        if media.layout == "frames":
            frames = stem.middle(features).unflatten(0, (-1, media.units))
            way = self.ways(frames, boxes, picture)
        looks = self._looked(pixels, picture, boxes)
        cells = concepts.cell_logits(looks)
        table = cast(nn.Embedding, self.get_input_embeddings())
        thing = Thing(
            boxes=boxes,
            picture=picture,
            distance=found.distance[picture, query],
            name=concepts.visual_tokens(cells, table),
            namesakes=namesakes(concepts.plain_posterior(cells), picture),
            colour=concepts.colour(looks),
            way=way,
            surface=(media.kind == DEPTH)[picture] | (media.kind == NORMAL)[picture],
        )
        runs = self.thing_words(thing, table)
        maps = (media.kind == DEPTH).nonzero().squeeze(1)
        if media.layout == "still" and len(maps):
            halves = self.thing_words.halves(pixels[maps], table)
            runs = torch.cat([halves.flatten(0, 1).to(runs.dtype), runs])
            picture = torch.cat([maps.repeat_interleave(2), picture])
            order = picture.argsort(stable=True)
            runs, picture = runs[order], picture[order]
        return padded(runs, picture, len(tokens), queries.n)

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

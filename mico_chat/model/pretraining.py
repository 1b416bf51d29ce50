"""MicoForPretraining: stage 1, encoder and text branch aligned by three objectives (paper 3.4).

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, S text length. A batch's media lie flat, as in
:mod:`mico_chat.model.media_path`; ``media_row`` (M,) is the sample that each belongs to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoConfig, MicoTextConfig
from mico_chat.model.context import KindRows, MultimodalContext, Units, side_by_side
from mico_chat.model.encoder import AUDIO, OmniEncoder, cell_centres, init_buffers
from mico_chat.model.losses import (
    Context,
    all_at_once,
    caption_key,
    captioning,
    contrastive,
    end_to_end,
    matching,
)
from mico_chat.model.media_path import MediaPath
from mico_chat.model.mini.concepts import ChangeCells, build_concepts, concept_loss
from mico_chat.model.mini.names import ConceptNames
from mico_chat.model.mini.regions import RegionBatch, tagging_loss, token_loss
from mico_chat.model.released import ContrastiveHeads, Subtitles
from mico_chat.model.text_branch import Corpora, TextBranch, log_likelihood

OBJECTIVES = ("contrastive", "matching", "caption", "tagging", "region", "concept")


@dataclass
class MicoPretrainingOutput(ModelOutput):
    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    caption_loss: Tensor | None = None
    tagging_loss: Tensor | None = None
    region_loss: Tensor | None = None
    concept_loss: Tensor | None = None
    media: Tensor | None = None  # (B, P), as text: what eq. (4) compares, in evaluation mode
    text: Tensor | None = None


class EncodedContexts(NamedTuple):
    """Contexts (B, N, d) of a batch, filled where ``mask`` (B, N) is true.

    ``pooled`` (B, P) has unit length; ``tokens`` (U, T, d) are the same tokens unit by unit;
    ``features`` (U, C, G, G) are the stem's.
    """

    context: Tensor
    mask: Tensor
    pooled: Tensor
    tokens: Tensor
    features: Tensor


class MicoForPretraining(PreTrainedModel):
    """Encoder, context and text branch with the three objectives of paper 3.4.

    With ``chat`` the encoder, context and concepts are that model's own, in its dtype. An objective
    of weight 0 is not computed. ``by_rows`` runs what each sample has by itself. The inputs of a
    batch beside captions (B, S) and media (M,):

    * ``pixel_values`` or ``stem_features`` of the media's units, and ``change``, which makes other
      logits of the cells that are named;
    * ``question_ids`` and ``question_mask`` (B, P): captions are answers, for that objective alone;
    * ``advantage`` (B,): the captions are the model's own, and become more likely by it;
    * ``subtitle_ids`` and ``subtitle_mask`` (B, S), which are :class:`Subtitles`;
    * ``caption_corpus`` (B, S) and ``media_corpus`` (M,), 0 or 1 + the number of a kind, whose rows
      of E_Sam are :class:`Corpora`. With ``context_config.contrastive_sampling`` contrast has E_Sam
      too, on both sides, as eq. (3) feeds eq. (4). Without, contrast cannot tell joint samples of
      other corpora by it. What is searched is of one corpus as a whole, and so has no E_Sam;
    * ``concept_labels`` (M,), the classes of named media, below 0 for others;
    * ``region_*``, those of a :class:`RegionBatch` of media with one unit each.
    """

    config: MicoConfig
    config_class = MicoConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True

    def __init__(self, config: MicoConfig, chat: MediaPath | None = None) -> None:
        super().__init__(config)
        text, self.rows = config.text_config, KindRows(config.context_config.kind_rows)
        if chat is None:
            self.encoder = OmniEncoder(config.encoder_config, config.context_config.position)
            self.context = MultimodalContext(config.context_config, self.encoder.embed_dim)
            self.concepts = build_concepts(config.concept_config, self.encoder)
        d = self.encoder.embed_dim if chat is None else chat.encoder.embed_dim
        self.text = TextBranch(text, d, config.context_config)
        self.media_projection: nn.Module
        self.subtitle_projection: nn.Module | None = None
        said = text.hidden_size if text.subtitles else None
        if text.frames is None:
            self.media_projection = _projection(text, d)
            if said is not None:
                self.subtitle_projection = _projection(text, said)
        elif text.projection != "linear":
            raise ConfigError(
                f"text_config.projection {text.projection}: with text_config.frames, as in the "
                "release, each kind has a linear projection; set it to linear"
            )
        else:
            self.media_projection = ContrastiveHeads(self.rows, d, text.projection_dim, said)
        self.text_projection = _projection(text, text.hidden_size)
        self.media_sampling: nn.Embedding | None = None
        """E_Sam of media in the contrast, eq. (3), in the encoder's width."""
        if (context := config.context_config).sampling and context.contrastive_sampling:
            self.media_sampling = nn.Embedding(context.n_corpus_pairs, d, padding_idx=0)
            self.media_sampling.weight.data.mul_(0.02)
        self.names: ConceptNames | None = None
        if text.name_tokens > 0:
            n_names = sum(len(names) for names in config.concept_names)
            self.names = ConceptNames(text, self.rows, n_names, d)
        self.matching_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size),
            nn.GELU(),
            nn.LayerNorm(text.hidden_size, eps=text.head_norm_eps),
            nn.Linear(text.hidden_size, text.matching_classes),
        )
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.objective_weights = dict.fromkeys(OBJECTIVES, 1.0)
        self.hardness = 1.0  # of the negatives of matching
        self.smoothing = 0.0  # of the targets of contrast
        self.by_rows = all_at_once
        self.mask_token_id = text.mask_token_id
        PreTrainedModel.post_init(self)
        if chat is not None:  # only now: they may be in use, and have their buffers
            self.encoder, self.context, self.concepts = chat.encoder, chat.context, chat.concepts

    def _init_weights(self, module: nn.Module) -> None:
        init_buffers(module)

    def encode(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        media_row: Tensor,
        n: int,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        subtitles: Subtitles | None = None,
        change: ChangeCells | None = None,
        media_corpus: Tensor | None = None,
    ) -> EncodedContexts:
        """Media of ``n`` samples, and their subtitles, if any; ``change`` is of named cells."""
        ends = F.pad(media_units.cumsum(0), (1, 0))

        def encode(rows: slice) -> EncodedContexts:
            bounds = media_row.new_tensor([rows.start, rows.stop])  # samples ascend
            own = slice(*torch.searchsorted(media_row, bounds).tolist())
            media = (media_kind[own], media_units[own])
            units = slice(int(ends[own.start]), int(ends[own.stop]) if rows.stop < n else None)
            pixels = None if pixel_values is None else pixel_values[units]
            cached = None if stem_features is None else stem_features[units]
            tokens, features = self.seen(*media, pixels, cached, change)
            row = torch.repeat_interleave(media_row[own] - rows.start, media[1])  # of each unit
            said = None if subtitles is None else Subtitles(*(x[rows] for x in subtitles))
            corpus = None if media_corpus is None else media_corpus[own].repeat_interleave(media[1])
            joined = self.join(tokens, Units.of(*media), row, rows.stop - rows.start, said, corpus)
            return EncodedContexts(*joined, features)

        return EncodedContexts(*map(end_to_end, zip(*self.by_rows(encode, n), strict=True)))

    def seen(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        change: ChangeCells | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (U, T, D) of units, see :meth:`in_context`, and the stem's features."""
        media = (media_kind, media_units)
        features = self.encoder.unit_features(*media, pixel_values, stem_features)
        tokens = self.unit_tokens(features, Units.of(*media))
        return self.in_context(tokens, features, *media, change), features

    def unit_tokens(self, features: Tensor, units: Units) -> Tensor:
        """Features of units to tokens (U, T, D): the encoder's, whatever kind they are of."""
        return cast(Tensor, self.encoder(features))

    @property
    def unit_length(self) -> int:
        """T, the tokens of a unit."""
        return self.encoder.n_prefix + self.encoder.grid**2 + (self.names is not None)

    def in_context(
        self,
        tokens: Tensor,
        features: Tensor,
        media_kind: Tensor,
        media_units: Tensor,
        change: ChangeCells | None = None,
    ) -> Tensor:
        """Tokens of units with their context embeddings and, last in each, the name token, if any.

        Returns (U, T, D); ``features`` (U, C, G, G) are the stem's.
        """
        media = (media_kind, media_units)
        tokens = self.context(tokens, *media)
        if self.names is None or self.concepts is None:
            return tokens
        named = self.names.tokens(self.concepts, features, *media, self.text.table, change)
        return torch.cat([tokens, named.to(tokens.dtype)], 1)

    def join(
        self,
        tokens: Tensor,
        units: Units,
        row: Tensor,
        n: int,
        subtitles: Subtitles | None = None,
        corpus: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Units' tokens (U, T, D) to one context for each of ``n`` samples.

        ``row`` (U,) is the sample of each unit, in ascending order, ``corpus`` (U,) its corpus for
        contrast. Returns ``context``, ``mask``, ``pooled`` and ``tokens`` of
        :class:`EncodedContexts`.
        """
        said = cls_said = there = None
        if subtitles is not None and self.text.subtitle is not None:
            hidden = self.text(*subtitles)
            said, cls_said, there = self.text.subtitle(hidden), hidden[:, 0], subtitles.there
        own = tokens[:, 0]
        if corpus is not None and self.media_sampling is not None:  # z_I = f(x_I) + E_Sam, eq. (3)
            own = own + self.media_sampling(self.rows.corpora(corpus)).to(own.dtype)
        if isinstance(self.media_projection, ContrastiveHeads):
            point = self.media_projection(own, units.kind, row, n, cls_said, there)
        else:
            counts = torch.bincount(row, minlength=n)
            cls = tokens.new_zeros(n, tokens.shape[2]).index_add(0, row, own)
            cls = cls / counts.clamp(min=1).unsqueeze(1)
            point = self.media_projection(cls)
            if cls_said is not None and there is not None and self.subtitle_projection is not None:
                point = point + self.subtitle_projection(cls_said) * there.unsqueeze(1)
        if self.names is not None:
            point = point + self.names.point(tokens[:, -1], units.kind, row, n)
        pooled = F.normalize(point.float(), dim=-1)
        tokens = self.text.project(tokens, units)  # (U, T, d)
        # z = [z_I, z_A, z_V, ...]: units of a sample side by side, eq. (1)
        context = side_by_side(tokens, row, n).flatten(1, 2)
        mask = side_by_side(torch.ones_like(row, dtype=torch.bool), row, n)
        mask = mask.repeat_interleave(tokens.shape[1], dim=1)
        if said is not None and there is not None:
            # The release looks at the padding of subtitles too: they have a fixed length.
            context = torch.cat([context, said.to(context.dtype)], 1)
            mask = torch.cat([mask, there.unsqueeze(1).expand(-1, said.shape[1])], 1)
        return context, mask, pooled, tokens

    def read(
        self, input_ids: Tensor, attention_mask: Tensor, *over: Tensor | Corpora | None
    ) -> Tensor:
        """Captions (B, S), alone or over media, in one vector each: [CLS]'s (B, d)."""
        return cast(Tensor, self.text(input_ids, attention_mask, *over)[:, 0])

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, corpus: Tensor | None = None
    ) -> Tensor:
        """Captions (B, S) -> unit-length features (B, P) of the contrastive space.

        ``corpus`` (B, S) are the tokens' rows of E_Sam, eq. (3).
        """
        over = () if corpus is None else (None, None, Corpora(corpus, corpus[:, :0]))
        point = self.text_projection(self.read(input_ids, attention_mask, *over))
        if self.names is not None:
            mixed = self.names.pooled(input_ids, attention_mask, self.text.table)
            point = point + self.names.words(mixed)
        return F.normalize(point.float(), dim=-1)

    def match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        context: Tensor,
        context_mask: Tensor,
        *corpora: Corpora,
    ) -> Tensor:
        """Matching logits (B,) of captions and contexts, eq. (5)."""
        summary = self.read(input_ids, attention_mask, context, context_mask, *corpora)
        logits = cast(Tensor, self.matching_head(summary).float())
        # Of "no" and "yes" their difference: its sigmoid is the softmax's second value.
        return logits[:, -1] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        media_kind: Tensor,
        media_units: Tensor,
        media_row: Tensor,
        **inputs: Any,
    ) -> MicoPretrainingOutput:
        """The objectives of a batch and their weighted sum; ``inputs`` are those of the class.

        Masks and hard negatives are drawn from torch's generator.
        """
        captions, media = (input_ids, attention_mask), (media_kind, media_units)
        pixels, features = inputs.get("pixel_values"), inputs.get("stem_features")
        more: Any = (Subtitles.given(inputs), inputs.get("change"), inputs.get("media_corpus"))
        shown = self.encode(*media, media_row, len(input_ids), pixels, features, *more)
        corpora = self._corpora(shown, input_ids, media_row, media_units, inputs)
        context = Context(shown.context, shown.mask, corpora)
        asked = {name for name, weight in self.objective_weights.items() if weight > 0}
        losses: dict[str, Tensor] = {}
        compared: dict[str, Tensor] = {}
        if {"contrastive", "matching"} & asked:  # contrast finds the hard negatives of matching
            said = captions if self.media_sampling is None else (*captions, corpora.text)
            read = self.by_rows(lambda o: self.encode_text(*(x[o] for x in said)), len(input_ids))
            text, key = end_to_end(read), caption_key(*captions)
            settings = (self.temperature, self.smoothing)
            losses["contrastive"], *near = contrastive(shown.pooled, text, key, *settings)
            compared = {} if self.training else {"media": shown.pooled, "text": text}
        if "matching" in asked:
            drawn = (near, self.hardness, self.text.sampling.num_embeddings)
            losses["matching"] = matching(self.match, captions, context, *drawn, self.by_rows)
        if (advantage := inputs.get("advantage")) is not None:
            likely = log_likelihood(self, *captions, shown.context, shown.mask)
            words = attention_mask[:, 1:].sum().clamp(min=1)
            losses["caption"] = -(likely * advantage.unsqueeze(1)).sum() / words
        elif "caption" in asked:
            none = input_ids[:, :0]
            asking = inputs.get("question_ids", none), inputs.get("question_mask", none)
            how = (self.config.mask_probability, self.mask_token_id, self.by_rows)
            losses["caption"] = captioning(self.text, asking, captions, context, *how)
        # Beside the paper's objectives the mini learns tags, regions and concepts.
        if "tagging" in asked:
            losses["tagging"] = tagging_loss(self.text, *captions, shown.context, shown.mask)
        regions = RegionBatch.given({k: v for k, v in inputs.items() if k.startswith("region_")})
        if "region" in asked and regions is not None:
            first = (torch.cumsum(media_units, 0) - media_units)[regions.medium]
            places = (cell_centres(self.encoder.grid), self.encoder.n_prefix)
            losses["region"] = token_loss(self.text, regions, shown.tokens[first], *places)
        labels = inputs.get("concept_labels")
        if "concept" in asked and self.concepts is not None and labels is not None:
            named = (media_kind == AUDIO, media_units, labels)
            losses["concept"] = concept_loss(self.concepts, shown.features, *named)
        nothing = shown.tokens.sum() * 0.0  # a batch without regions may have no other objective
        loss = sum((self.objective_weights[k] * v for k, v in losses.items()), start=nothing)
        parts = {f"{k}_loss": v for k, v in losses.items()}
        return MicoPretrainingOutput(loss=loss, **parts, **compared)

    def _corpora(
        self,
        shown: EncodedContexts,
        input_ids: Tensor,
        media_row: Tensor,
        media_units: Tensor,
        inputs: Mapping[str, Tensor],
    ) -> Corpora:
        """The rows of E_Sam of captions and context tokens, 0 where the batch names no corpora."""
        in_text = inputs.get("caption_corpus", torch.zeros_like(input_ids))
        in_media = inputs.get("media_corpus", torch.zeros_like(media_row))
        of_unit, row = (torch.repeat_interleave(x, media_units) for x in (in_media, media_row))
        context = side_by_side(of_unit, row, len(input_ids))
        context = context.repeat_interleave(shown.tokens.shape[1], dim=1)
        context = F.pad(context, (0, shown.context.shape[1] - context.shape[1]))
        return Corpora(self.rows.corpora(in_text), self.rows.corpora(context))


def _projection(text: MicoTextConfig, width: int) -> nn.Module:
    """To the contrastive space: one layer, or the paper's MLP (3.4)."""
    last = nn.Linear(width, text.projection_dim, bias=False)
    if text.projection == "linear":
        return last
    if text.projection != "mlp":
        raise ConfigError(f"text_config.projection {text.projection!r}: it is linear or mlp")
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), last)


AutoModel.register(MicoConfig, MicoForPretraining)

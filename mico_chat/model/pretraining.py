"""MicoForPretraining: stage 1, encoder and text branch aligned by three objectives (paper 3.4).

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, S text length. A batch's media lie flat, as in
:mod:`mico_chat.model.media_path`; ``media_row`` (M,) is the sample that each belongs to.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoConfig
from mico_chat.model.context import KindRows, MultimodalContext, Units
from mico_chat.model.encoder import OmniEncoder, cell_centres, init_buffers
from mico_chat.model.media_path import MediaPath
from mico_chat.model.mini.concepts import ChangeCells, ConceptAttention, build_concepts
from mico_chat.model.mini.names import ConceptNames
from mico_chat.model.mini.regions import RegionBatch, region_loss
from mico_chat.model.ranks import fetch_rows, gather_rows, of_one_length, ranks
from mico_chat.model.released import ContrastiveHeads, Subtitles
from mico_chat.model.text_branch import Corpora, TextBranch, backwards, log_likelihood

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


def side_by_side(x: Tensor, row: Tensor, n: int) -> Tensor:
    """What belongs to units, (U, ...) in ascending order of their samples ``row`` (U,), of ``n``
    samples side by side: (n, most units, ...), padded with zeros."""
    counts = torch.bincount(row, minlength=n)
    place = torch.arange(len(row), device=row.device) - (torch.cumsum(counts, 0) - counts)[row]
    return x.new_zeros(n, int(counts.max()), *x.shape[1:]).index_put((row, place), x)


def caption_key(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A number per caption (B,), equal for equal captions whatever their padding."""
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    words = (input_ids + 1) * attention_mask * (position * 2654435761 % 1000003)
    return words.sum(1)


class MicoForPretraining(PreTrainedModel):
    """Encoder, context and text branch with the three objectives of paper 3.4.

    With ``chat`` the encoder, context and concepts are that model's own, in its dtype.
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
            self.encoder = OmniEncoder(config.encoder_config)
            self.context = MultimodalContext(config.context_config, self.encoder.embed_dim)
            self.concepts = build_concepts(config.concept_config, self.encoder)
        d = self.encoder.embed_dim if chat is None else chat.encoder.embed_dim
        self.text = TextBranch(text, d, config.context_config)
        self.media_projection: nn.Linear | ContrastiveHeads
        self.subtitle_projection: nn.Linear | None = None
        said = text.hidden_size if text.subtitles else None
        if text.frames is None:
            self.media_projection = nn.Linear(d, text.projection_dim, bias=False)
            if said is not None:
                self.subtitle_projection = nn.Linear(said, text.projection_dim, bias=False)
        else:
            self.media_projection = ContrastiveHeads(self.rows, d, text.projection_dim, said)
        self.text_projection = nn.Linear(text.hidden_size, text.projection_dim, bias=False)
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
    ) -> EncodedContexts:
        """Media of ``n`` samples, and their subtitles, if any; ``change`` is of named cells."""
        media = (media_kind, media_units)
        features = self.encoder.unit_features(*media, pixel_values, stem_features)
        units = Units.of(*media)
        tokens = self.in_context(self.unit_tokens(features, units), features, *media, change)
        row = torch.repeat_interleave(media_row, media_units)  # (U,) sample of each unit
        return EncodedContexts(*self.join(tokens, units, row, n, subtitles), features)

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
        tokens = self.context(tokens, media_kind, media_units)
        if self.names is None or self.concepts is None:
            return tokens
        media = (media_kind, media_units)
        named = self.names.tokens(self.concepts, features, *media, self.text.table, change)
        return torch.cat([tokens, named.to(tokens.dtype)], 1)

    def join(
        self, tokens: Tensor, units: Units, row: Tensor, n: int, subtitles: Subtitles | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Units' tokens (U, T, D) to one context for each of ``n`` samples.

        ``row`` (U,) is the sample of each unit, in ascending order. Returns ``context``,
        ``mask``, ``pooled`` and ``tokens`` of :class:`EncodedContexts`.
        """
        said = cls_said = there = None
        if subtitles is not None and self.text.subtitle is not None:
            hidden = self.text(*subtitles)
            said, cls_said, there = self.text.subtitle(hidden), hidden[:, 0], subtitles.there
        if isinstance(self.media_projection, ContrastiveHeads):
            heads = (tokens[:, 0], units.kind, row, n, cls_said, there)
            point = self.media_projection(*heads)
        else:
            counts = torch.bincount(row, minlength=n)
            cls = torch.zeros(n, tokens.shape[2], dtype=tokens.dtype, device=tokens.device)
            cls = cls.index_add(0, row, tokens[:, 0]) / counts.clamp(min=1).unsqueeze(1)
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

    def read(self, input_ids: Tensor, attention_mask: Tensor, *over: Tensor | Corpora) -> Tensor:
        """Captions (B, S), alone or over media, in one vector each: [CLS]'s (B, d)."""
        return cast(Tensor, self.text(input_ids, attention_mask, *over)[:, 0])

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions (B, S) -> unit-length features (B, P) of the contrastive space."""
        point = self.text_projection(self.read(input_ids, attention_mask))
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
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        caption_corpus: Tensor | None = None,
        media_corpus: Tensor | None = None,
        concept_labels: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        subtitle_ids: Tensor | None = None,
        subtitle_mask: Tensor | None = None,
        advantage: Tensor | None = None,
        change: ChangeCells | None = None,
        **regions: Tensor,
    ) -> MicoPretrainingOutput:
        """The objectives of a batch; masks and hard negatives are drawn from torch's generator.

        An objective of weight 0 is not computed. With questions (B, P), which only the caption
        objective uses, the captions are answers. ``subtitle_ids`` and ``subtitle_mask`` (B, S) are
        :class:`Subtitles`. With an ``advantage`` (B,) the captions are the model's own, and become
        more likely by it (the caption objective alone). ``change`` makes other logits of the cells
        that are named. ``regions`` are the inputs of a :class:`RegionBatch` of media with one unit
        each. ``caption_corpus`` (B, S) and ``media_corpus`` (M,) are 0, or 1 + the number of a
        kind, see :class:`Corpora`. Contrast has no E_Sam: it would tell joint samples by it, on
        both sides, and not by what they show.
        """
        n = len(input_ids)
        subtitles = None
        if subtitle_ids is not None and subtitle_mask is not None:
            subtitles = Subtitles(subtitle_ids, subtitle_mask)
        context, context_mask, pooled, tokens, features = self.encode(
            media_kind, media_units, media_row, n, pixel_values, stem_features, subtitles, change
        )
        if caption_corpus is None or media_corpus is None:
            caption_corpus, media_corpus = torch.zeros_like(input_ids), torch.zeros_like(media_kind)
        caption_corpus, media_corpus = map(self.rows.corpora, (caption_corpus, media_corpus))
        of_unit, row = (torch.repeat_interleave(x, media_units) for x in (media_corpus, media_row))
        context_corpus = side_by_side(of_unit, row, n).repeat_interleave(tokens.shape[1], dim=1)
        context_corpus = F.pad(context_corpus, (0, context.shape[1] - context_corpus.shape[1]))
        asked = {name for name, weight in self.objective_weights.items() if weight > 0}
        captions, corpora = (input_ids, attention_mask), Corpora(caption_corpus, context_corpus)
        media = (context, context_mask, corpora)
        losses: dict[str, Tensor] = {}
        if {"contrastive", "matching"} & asked:  # contrast finds the hard negatives of matching
            text = self.encode_text(*captions)
            losses["contrastive"], to_text, to_media = self._contrastive(
                pooled, text, caption_key(*captions)
            )
        if "matching" in asked:
            losses["matching"] = self._matching(captions, *media, to_text, to_media)
        if advantage is not None:
            likely = log_likelihood(self, *captions, context, context_mask)
            words = attention_mask[:, 1:].sum().clamp(min=1)
            losses["caption"] = -(likely * advantage.unsqueeze(1)).sum() / words
        elif "caption" in asked:
            if question_ids is None or question_mask is None:
                question_ids = question_mask = input_ids[:, :0]
            asking = (question_ids, question_mask)
            losses["caption"] = self._caption(asking, captions, *media)
        if "tagging" in asked:
            losses["tagging"] = self._tagging(input_ids, attention_mask, context, context_mask)
        batch = RegionBatch.given(regions)
        if "region" in asked and batch is not None:
            first = (torch.cumsum(media_units, 0) - media_units)[batch.medium]
            losses["region"] = self._region(batch, tokens[first])
        if "concept" in asked and self.concepts is not None and concept_labels is not None:
            named = (media_kind, media_units, concept_labels)
            losses["concept"] = self._concept(self.concepts, features, *named)
        nothing = tokens.sum() * 0.0  # a batch without regions may have no other objective
        loss = sum((self.objective_weights[k] * v for k, v in losses.items()), start=nothing)
        return MicoPretrainingOutput(
            loss=loss, **{f"{name}_loss": value for name, value in losses.items()}
        )

    def _contrastive(
        self, media: Tensor, text: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. (4) over the batches of all ranks; equal captions are no negatives.

        Returns the loss and, for the local rows, the similarities to all texts and media.
        """
        all_media, all_text, all_keys = (gather_rows(x) for x in (media, text, key))
        n = len(media)
        target = torch.arange(n, device=media.device) + ranks()[0] * n
        same = key.unsqueeze(1) == all_keys.unsqueeze(0)
        same[torch.arange(n), target] = False
        temperature = self.temperature.clamp(0.01, 0.5)
        to_text = (media @ all_text.T / temperature).masked_fill(same, float("-inf"))
        to_media = (text @ all_media.T / temperature).masked_fill(same, float("-inf"))
        loss = (F.cross_entropy(to_text, target) + F.cross_entropy(to_media, target)) / 2
        return loss, to_text.detach(), to_media.detach()

    def _matching(
        self,
        captions: tuple[Tensor, Tensor],
        context: Tensor,
        context_mask: Tensor,
        corpora: Corpora,
        to_text: Tensor,
        to_media: Tensor,
    ) -> Tensor:
        """Eq. (5): pairs, and negatives drawn in proportion to exp(similarity · hardness).

        A negative may be of any rank. It is of the same corpora as its pair, so that E_Sam gives no
        answer away. A joint sample that is alone with its corpora counts as one without E_Sam.
        """
        n, (rank, world) = len(context), ranks()
        corpora, alike = self._alike(corpora)
        to_text, to_media = (x.masked_fill(~alike, float("-inf")) for x in (to_text, to_media))
        if n * world == 1:  # no negative to draw
            logits = self.match(*captions, context, context_mask, corpora)
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

        other = torch.ones_like(to_text)
        other[:, rank * n : (rank + 1) * n].fill_diagonal_(0.0)

        def draw(similarity: Tensor) -> tuple[Tensor, Tensor]:
            weights = (self.hardness * similarity).softmax(1).nan_to_num() + 1e-6
            weights = weights.masked_fill(similarity == float("-inf"), 0.0) * other
            none = weights.sum(1, keepdim=True) == 0  # all other captions are the same
            weights = weights + none * other
            return torch.multinomial(weights, 1).squeeze(1), ~none.squeeze(1)

        (wrong_text, has_text), (wrong_media, has_media) = draw(to_text), draw(to_media)
        text = torch.stack([*captions, corpora.text], -1)  # (B, S, 3)
        about = torch.stack([context_mask.to(text.dtype), corpora.context], -1)  # (B, N, 2)
        text, context, about = of_one_length(text, context, about)
        (negative_text,) = fetch_rows(wrong_text, text)
        negative, about_negative = fetch_rows(wrong_media, context, about)
        ids, mask, in_text = torch.cat([text, negative_text, text]).unbind(-1)
        context = torch.cat([context, context, negative])
        seen, in_context = torch.cat([about, about, about_negative]).unbind(-1)
        logits = self.match(ids, mask, context, seen.bool(), Corpora(in_text, in_context))
        labels = torch.zeros_like(logits)
        labels[:n] = 1.0
        known = torch.cat([torch.ones_like(has_text), has_text, has_media])
        loss = F.binary_cross_entropy_with_logits(logits[known], labels[known])
        # The mean over ranks is that over all known pairs.
        return loss * (known.sum() / gather_rows(known.sum().view(1)).float().mean())

    def _alike(self, corpora: Corpora) -> tuple[Corpora, Tensor]:
        """The rows without those of samples alone with their corpora; who of all ranks' samples has
        the same (B, ranks · B)."""
        rows = torch.arange(1, self.text.sampling.num_embeddings, device=corpora.text.device)
        there = (corpora.context.unsqueeze(-1) == rows).any(1)  # (B, rows)
        there = gather_rows(there.byte())
        shared = (there.unsqueeze(1) == there).all(-1).sum(1, keepdim=True) > 1
        there = there * shared
        rank, n = ranks()[0], len(corpora.text)
        own = slice(rank * n, (rank + 1) * n)
        corpora = Corpora(corpora.text * shared[own], corpora.context * shared[own])
        return corpora, (there[own].unsqueeze(1) == there).all(-1)

    def _caption(
        self,
        questions: tuple[Tensor, Tensor],
        captions: tuple[Tensor, Tensor],
        context: Tensor,
        context_mask: Tensor,
        corpora: Corpora,
    ) -> Tensor:
        """Eq. (6): 60 % of the words masked, causal attention, media by cross-attention.

        Questions (B, P) are a prefix, P may be 0 (appendix B.2).
        """
        question_ids, question_mask = questions
        input_ids, attention_mask = captions
        can = attention_mask.bool().clone()
        can[:, 0] = False  # [CLS]
        masked = can & (
            torch.rand(input_ids.shape, device=input_ids.device) < self.config.mask_probability
        )
        if not bool(masked.any()):
            masked = can
        given = torch.cat([question_ids, input_ids.masked_fill(masked, self.mask_token_id)], 1)
        seen = backwards(question_mask, given.shape[1])  # a caption's padding is at its end
        named = Corpora(F.pad(corpora.text, (question_ids.shape[1], 0)), corpora.context)
        hidden = self.text(given, seen, context, context_mask, named)
        hidden = hidden[:, question_ids.shape[1] :]
        return F.cross_entropy(self.text.logits(hidden[masked]).float(), input_ids[masked])

    def _tagging(
        self, input_ids: Tensor, attention_mask: Tensor, context: Tensor, context_mask: Tensor
    ) -> Tensor:
        """The mean context token predicts the words of the caption, in any order.

        As in Tag2Text (arXiv 2303.05657): contrast alone loses colours, numbers and places. A word
        counts less the more captions of the batch have it.
        """
        tags = torch.zeros(
            len(input_ids), self.text.head_bias.shape[0], device=input_ids.device
        ).scatter_(1, input_ids, attention_mask.float())
        tags[:, input_ids[:, 0]] = 0  # [CLS]
        tags = tags / tags.sum(0).clamp(min=1)
        tags = tags / tags.sum(1, keepdim=True).clamp(min=torch.finfo(tags.dtype).tiny)
        seen = context_mask.unsqueeze(-1).to(context.dtype)
        mean = (context * seen).sum(1) / seen.sum(1).clamp(min=1)
        return -(tags * self.text.logits(mean).float().log_softmax(-1)).sum(1).mean()

    def _region(self, regions: RegionBatch, tokens: Tensor) -> Tensor:
        """Each token of a region predicts the region's words; tokens (R, T, d) of its medium.

        A whole medium's words are predicted by its prefix token.
        """
        words, wanted = regions.vocabulary(regions.both)
        own = regions.places(cell_centres(self.encoder.grid).to(regions.box))
        own = torch.cat([regions.whole.unsqueeze(1).expand(-1, self.encoder.n_prefix), own], 1)
        region, place = own.nonzero(as_tuple=True)
        return region_loss(self.text.logits(tokens[region, place], words), region, wanted)

    def _concept(
        self,
        concepts: ConceptAttention,
        features: Tensor,
        media_kind: Tensor,
        media_units: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Cross-entropy of the concept heads on media of one named thing each."""

        def visual_logits(features: Tensor, units: Tensor) -> Tensor:
            logits = concepts.cell_logits(features).mean(1)
            return torch.stack([medium.mean(0) for medium in logits.split(units.tolist())])

        sound = media_kind == KINDS.index("audio")
        of_unit = torch.repeat_interleave(media_units)  # the medium of each unit
        total = features.new_zeros(())
        for is_sound, heads in ((False, visual_logits), (True, concepts.sound_logits)):
            chosen = (labels >= 0) & (sound == is_sound)
            if not bool(chosen.any()):
                continue
            if is_sound and int(chosen.sum()) == 1 and self.training:
                continue  # a batch norm over one row has no variance
            logits = heads(features[chosen[of_unit]], media_units[chosen])
            target = labels[chosen] - (concepts.n_visual if is_sound else 0)
            total = total + F.cross_entropy(logits.float(), target, label_smoothing=0.05)
        return total


AutoModel.register(MicoConfig, MicoForPretraining)

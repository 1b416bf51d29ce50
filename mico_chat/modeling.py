"""MicoForPretraining (stage 1) and MicoChatForConditionalGeneration (stages 2 and 3, chat).

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, S text length, L LLM width. A batch's media lie flat, sample after sample:
``media_kind``, ``media_units``, ``media_row`` (M,) say what each is, how many units it has and
which sample it belongs to; ``pixel_values`` (U, 3, H, W) or the stem's ``stem_features``
(U, C, G, G) hold their units in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from mico_chat.base_llm import base_llm_path
from mico_chat.bridge import PerceiverBridge
from mico_chat.concept import ConceptAttention
from mico_chat.config import (
    MicoBridgeConfig,
    MicoChatConfig,
    MicoConceptConfig,
    MicoConfig,
    MicoContextConfig,
    MicoEncoderConfig,
    MicoTextConfig,
    layout_of,
)
from mico_chat.context import MultimodalContext
from mico_chat.encoder import OmniEncoder
from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS

logger = logging.getLogger(__name__)


def build_concepts(config: object, encoder: OmniEncoder) -> ConceptAttention | None:
    """The concept attention a config asks for; it needs a hybrid encoder's stem."""
    if not isinstance(config, MicoConceptConfig):
        return None
    if encoder.stem is None:
        raise ModelError("concept_config needs an encoder with a stem, but encoder_config has none")
    return ConceptAttention(config, encoder.stem)


def media_units_total(media_units: Tensor, units: int) -> None:
    """Checks that a batch's unit counts and units agree."""
    if int(media_units.sum()) != units:
        raise ModelError(f"media_units sum to {int(media_units.sum())} but there are {units} units")


# --------------------------------------------------------------------------- stage 1: pretraining


@dataclass
class MicoPretrainingOutput(ModelOutput):
    """The weighted sum of the objectives and each of them, scalars."""

    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    matching_loss: Tensor | None = None
    caption_loss: Tensor | None = None
    concept_loss: Tensor | None = None


def gather_features(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with gradients to each; ``x`` itself on one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    if not x.requires_grad:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous()))


def caption_key(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A number per caption (B,), equal for equal captions whatever their padding."""
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    words = (input_ids + 1) * attention_mask * (position * 2654435761 % 1000003)
    return words.sum(1)


class TextBranch(nn.Module):
    """BERT with cross-attention: alone, over media, or causal over media (paper 3.4)."""

    def __init__(self, config: MicoTextConfig, context_dim: int, n_corpus_pairs: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.bert = BertModel(config.bert(), add_pooling_layer=False)
        self.context_proj = nn.Sequential(nn.Linear(context_dim, d), nn.LayerNorm(d))
        self.sampling = nn.Embedding(n_corpus_pairs, d)  # E_Sam of the caption's side, eq. (3)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        corpus_pair: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Captions (B, S), context (B, N, d) already projected -> hidden states (B, S, d)."""
        s = input_ids.shape[1]
        mask = attention_mask[:, None, None, :].bool().expand(-1, 1, s, s)
        if causal:
            mask = mask & torch.ones(s, s, dtype=torch.bool, device=mask.device).tril()
        embeds = self.bert.get_input_embeddings()(input_ids)
        embeds = embeds + self.sampling(corpus_pair).unsqueeze(1)
        cross = None
        if context is not None and context_mask is not None:
            cross = context_mask[:, None, None, :].expand(-1, 1, s, -1)
        return cast(
            Tensor,
            self.bert(
                inputs_embeds=embeds,
                attention_mask=mask,
                encoder_hidden_states=context,
                encoder_attention_mask=cross,
            ).last_hidden_state,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits; the output table is the input one."""
        table = self.bert.get_input_embeddings().weight
        return cast(Tensor, F.linear(self.head(hidden), table, self.head_bias))


class MicoForPretraining(PreTrainedModel):
    """Encoder, context and text branch with the three objectives of paper 3.4."""

    config_class = MicoConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MicoConfig) -> None:
        super().__init__(config)
        encoder, context, text = config.encoder_config, config.context_config, config.text_config
        assert isinstance(encoder, MicoEncoderConfig)
        assert isinstance(context, MicoContextConfig)
        assert isinstance(text, MicoTextConfig)
        self.encoder = OmniEncoder(encoder)
        d = self.encoder.embed_dim
        self.context = MultimodalContext(context, d)
        self.concepts = build_concepts(config.concept_config, self.encoder)
        self.text = TextBranch(text, d, context.n_corpus_pairs)
        self.media_projection = nn.Linear(d, text.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, text.projection_dim, bias=False)
        self.matching_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size),
            nn.GELU(),
            nn.LayerNorm(text.hidden_size),
            nn.Linear(text.hidden_size, 1),
        )
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.objective_weights = {"contrastive": 1.0, "matching": 1.0, "caption": 1.0}
        self.objective_weights["concept"] = 1.0
        self.mask_token_id = text.mask_token_id
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; a folder holds every weight."""

    def encode(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        media_row: Tensor,
        corpus_pair: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Media to one context a sample.

        Returns:
            context (B, N, d) for cross-attention, its mask (B, N), pooled features (B, P) of
            unit length, and the encoder's features (U, C, G, G) for the concept heads.
        """
        features = _features(self.encoder, pixel_values, stem_features)
        media_units_total(media_units, len(features))
        tokens = self.context(self.encoder(features), media_kind, media_units)  # (U, T, D)
        row = torch.repeat_interleave(media_row, media_units)  # (U,) sample of each unit
        b, t = len(corpus_pair), tokens.shape[1]
        tokens = tokens + self.context.sampling(corpus_pair)[row].unsqueeze(1)
        counts = torch.bincount(row, minlength=b)
        cls = torch.zeros(b, tokens.shape[2], dtype=tokens.dtype, device=tokens.device)
        cls = cls.index_add(0, row, tokens[:, 0]) / counts.clamp(min=1).unsqueeze(1)
        pooled = F.normalize(self.media_projection(cls).float(), dim=-1)
        # z = [z_I, z_A, z_V, ...]: units of a sample side by side, eq. (1)
        place = torch.arange(len(row), device=row.device) - (torch.cumsum(counts, 0) - counts)[row]
        most = int(counts.max())
        context = tokens.new_zeros(b, most, t, tokens.shape[2])
        context = context.index_put((row, place), tokens)
        mask = torch.arange(most, device=row.device) < counts.unsqueeze(1)
        mask = mask.repeat_interleave(t, dim=1)
        return self.text.context_proj(context.flatten(1, 2)), mask, pooled, features

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor, corpus_pair: Tensor | None = None
    ) -> Tensor:
        """Captions (B, S) -> unit-length features (B, P) of the contrastive space."""
        if corpus_pair is None:
            corpus_pair = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        hidden = self.text(input_ids, attention_mask, corpus_pair)
        return F.normalize(self.text_projection(hidden[:, 0]).float(), dim=-1)

    def match(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        corpus_pair: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Tensor:
        """Matching logits (B,) of captions and contexts, eq. (5)."""
        hidden = self.text(input_ids, attention_mask, corpus_pair, context, context_mask)
        return cast(Tensor, self.matching_head(hidden[:, 0]).squeeze(-1).float())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        media_kind: Tensor,
        media_units: Tensor,
        media_row: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        corpus_pair: Tensor | None = None,
        concept_labels: Tensor | None = None,
        return_loss: bool = True,
    ) -> MicoPretrainingOutput:
        """The objectives of a batch; masks and hard negatives are drawn from torch's generator."""
        del return_loss  # part of the Trainer's interface: this model always returns losses
        if corpus_pair is None:
            corpus_pair = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        context, context_mask, pooled, features = self.encode(
            media_kind, media_units, media_row, corpus_pair, pixel_values, stem_features
        )
        text = self.encode_text(input_ids, attention_mask, corpus_pair)
        losses: dict[str, Tensor] = {}
        losses["contrastive"], to_text, to_media = self._contrastive(
            pooled, text, caption_key(input_ids, attention_mask)
        )
        captions = (input_ids, attention_mask, corpus_pair)
        losses["matching"] = self._matching(captions, context, context_mask, to_text, to_media)
        losses["caption"] = self._caption(captions, context, context_mask)
        if concept_labels is not None and self.concepts is not None:
            losses["concept"] = self._concept(features, media_kind, media_units, concept_labels)
        loss = torch.stack([self.objective_weights[k] * v for k, v in losses.items()]).sum()
        return MicoPretrainingOutput(
            loss=loss, **{f"{name}_loss": value for name, value in losses.items()}
        )

    def _contrastive(
        self, media: Tensor, text: Tensor, key: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Eq. (4) over the batches of all ranks; equal captions are no negatives.

        Returns the loss and, for the local rows, the similarities to local texts and media.
        """
        all_media, all_text, all_keys = (gather_features(x) for x in (media, text, key))
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        n = len(media)
        target = torch.arange(n, device=media.device) + rank * n
        same = key.unsqueeze(1) == all_keys.unsqueeze(0)
        same[torch.arange(n), target] = False
        temperature = self.temperature.clamp(0.01, 0.5)
        to_text = (media @ all_text.T / temperature).masked_fill(same, float("-inf"))
        to_media = (text @ all_media.T / temperature).masked_fill(same, float("-inf"))
        loss = (F.cross_entropy(to_text, target) + F.cross_entropy(to_media, target)) / 2
        local = slice(rank * n, (rank + 1) * n)
        return loss, to_text.detach()[:, local], to_media.detach()[:, local]

    def _matching(
        self,
        captions: tuple[Tensor, Tensor, Tensor],
        context: Tensor,
        context_mask: Tensor,
        to_text: Tensor,
        to_media: Tensor,
    ) -> Tensor:
        """Eq. (5): pairs, and negatives drawn in proportion to their similarity."""
        input_ids, attention_mask, corpus_pair = captions
        n = len(input_ids)
        if n == 1:  # no negative to draw
            logits = self.match(*captions, context, context_mask)
            return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

        def draw(similarity: Tensor) -> Tensor:
            weights = similarity.softmax(1).nan_to_num() + 1e-6
            weights = weights.masked_fill(similarity == float("-inf"), 0.0)
            weights.fill_diagonal_(0.0)
            weights = weights + (weights.sum(1, keepdim=True) == 0) * (
                1 - torch.eye(n, device=weights.device)
            )
            return torch.multinomial(weights, 1).squeeze(1)

        wrong_text, wrong_media = draw(to_text), draw(to_media)
        rows = torch.arange(n, device=input_ids.device)
        text_rows = torch.cat([rows, wrong_text, rows])
        media_rows = torch.cat([rows, rows, wrong_media])
        logits = self.match(
            input_ids[text_rows],
            attention_mask[text_rows],
            corpus_pair[text_rows],
            context[media_rows],
            context_mask[media_rows],
        )
        labels = torch.zeros_like(logits)
        labels[:n] = 1.0
        return F.binary_cross_entropy_with_logits(logits, labels)

    def _caption(
        self, captions: tuple[Tensor, Tensor, Tensor], context: Tensor, context_mask: Tensor
    ) -> Tensor:
        """Eq. (6): 60 % of the words masked, causal attention, media by cross-attention."""
        assert isinstance(self.config, MicoConfig)
        input_ids, attention_mask, corpus_pair = captions
        can = attention_mask.bool().clone()
        can[:, 0] = False  # [CLS]
        masked = can & (
            torch.rand(input_ids.shape, device=input_ids.device) < self.config.mask_probability
        )
        if not bool(masked.any()):
            masked = can
        hidden = self.text(
            input_ids.masked_fill(masked, self.mask_token_id),
            attention_mask,
            corpus_pair,
            context,
            context_mask,
            causal=True,
        )
        return F.cross_entropy(self.text.logits(hidden[masked]).float(), input_ids[masked])

    def _concept(
        self, features: Tensor, media_kind: Tensor, media_units: Tensor, labels: Tensor
    ) -> Tensor:
        """Cross-entropy of the concept heads on media that show or sound one named thing."""
        assert self.concepts is not None
        sound = media_kind == KINDS.index("audio")
        of_unit = torch.repeat_interleave(torch.arange(len(labels)), media_units)
        total = features.new_zeros(())
        for is_sound, heads in ((False, self._visual_logits), (True, self.concepts.sound_logits)):
            chosen = (labels >= 0) & (sound == is_sound)
            if not bool(chosen.any()):
                continue
            if is_sound and int(chosen.sum()) == 1 and self.training:
                continue  # a batch norm over one row has no variance
            logits = heads(features[chosen[of_unit]], media_units[chosen])
            target = labels[chosen] - (self.concepts.n_visual if is_sound else 0)
            total = total + F.cross_entropy(logits.float(), target, label_smoothing=0.05)
        return total

    def _visual_logits(self, features: Tensor, units: Tensor) -> Tensor:
        assert self.concepts is not None
        logits = self.concepts.cell_logits(features).mean(1)
        medium = torch.repeat_interleave(torch.arange(len(units)), units)
        total = logits.new_zeros(len(units), logits.shape[1]).index_add(0, medium, logits)
        return total / units.unsqueeze(1)


# ------------------------------------------------------------------------------------------ chat


def _features(
    encoder: OmniEncoder, pixel_values: Tensor | None, stem_features: Tensor | None
) -> Tensor:
    if (pixel_values is None) == (stem_features is None):
        raise ModelError("give either pixel_values or stem_features")
    if stem_features is not None:
        return stem_features.to(next(encoder.vit.parameters()).dtype)
    assert pixel_values is not None
    return encoder.features(pixel_values.to(next(encoder.parameters()).dtype))


def splice(embeds: Tensor, is_context: Tensor, context: Tensor) -> Tensor:
    """Puts context tokens (N, L) at the placeholders (B, S) of text embeddings (B, S, L).

    Raises:
        ModelError: if the numbers of placeholders and context tokens differ.
    """
    n = int(is_context.sum())
    if n != len(context):
        raise ModelError(
            f"{n} context placeholders in the prompt but {len(context)} context tokens"
        )
    return embeds.masked_scatter(is_context.unsqueeze(-1), context.to(embeds.dtype))


class MicoChatForConditionalGeneration(PreTrainedModel):
    """MiCo-Chat: media through encoder, context and bridge into a causal language model.

    ``use_concepts`` and ``use_grid`` switch a path off (ablation); ``path_dropout`` switches
    each off at random while training, so that the model can do without. ``name_dropout`` hides
    the learned names of a medium at random, which know the training pictures too well.
    """

    config_class = MicoChatConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["OmniEncoder", "PerceiverBridge", "LlamaDecoderLayer"]

    def __init__(self, config: MicoChatConfig) -> None:
        super().__init__(config)
        encoder, context, bridge = (
            config.encoder_config,
            config.context_config,
            config.bridge_config,
        )
        assert isinstance(encoder, MicoEncoderConfig)
        assert isinstance(context, MicoContextConfig)
        assert isinstance(bridge, MicoBridgeConfig)
        assert isinstance(config.llm_config, PreTrainedConfig)
        self.encoder = OmniEncoder(encoder)
        d = self.encoder.embed_dim
        self.context = MultimodalContext(context, d)
        self.concepts = build_concepts(config.concept_config, self.encoder)
        self.bridge = PerceiverBridge(
            bridge, d, self.encoder.grid, self.encoder.n_prefix, config.llm_config.hidden_size
        )
        self.llm: Any = None
        if config.base_llm is None:
            self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        self.use_concepts = True
        self.use_grid = True
        self.path_dropout = 0.0
        self.name_dropout = 0.0
        self.post_init()
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves; a folder holds every weight."""

    def train(self, mode: bool = True) -> Self:
        """Encoder and concepts keep the statistics of pretraining (batch norm, dropout off)."""
        super().train(mode)
        self.encoder.eval()
        if self.concepts is not None:
            self.concepts.eval()
        return self

    # --- folders ----------------------------------------------------------------------------

    def attach_llm(self, llm: PreTrainedModel) -> None:
        """Takes a language model whose weights lie elsewhere (``config.base_llm``).

        Raises:
            ModelError: if its width is not the bridge's.
        """
        assert isinstance(self.config, MicoChatConfig)
        width, ours = llm.config.hidden_size, self.bridge.proj_out.out_features
        if width != ours:
            raise ModelError(f"the language model is {width} wide but the bridge gives {ours}")
        self.llm = llm
        self.config.llm_config = llm.config

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As in Hugging Face; the base LLM and the ``lora`` adapter are put in where used."""
        config = kwargs.get("config") or MicoChatConfig.from_pretrained(
            folder, **{k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
        )
        if config.base_llm is None:
            return cast(Self, super().from_pretrained(folder, *args, **kwargs))
        quantization = kwargs.pop("quantization_config", None)
        model = cast(Self, super().from_pretrained(folder, *args, **kwargs))
        llm_kwargs = {k: kwargs[k] for k in ("dtype", "device_map") if kwargs.get(k) is not None}
        if quantization is not None:
            llm_kwargs["quantization_config"] = quantization
        llm = AutoModelForCausalLM.from_pretrained(base_llm_path(config.base_llm), **llm_kwargs)
        adapter = Path(folder) / "lora"
        if adapter.is_dir():
            from peft import PeftModel

            peft = PeftModel.from_pretrained(llm, str(adapter))
            llm = peft if quantization is not None else peft.merge_and_unload()
        model.attach_llm(llm)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in Hugging Face; a base LLM's frozen weights are left out."""
        assert isinstance(self.config, MicoChatConfig)
        if self.config.base_llm is not None:
            state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("llm.")}
            llm, self.llm = self.llm, None
            try:
                super().save_pretrained(folder, *args, **kwargs)
            finally:
                self.llm = llm
        else:
            super().save_pretrained(folder, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's token table."""
        return cast(nn.Module, self._llm().get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        """The LLM's vocabulary head."""
        return None if self.llm is None else cast(nn.Module, self.llm.get_output_embeddings())

    def _llm(self) -> Any:
        if self.llm is None:
            raise ModelError(
                "this model has no language model yet: load it with from_pretrained, "
                "or give it one with attach_llm"
            )
        return self.llm

    # --- media to context tokens --------------------------------------------------------------

    def context_tokens(
        self,
        media_kind: Tensor,
        media_units: Tensor,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        simulated_names: Tensor | None = None,
    ) -> list[Tensor]:
        """Context tokens of each medium, (n_i, L), in the media's order.

        ``simulated_names`` (M,), for training: where not -1, the concept path sees this name
        instead of the picture (:meth:`ConceptAttention.simulate`).
        """
        features = _features(self.encoder, pixel_values, stem_features)
        media_units_total(media_units, len(features))
        tokens = self.context(self.encoder(features), media_kind, media_units)
        starts = (torch.cumsum(media_units, 0) - media_units).tolist()
        kinds, units = media_kind.tolist(), media_units.tolist()
        groups: dict[tuple[str, int], list[int]] = {}
        for m, (kind, n) in enumerate(zip(kinds, units, strict=True)):
            groups.setdefault((layout_of(KINDS[kind]), n), []).append(m)
        out: list[Tensor] = [tokens] * len(kinds)
        for (_, n), members in groups.items():
            rows = torch.tensor([starts[m] + i for m in members for i in range(n)])
            rows = rows.to(tokens.device)
            names = None if simulated_names is None else simulated_names[members]
            group = self._group_tokens(tokens[rows], features[rows], media_kind[members], n, names)
            for m, context in zip(members, group, strict=True):
                out[m] = context
        return out

    def _group_tokens(
        self, tokens: Tensor, features: Tensor, kind: Tensor, units: int, names: Tensor | None
    ) -> Tensor:
        """Media of one layout: tokens (B·U, T, D) -> context tokens (B, N, L)."""
        b, layout = len(kind), layout_of(KINDS[int(kind[0])])
        keep_concepts, keep_grid = self._paths(b)
        concepts, values, named = self.concepts, None, None
        if concepts is not None:
            table = cast(nn.Embedding, self.get_input_embeddings())
            if layout == "slices":
                per_sound = torch.full((b,), units, device=kind.device)
                named = concepts.sound_tokens(concepts.sound_logits(features, per_sound), table)
            else:
                cells = self._cell_logits(concepts, features, units, names)
                values = concepts.cell_values(cells, table).to(tokens.dtype)
                values = F.pad(values, (0, 0, self.encoder.n_prefix, 0)).unflatten(0, (b, units))
                values = values * keep_concepts.view(-1, 1, 1, 1).to(values.dtype)
                if layout == "still":
                    named = concepts.visual_tokens(cells, table)
        context = self.bridge(tokens.unflatten(0, (b, units)), kind, layout, values)
        context = context * keep_grid.view(-1, 1, 1).to(context.dtype)
        if named is not None:
            named = named * keep_concepts.view(-1, 1, 1).to(named.dtype)
            context = torch.cat([named.to(context.dtype), context], dim=1)
        return cast(Tensor, context)

    def _cell_logits(
        self, concepts: ConceptAttention, features: Tensor, units: int, names: Tensor | None
    ) -> Tensor:
        """What each cell shows, (B·U, G², n_visual); simulated or thinned out while training."""
        cells = concepts.cell_logits(features)
        if not self.training:
            return cells
        if self.name_dropout > 0:
            hidden = torch.rand(len(cells) // units, device=cells.device) < self.name_dropout
            hidden = hidden.repeat_interleave(units).view(-1, 1, 1)
            learned = torch.arange(cells.shape[-1], device=cells.device) >= concepts.n_pretrained
            cells = cells.masked_fill(hidden & learned, -30.0)
        if names is not None and units == 1 and bool((names >= 0).any()):
            chosen = names >= 0
            cells = cells.clone()
            cells[chosen] = concepts.simulate(names[chosen], cells.shape[1]).to(cells.dtype)
        return cells

    def _paths(self, b: int) -> tuple[Tensor, Tensor]:
        """Which of ``b`` media keep the concept path and the grid path, as 0 or 1."""
        concepts = torch.full((b,), float(self.use_concepts), device=self.device)
        grid = torch.full((b,), float(self.use_grid), device=self.device)
        if self.training and self.path_dropout > 0:
            u = torch.rand(b, device=self.device)
            concepts = concepts * (u >= self.path_dropout)
            grid = grid * ((u < self.path_dropout) | (u >= 2 * self.path_dropout))
        return concepts, grid

    def embed_prompt(self, input_ids: Tensor, media: Mapping[str, Tensor]) -> Tensor:
        """Token ids (B, S) with placeholders, and media, to embeddings (B, S, L)."""
        assert isinstance(self.config, MicoChatConfig)
        is_context = input_ids == self.config.context_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_context, 0))
        if "media_kind" not in media or len(media["media_kind"]) == 0:
            return splice(embeds, is_context, embeds.new_zeros(0, embeds.shape[-1]))
        context = self.context_tokens(**{k: v for k, v in media.items() if k != "media_row"})
        return splice(embeds, is_context, torch.cat(context))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        media_kind: Tensor | None = None,
        media_units: Tensor | None = None,
        media_row: Tensor | None = None,
        simulated_names: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token loss over ``labels`` (-100: no loss), or logits (B, S, V) without labels.

        With labels the vocabulary head runs on the labelled positions only, and no logits are
        returned: with a short answer after a long prompt that is most of the head's work saved.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            media = _given(
                pixel_values=pixel_values,
                stem_features=stem_features,
                media_kind=media_kind,
                media_units=media_units,
                media_row=media_row,
                simulated_names=simulated_names,
            )
            inputs_embeds = self.embed_prompt(input_ids, media)
        llm = self._llm()
        if labels is None:
            return cast(
                CausalLMOutputWithPast,
                llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs),
            )
        kwargs.pop("num_items_in_batch", None)
        decoder: Callable[..., Any] = llm.get_decoder()
        hidden = decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        spoken = labels[:, 1:] != -100
        logits = llm.get_output_embeddings()(hidden[:, :-1][spoken])
        loss = F.cross_entropy(logits.float(), labels[:, 1:][spoken])
        return CausalLMOutputWithPast(loss=loss)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        stem_features: Tensor | None = None,
        media_kind: Tensor | None = None,
        media_units: Tensor | None = None,
        media_row: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The LLM's ``generate`` on the spliced prompt; returns the new tokens alone."""
        media = _given(
            pixel_values=pixel_values,
            stem_features=stem_features,
            media_kind=media_kind,
            media_units=media_units,
            media_row=media_row,
        )
        embeds = self.embed_prompt(input_ids, media)
        return self._llm().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


AutoConfig.register("mico", MicoConfig)
AutoConfig.register("mico_chat", MicoChatConfig)
AutoModel.register(MicoConfig, MicoForPretraining)
AutoModel.register(MicoChatConfig, MicoChatForConditionalGeneration)

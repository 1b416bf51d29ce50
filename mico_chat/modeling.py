"""MicoChatForConditionalGeneration: media and text in, the language model's words out.

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, S text length, L LLM width. A batch's media lie flat, sample after sample:
``media_kind``, ``media_units``, ``media_row`` (M,) say what each is, how many units it has and
which sample it belongs to; ``pixel_values`` (U, 3, H, W) or the stem's ``stem_features``
(U, C, G, G) hold their units in the same order.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from mico_chat.bridge import PerceiverBridge
from mico_chat.concept import ConceptAttention, build_concepts
from mico_chat.config import (
    MediaLayout,
    MicoBridgeConfig,
    MicoChatConfig,
    MicoContextConfig,
    MicoEncoderConfig,
    layout_of,
)
from mico_chat.context import MultimodalContext
from mico_chat.encoder import OmniEncoder, init_buffers
from mico_chat.errors import ModelError
from mico_chat.folders import LLM, LORA, llm_source, part_of
from mico_chat.media.kinds import KINDS
from mico_chat.pretraining import MicoForPretraining, gather_features

__all__ = [
    "MicoChatForConditionalGeneration",
    "MicoForPretraining",
    "gather_features",
    "splice",
]

NO_SPLIT = ["OmniEncoder", "PerceiverBridge", "LlamaDecoderLayer"]
"""Modules that a ``device_map`` keeps on one device."""


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
    ``keeps_step`` is for processes that share weights or gradients (FSDP, DeepSpeed): a batch then
    runs the encoder and uses all of the bridge whatever media it has, even none, for each process
    waits for the others there. ``generation`` is what ``generation_config.json`` says. It is for
    chats alone (:meth:`mico_chat.engine.base.GenerationOptions.of_checkpoint`): ``generate`` does
    not look at it.
    """

    config_class = MicoChatConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True
    _no_split_modules = NO_SPLIT

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
        self.keeps_step = False
        self.generation: dict[str, Any] | None = None
        PreTrainedModel.post_init(self)
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves, and a folder holds every weight, but not every buffer."""
        init_buffers(module)

    def train(self, mode: bool = True) -> Self:
        """Encoder and concepts keep the statistics of pretraining (batch norm, dropout off)."""
        super().train(mode)
        self.encoder.eval()
        if self.concepts is not None:
            self.concepts.eval()
        return self

    # --- folders ----------------------------------------------------------------------------

    def attach_llm(self, llm: PreTrainedModel | TokenTable) -> None:
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
        """As in Hugging Face; the base LLM and the ``lora`` adapter are put in where used.

        A bitsandbytes ``quantization_config`` is for the language model alone, and so is
        ``llm_dtype`` for a base LLM in another precision than the rest (``dtype``). With
        ``token_table_only`` the base LLM's token vectors stand in its place: enough for
        ``context_tokens``, where another engine runs the language model. With ``without_llm``
        nothing does, and it is not looked for.
        """
        token_table_only = kwargs.pop("token_table_only", False)
        llm_dtype = kwargs.pop("llm_dtype", None)
        without_llm = kwargs.pop("without_llm", False)
        hub: dict[str, Any] = {
            k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs
        }
        config = kwargs.get("config") or MicoChatConfig.from_pretrained(folder, **hub)
        quantization = kwargs.pop("quantization_config", None)
        if config.base_llm is None and quantization is not None:
            kwargs["quantization_config"] = _of_the_llm(quantization)
        model = super().from_pretrained(folder, *args, **kwargs)
        model.generation = _generation(folder, hub)
        if without_llm:
            model.llm = None
            return model.train(False)
        if config.base_llm is None:
            if token_table_only:
                table = cast(nn.Embedding, model.get_input_embeddings())
                model.llm = TokenTable(table.weight, model.llm.config)
            return model
        source = llm_source(folder, config, **hub)
        if config.base_llm == LLM:  # wherever it is saved from now on, its weights are here
            model.config.base_llm = str(source)
        if token_table_only:
            model.attach_llm(TokenTable.of(source, model.dtype))
            return model.train(False)
        llm_kwargs = {k: kwargs[k] for k in ("dtype", "device_map") if kwargs.get(k) is not None}
        if llm_dtype is not None:
            llm_kwargs["dtype"] = llm_dtype
        if quantization is not None:
            llm_kwargs["quantization_config"] = quantization
        model.attach_llm(load_base_llm(folder, source, hub, **llm_kwargs))
        return model.train(False)

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in Hugging Face; a base LLM's frozen weights are left out.

        One that lies in this very folder's ``llm/`` is named so that the folder can be moved.
        """
        assert isinstance(self.config, MicoChatConfig)
        if self.generation is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.generation, indent=2) + "\n"
            (Path(folder) / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
        if (base_llm := self.config.base_llm) is not None:
            state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("llm.")}
            llm, self.llm = self.llm, None
            if Path(base_llm).resolve() == (Path(folder) / LLM).resolve():
                self.config.base_llm = LLM
            try:
                super().save_pretrained(folder, *args, **kwargs)
            finally:
                self.llm, self.config.base_llm = llm, base_llm
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
        features = self.encoder.unit_features(pixel_values, stem_features, media_units)
        tokens = self.context(self.encoder(features), media_kind, media_units)
        held = self.bridge.norm_in.weight.dtype  # a frozen encoder may be held in another
        tokens, features = tokens.to(held), features.to(held)
        starts = (torch.cumsum(media_units, 0) - media_units).tolist()
        kinds, units = media_kind.tolist(), media_units.tolist()
        groups: dict[tuple[MediaLayout, int], list[int]] = {}
        for m, (kind, n) in enumerate(zip(kinds, units, strict=True)):
            groups.setdefault((layout_of(KINDS[kind]), n), []).append(m)
        out: list[Tensor] = [tokens] * len(kinds)
        for (layout, n), members in groups.items():
            rows = torch.tensor([starts[m] + i for m in members for i in range(n)])
            rows = rows.to(tokens.device)
            names = None if simulated_names is None else simulated_names[members]
            kind = media_kind[members]
            group = self.alike_tokens(tokens[rows], features[rows], kind, layout, n, names)
            for m, context in zip(members, group, strict=True):
                out[m] = context
        if self.keeps_step:
            out[0] = out[0] + touch(self.context, self.concepts, self.bridge).to(out[0].dtype)
        return out

    def alike_tokens(
        self,
        tokens: Tensor,
        features: Tensor,
        kind: Tensor,
        layout: MediaLayout,
        units: int,
        names: Tensor | None = None,
    ) -> Tensor:
        """Media of one layout and unit count: tokens (B·U, T, D) -> context tokens (B, N, L)."""
        b = len(kind)
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
            embeds = splice(embeds, is_context, embeds.new_zeros(0, embeds.shape[-1]))
            return embeds + self._blank().sum().to(embeds.dtype) * 0 if self.keeps_step else embeds
        context = self.context_tokens(**{k: v for k, v in media.items() if k != "media_row"})
        return splice(embeds, is_context, torch.cat(context))

    def _blank(self) -> Tensor:
        """Context tokens of a blank picture."""
        encoder = self.config.encoder_config
        assert isinstance(encoder, MicoEncoderConfig)
        one = torch.ones(1, dtype=torch.long, device=self.device)
        side = encoder.image_size
        pixels = torch.zeros(1, 3, side, side, device=self.device)
        return self.context_tokens(one - 1, one, pixel_values=pixels)[0]

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


def touch(*modules: nn.Module | None) -> Tensor:
    """Zero, with a gradient of zero to every weight of the modules that trains."""
    weights = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    total = torch.zeros((), device=weights[0].device if weights else None)
    return sum((weight.sum() * 0 for weight in weights), start=total)


_IF_THERE: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
_TABLE = "model.embed_tokens.weight"


def _read_safetensors(file: str) -> Tensor | None:
    with safe_open(file, framework="pt") as tensors:
        if _TABLE not in tensors.keys():  # noqa: SIM118  # not a mapping
            return None
        weight: Tensor = tensors.get_tensor(_TABLE)
        return weight


def _read_pickled(file: str) -> Tensor | None:
    """From a file of ``torch.save``, which Vicuna's weights are; the other tensors stay on disk."""
    weight: Tensor | None = torch.load(file, "cpu", weights_only=True, mmap=True).get(_TABLE)
    return weight


class TokenTable(nn.Module):
    """A language model's token vectors (V, L) and config, without the rest of it."""

    def __init__(self, weight: Tensor, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(weight)

    @classmethod
    def of(cls, name_or_dir: str | Path, dtype: torch.dtype) -> TokenTable:
        """The token vectors of a folder's or hub name's language model, read alone.

        Raises:
            ModelError: for weights without a token table where Llama's kind has it.
        """
        for file, read in (
            ("model.safetensors", _read_safetensors),
            ("pytorch_model.bin", _read_pickled),
        ):
            index = cached_file(name_or_dir, f"{file}.index.json", **_IF_THERE)
            if index is not None:
                shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                file = shards.get(_TABLE, file)
            found = cached_file(name_or_dir, file, **_IF_THERE)
            if found is None:
                continue
            weight = read(found)
            if weight is None:
                raise ModelError(f"{name_or_dir}: no {_TABLE} in {file}")
            return cls(weight.to(dtype), AutoConfig.from_pretrained(name_or_dir))
        raise ModelError(
            f"{name_or_dir}: no model.safetensors or pytorch_model.bin with the token table"
        )

    def get_input_embeddings(self) -> nn.Module:
        """The table, as a Hugging Face model has it."""
        return self.embed_tokens


def load_base_llm(
    folder: str | Path,
    source: str | Path,
    hub: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A checkpoint's language model, with the checkpoint's ``lora`` adapter.

    The adapter is merged into the weights; beside quantized ones it stays as it is.

    Args:
        folder: the checkpoint, a folder or a hub name.
        source: where its language model lies (:func:`mico_chat.folders.llm_source`).
        hub: ``revision``, ``cache_dir``, ``token`` of the checkpoint.
        kwargs: as in Hugging Face: ``dtype``, ``device_map``, ``quantization_config``.

    Raises:
        ModelError: for an adapter that the hub does not give.
    """
    llm: Any = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    adapter = part_of(folder, LORA, **(hub or {}))
    if adapter is not None:
        from peft import PeftModel

        peft = PeftModel.from_pretrained(llm, str(adapter))
        llm = peft if "quantization_config" in kwargs else peft.merge_and_unload()
    return cast(PreTrainedModel, llm)


def _generation(folder: str | Path, hub: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's ``generation_config.json`` says, if there is one.

    Raises:
        ModelError: if it is not JSON.
    """
    file = cached_file(folder, GENERATION_CONFIG_NAME, **_IF_THERE, **hub)
    if file is None:
        return None
    try:
        said: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder}: {GENERATION_CONFIG_NAME} is not JSON: {error}") from error
    return said


def _of_the_llm(quantization: Any) -> Any:
    """A bitsandbytes config that leaves all but the language model at its precision."""
    if (
        not isinstance(quantization, BitsAndBytesConfig)
        or quantization.llm_int8_skip_modules is not None
    ):
        return quantization
    quantization = copy.deepcopy(quantization)
    quantization.llm_int8_skip_modules = ["encoder", "context", "concepts", "bridge", "lm_head"]
    return quantization


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


AutoConfig.register("mico_chat", MicoChatConfig)
AutoModel.register(MicoChatConfig, MicoChatForConditionalGeneration)

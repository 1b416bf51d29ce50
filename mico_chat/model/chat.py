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
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from mico_chat.checkpoints.folders import LLM, LORA, llm_source, part_of
from mico_chat.errors import ModelError
from mico_chat.model.config import ChatParts, MicoChatConfig, MicoEncoderConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaPath, TokenTable, generation_of
from mico_chat.model.pretraining import MicoForPretraining, gather_features
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.model.splice import splice

__all__ = [
    "MicoChatForConditionalGeneration",
    "MicoForPretraining",
    "TokenTable",
    "gather_features",
]

NO_SPLIT = ["OmniEncoder", "PerceiverBridge", "LlamaDecoderLayer"]
"""Modules that a ``device_map`` keeps on one device."""


class MicoChatForConditionalGeneration(MediaPath, PreTrainedModel):
    """MiCo-Chat: media through encoder, context and bridge into a causal language model.

    Its switches are those of :class:`~.media_path.MediaPath`. With ``keeps_step`` a batch
    without media runs the encoder on a blank picture, for other processes wait for this one there.
    """

    config_class = MicoChatConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True
    _no_split_modules = NO_SPLIT

    def __init__(self, config: MicoChatConfig) -> None:
        super().__init__(config)
        self.build(ChatParts.of(config))
        if config.base_llm is None:
            self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        PreTrainedModel.post_init(self)
        self.train()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves, and a folder holds every weight, but not every buffer."""
        init_buffers(module)

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
        model.generation = generation_of(folder, hub)
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

    def get_output_embeddings(self) -> nn.Module | None:
        """The LLM's vocabulary head."""
        return None if self.llm is None else cast(nn.Module, self.llm.get_output_embeddings())

    def embed_prompt(self, input_ids: Tensor, media: Mapping[str, Tensor]) -> Tensor:
        """Token ids (B, S) with placeholders, and media, to embeddings (B, S, L)."""
        assert isinstance(self.config, MicoChatConfig)
        context: list[Tensor] = []
        if "media_kind" in media and len(media["media_kind"]):
            context = self.context_tokens(**{k: v for k, v in media.items() if k != "media_row"})
        embeds = splice(
            self.get_input_embeddings(), input_ids, context, self.config.context_token_id
        )
        if self.keeps_step and not context:
            return embeds + self._blank().sum().to(embeds.dtype) * 0
        return embeds

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
        source: where its language model lies (:func:`mico_chat.checkpoints.folders.llm_source`).
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


AutoModel.register(MicoChatConfig, MicoChatForConditionalGeneration)
AutoProcessor.register(MicoChatConfig, MicoChatProcessor)

"""MicoChat: media and text in, the language model's words out.

Legend: B samples, M media, U units of all media (stills, frames, mel slices), S text length, L LLM
width, V vocabulary. A batch's media lie flat, sample after sample: ``media_kind`` and
``media_units`` (M,) are the kind and the unit count of each; ``pixel_values`` (U, 3, H, W) or the
stem's ``stem_features`` (U, C, G, G) hold their units in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mico_chat.errors import ModelError
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaPath, TokenTable
from mico_chat.model.splice import splice

NO_SPLIT = ["OmniEncoder", "PerceiverBridge", "LlamaDecoderLayer"]

MEDIA = ("media_kind", "media_units", "media_row", "pixel_values", "stem_features")
"""The tensors of a batch that describe its media; prompts need no ``media_row``."""


class MicoChat(MediaPath, PreTrainedModel):
    """Media through encoder, context and bridge into a causal language model."""

    config: MicoChatConfig
    config_class = MicoChatConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True
    _no_split_modules = NO_SPLIT

    def __init__(self, config: MicoChatConfig) -> None:
        super().__init__(config)
        self.build(config)
        if config.base_llm is None:
            self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        PreTrainedModel.post_init(self)
        self.train()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token loss over ``labels`` (-100: no loss), or logits (B, S, V) without labels.

        With labels the vocabulary head runs on the labelled positions only: most of its work is
        saved. ``kwargs`` has the batch's media (:data:`MEDIA`); the language model takes the
        others.
        """
        media = {name: kwargs.pop(name, None) for name in MEDIA}
        if inputs_embeds is None:
            inputs_embeds = self.embed_prompt(input_ids, media)
        llm = self._llm()
        if labels is None:
            output: CausalLMOutputWithPast = llm(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
            )
            return output
        hidden = llm.get_decoder()(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # (B, S, L)
        labelled = labels[:, 1:] != -100
        logits = llm.get_output_embeddings()(hidden[:, :-1][labelled])
        return CausalLMOutputWithPast(loss=F.cross_entropy(logits.float(), labels[:, 1:][labelled]))

    def embed_prompt(self, input_ids: Tensor | None, media: Mapping[str, Tensor | None]) -> Tensor:
        """Token ids (B, S) with placeholders, and media, to embeddings (B, S, L)."""
        if input_ids is None:
            raise ModelError("a prompt needs input_ids or inputs_embeds")
        kind, units = media.get("media_kind"), media.get("media_units")
        context: list[Tensor] = []
        if kind is not None and units is not None and len(kind) > 0:
            pixels, features = media.get("pixel_values"), media.get("stem_features")
            context = self.context_tokens(kind, units, pixels, features)
        placeholder = self.config.context_token_id
        return splice(self.get_input_embeddings(), input_ids, context, placeholder)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The LLM's ``generate`` on the spliced prompt; returns the new tokens alone."""
        embeds = self.embed_prompt(input_ids, {name: kwargs.pop(name, None) for name in MEDIA})
        return self._llm().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def attach_llm(self, llm: PreTrainedModel | TokenTable) -> None:
        """Take a language model whose weights lie elsewhere (``config.base_llm``)."""
        super().attach_llm(llm)
        self.config.llm_config = llm.config

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.llm is None else cast(nn.Module, self.llm.get_output_embeddings())

    def _init_weights(self, module: nn.Module) -> None:
        init_buffers(module)

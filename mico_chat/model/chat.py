"""MicoChat: media and text in, the language model's words out.

Legend: B samples, M media, U units of all media (stills, frames, mel slices), T tokens a unit,
D encoder width, S text length, L LLM width. A batch's media lie flat, sample after sample:
``media_kind``, ``media_units``, ``media_row`` (M,) say what each is, how many units it has and
which sample it belongs to; ``pixel_values`` (U, 3, H, W) or the stem's ``stem_features``
(U, C, G, G) hold their units in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


class MicoChat(MediaPath, PreTrainedModel):
    """Media through encoder, context and bridge into a causal language model.

    :class:`~mico_chat.checkpoints.pretrained.MicoChatForConditionalGeneration` is this model with
    a folder to read and write.
    """

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

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise their weights themselves; only buffers of timm's are filled here."""
        init_buffers(module)

    def attach_llm(self, llm: PreTrainedModel | TokenTable) -> None:
        """Takes a language model whose weights lie elsewhere (``config.base_llm``).

        Raises:
            ModelError: if its width is not the bridge's.
        """
        width, ours = llm.config.hidden_size, self.bridge.proj_out.out_features
        if width != ours:
            raise ModelError(f"the language model is {width} wide but the bridge gives {ours}")
        self.llm = llm
        self.config.llm_config = llm.config

    def get_output_embeddings(self) -> nn.Module | None:
        """The LLM's vocabulary head."""
        return None if self.llm is None else cast(nn.Module, self.llm.get_output_embeddings())

    def embed_prompt(self, input_ids: Tensor, media: Mapping[str, Tensor]) -> Tensor:
        """Token ids (B, S) with placeholders, and media, to embeddings (B, S, L)."""
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

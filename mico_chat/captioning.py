"""Captions from the pretraining model: words one after the other, over media (paper 3.4, eq. 6).

The text branch was trained to fill masks with what stands before them in sight. So each word is
asked for by a mask behind those already said, and Hugging Face's beam search does the rest.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from mico_chat.config import MicoConfig, MicoTextConfig
from mico_chat.pretraining import MicoForPretraining
from mico_chat.text_branch import TextBranch


class _NextWord(PreTrainedModel, GenerationMixin):
    """The text branch as something that tells the next word."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, branch: TextBranch, mask_token_id: int) -> None:
        super().__init__(branch.bert.config)
        self.branch = branch
        self.mask_token_id = mask_token_id

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, context: Tensor, context_mask: Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        """All words anew: a mask's neighbours have no keys that could be kept."""
        return {"input_ids": input_ids, "context": context, "context_mask": context_mask}

    def forward(
        self, input_ids: Tensor, context: Tensor, context_mask: Tensor, **kwargs: Any
    ) -> CausalLMOutput:
        """Words (B, S) over contexts (B, N, d) to logits (B, 1, V) of the next one."""
        asked = torch.cat([input_ids, torch.full_like(input_ids[:, :1], self.mask_token_id)], 1)
        pair = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
        hidden = self.branch(
            asked, torch.ones_like(asked), pair, context, context_mask, causal=True
        )
        return CausalLMOutput(logits=cast(Any, self.branch.logits(hidden[:, -1:])))


@torch.inference_mode()
def caption_ids(
    model: MicoForPretraining,
    context: Tensor,
    context_mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 40,
    num_beams: int = 3,
    length_penalty: float = 0.6,
) -> Tensor:
    """Captions of B contexts as ids (B, S), the opening [CLS] left out, padded behind [SEP].

    Args:
        model: whose text branch speaks.
        context: (B, N, d) of :meth:`MicoForPretraining.encode`, where ``context_mask`` (B, N) is
            true.
        tokenizer: of the text branch, whose [CLS] opens a caption and [SEP] ends it.
        num_beams, length_penalty: as the released model's own captions are made (appendix B).
    """
    assert isinstance(model.config, MicoConfig)
    assert isinstance(model.config.text_config, MicoTextConfig)
    words = _NextWord(model.text, model.config.text_config.mask_token_id)
    words.train(False)
    opening = torch.full((len(context), 1), tokenizer.cls_token_id, device=context.device)
    found = cast(Any, words).generate(
        opening,
        context=context,
        context_mask=context_mask,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        do_sample=False,
        use_cache=False,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cast(Tensor, found[:, 1:])


def captions(
    model: MicoForPretraining,
    context: Tensor,
    context_mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> list[str]:
    """Captions of B contexts as text; options as those of :func:`caption_ids`."""
    ids = caption_ids(model, context, context_mask, tokenizer, **options)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

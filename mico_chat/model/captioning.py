"""Captions and answers of the pretraining model: word after word, over media (paper 3.4, eq. 6).

The text branch was trained to fill masks while it sees the words before them. So each new word is
a mask after the words so far, and Hugging Face's beam search does the rest.

A question goes before the answer as a prefix (paper B.2), in the layout of the released training
code: ``[CLS] question [SEP]`` padded to a fixed length, then ``[CLS]`` and the answer. So the
answer's words have the same positions after any question. The question's tokens look at each
other; the answer's tokens look at the question and at the words before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import TextBranch, backwards

QUESTION_LENGTH = 40
ANSWER_LENGTH = 10
"""Tokens of a question, with padding and marks, and of an answer at most, as in the release."""


class _NextWord(PreTrainedModel, GenerationMixin):
    """The text branch as a model of the next word."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, branch: TextBranch, mask_token_id: int) -> None:
        super().__init__(branch.bert.config)
        self.branch = branch
        self.mask_token_id = mask_token_id

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All words anew: there are no keys to keep, because the mask changes its neighbours'."""
        return {"input_ids": input_ids, **kwargs}

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor,
        context_mask: Tensor,
        prefix_mask: Tensor,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Words (B, S) over contexts (B, N, d) to logits (B, 1, V) of the next one.

        The first tokens are a prefix where ``prefix_mask`` (B, P) is true, padding where not.
        """
        asked = torch.cat([input_ids, torch.full_like(input_ids[:, :1], self.mask_token_id)], 1)
        pair = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
        seen = backwards(prefix_mask, asked.shape[1])
        hidden = self.branch(asked, seen, pair, context, context_mask)
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
    """Captions of B contexts as ids (B, S), without the opening [CLS], padded after [SEP].

    Args:
        model: its text branch writes the captions.
        context: (B, N, d) of :meth:`MicoForPretraining.encode`, where ``context_mask`` (B, N) is
            true.
        tokenizer: of the text branch, whose [CLS] opens a caption and [SEP] ends it.
        num_beams, length_penalty: those of the released model (appendix B).
    """
    opening = torch.full((len(context), 1), tokenizer.cls_token_id, device=context.device)
    nothing = torch.ones(len(context), 0, dtype=torch.bool, device=context.device)
    options = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
    }
    return _generated(model, tokenizer, opening, context, context_mask, nothing, **options)[:, 1:]


def _generated(
    model: MicoForPretraining,
    tokenizer: PreTrainedTokenizerBase,
    opening: Tensor,
    context: Tensor,
    context_mask: Tensor,
    prefix_mask: Tensor,
    **options: Any,
) -> Tensor:
    """Openings (B, S) and the words that beam search adds to them, padded after [SEP]."""
    words = _NextWord(model.text, model.config.text_config.mask_token_id)
    words.train(False)
    found = cast(Any, words).generate(
        opening,
        context=context,
        context_mask=context_mask,
        prefix_mask=prefix_mask,
        do_sample=False,
        use_cache=False,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return cast(Tensor, found)


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


def question_prefix(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int
) -> tuple[Tensor, Tensor]:
    """B questions as ids (B, P) and their mask: [CLS] question [SEP], padded to a fixed length.

    Args:
        questions: as they were typed; marks in them are text.
        tokenizer: of the text branch.
        positions: of the text branch, question and answer together.
    """
    room = positions - ANSWER_LENGTH - 2  # [CLS] and the mask, or [SEP]
    asked = tokenizer(
        list(questions),
        padding="max_length",
        truncation=True,
        max_length=min(QUESTION_LENGTH, room),
        split_special_tokens=True,
        return_tensors="pt",
    )
    return cast(Tensor, asked["input_ids"]), cast(Tensor, asked["attention_mask"])


@torch.inference_mode()
def answers(
    model: MicoForPretraining,
    context: Tensor,
    context_mask: Tensor,
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_beams: int = 3,
) -> list[str]:
    """Answers of the text branch to B questions, one about each of B contexts.

    A question of more than 40 tokens loses its end, as in training. Arguments as those of
    :func:`caption_ids`. A model that was only pretrained has never seen a question, and continues
    it like a caption.
    """
    positions = model.config.text_config.max_position_embeddings
    prefix = question_prefix(questions, tokenizer, positions)
    ids, mask = (x.to(context.device) for x in prefix)
    opening = torch.cat([ids, torch.full_like(ids[:, :1], tokenizer.cls_token_id)], 1)
    options = {"max_new_tokens": ANSWER_LENGTH, "num_beams": num_beams}
    found = _generated(model, tokenizer, opening, context, context_mask, mask.bool(), **options)
    said = tokenizer.batch_decode(found[:, opening.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in said]

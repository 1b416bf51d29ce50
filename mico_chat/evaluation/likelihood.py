"""How likely a language model of Hugging Face finds given continuations of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mico_chat.engine.base import Prompt
from mico_chat.errors import ContextLengthError
from mico_chat.model.splice import splice

# B continuations, T tokens of the longest prompt and continuation, L LLM width, V vocabulary


@torch.inference_mode()
def log_likelihoods(
    llm: Any, pairs: Sequence[tuple[Prompt, Sequence[int]]], max_position: int
) -> list[tuple[Tensor, bool]]:
    """The log-probabilities (n,) of each continuation, and whether greedy decoding gives it.

    Raises:
        ContextLengthError: a prompt and its continuation have more than ``max_position`` tokens.
    """
    for prompt, ids in pairs:
        if len(prompt) + len(ids) > max_position:
            raise ContextLengthError(
                f"this model's maximum context length is {max_position} tokens, but the prompt "
                f"has {len(prompt)} and the continuation {len(ids)}"
            )
    table = llm.get_input_embeddings()
    prompts = [prompt.tokens(0, len(prompt)) for prompt, _ in pairs]
    rows = [
        torch.tensor([*asked, *ids]) for (asked, _), (_, ids) in zip(prompts, pairs, strict=True)
    ]
    # The padding is on the right: the attention is causal, so no token sees it.
    tokens = pad_sequence(rows, batch_first=True).to(table.weight.device)  # (B, T)
    embeds = splice(table, tokens, [block for _, context in prompts for block in context])
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    mask = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
    hidden = llm.get_decoder()(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state
    found = []
    for row, (prompt, ids) in enumerate(pairs):
        # The hidden state before a token predicts that token.
        before = hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        logits = llm.get_output_embeddings()(before).float()  # (n, V)
        target = torch.tensor(list(ids), device=logits.device)
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        found.append((logprobs.cpu(), bool((logits.argmax(-1) == target).all())))
    return found

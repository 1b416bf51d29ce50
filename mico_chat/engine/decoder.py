"""The decoder of a causal language model of Hugging Face, also of one inside a multimodal model.

The rows that it reads may be wider than its token vectors. Behind the L values of a token's vector
stand what some families add to later layers:

* Qwen3-VL adds features of the picture to the first K layers ("DeepStack"): K times L values.
* Gemma 3n gives each layer an own vector of the token: N times P values.

Text tokens have zeros there, or the vectors of their ids. So a row is all that the decoder needs of
a token, and a medium's rows can be kept (:mod:`mico_chat.adapters.capture` makes them).

Legend: R rows of a batch, Q tokens, W width of a row, S tokens attended to, A axes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mico_chat.checkpoints.pretrained import word_scores
from mico_chat.engine.scheduler import Chunk
from mico_chat.errors import ModelError
from mico_chat.model.splice import splice
from mico_chat.model.text_branch import additive_mask

ATTENTION = ("full_attention", "sliding_attention")
"""The kinds of layer whose keys and values can be kept in cells, one for each token."""

RECURRENT = ("linear_attention", "conv")
"""The kinds of layer that keep a state of a sequence, which each token changes."""

STATELESS = ("mlp", "moe")
"""The kinds of layer that keep nothing, where a model counts them as layers."""


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of a forward's argument of keys and values, which transformers 5 changed."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class Decoder:
    """Rows in, hidden states and logits out."""

    def __init__(self, llm: nn.Module) -> None:
        whole: Any = llm  # PEFT's wrapper has the LLM's attributes, but not in its type
        self.config: Any = whole.config.get_text_config()
        self.module: Any = whole.get_decoder()
        self._table: Any = whole.get_input_embeddings()
        self._whole = whole
        self.device: torch.device = self._table.weight.device
        self._cache_name = cache_argument(self.module.forward)
        vision = getattr(whole.config, "vision_config", None)
        self._n_deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        own = getattr(self.config, "hidden_size_per_layer_input", 0)  # Gemma 4 may have none
        self._by_layer = bool(own) and hasattr(self.module, "get_per_layer_inputs")
        listed = getattr(self.config, "layer_types", None) or ()
        kinds = set(listed)
        self._unknown = sorted(kinds.difference(ATTENTION, RECURRENT, STATELESS))
        states = [kind in RECURRENT for kind in listed]
        self.has_states = any(states)
        self.recurrent = states if self.has_states else [False] * self.config.num_hidden_layers
        """Whether each layer keeps a state instead of keys and values."""
        slides = not kinds or "sliding_attention" in kinds
        self._window: int | None = getattr(self.config, "sliding_window", None) if slides else None
        self._by_kind = bool(kinds)  # else all layers of a model with a window have it

    @property
    def logits_device(self) -> torch.device:
        device: torch.device = self._whole.get_output_embeddings().weight.device
        return device

    def check_layers(self) -> None:
        """Refuse layers that keep something else than the keys and values of each token, and
        attention that reads distances from the mask instead of positions (ALiBi)."""
        if self._unknown:
            raise ModelError(f"its layers of {', '.join(self._unknown)} cannot be batched")
        given = inspect.signature(self.module.forward).parameters
        if "position_ids" not in given or vars(self.config).get("alibi"):
            raise ModelError(
                f"{self.config.model_type}: it takes no positions, and cannot be batched"
            )

    def rows(self, ids: Tensor) -> Tensor:
        """The rows (..., W) of text tokens."""
        given = {"inputs_embeds": self._table(ids)}
        if self._by_layer:
            given["per_layer_inputs"] = self.module.get_per_layer_inputs(ids)
        return self.joined(given)

    def embedded(self, chunks: Sequence[Chunk]) -> Tensor:
        """Rows (R, Q, W) of chunks, padded on the right with token 0."""
        longest = max(chunk.length for chunk in chunks)
        ids = torch.tensor([[*chunk.ids, *[0] * (longest - chunk.length)] for chunk in chunks])
        context = [tokens for chunk in chunks for tokens in chunk.context]
        # The ids stay on the CPU, where counting placeholders waits for no GPU.
        return splice(lambda ids: self.rows(ids.to(self.device)), ids, context)

    def joined(self, given: dict[str, Any]) -> Tensor:
        """The rows (R, Q, W) that a call of the decoder was ``given`` in its arguments."""
        vectors: Tensor = given["inputs_embeds"]
        if self._n_deep:
            deep = vectors.new_zeros(*vectors.shape[:-1], self._n_deep, vectors.shape[-1])
            features = given.get("deepstack_visual_embeds")
            if features is not None:
                deep[given["visual_pos_masks"]] = torch.stack(list(features), 1).to(deep.dtype)
            return torch.cat([vectors, deep.flatten(-2)], -1)
        if self._by_layer:
            own = given["per_layer_inputs"].flatten(-2)
            return torch.cat([vectors, own.to(vectors.dtype)], -1)
        return vectors

    def hidden(self, rows: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Hidden states (R, Q, L) of rows (R, Q, W) at ``positions`` (R, Q) or (A, R, Q).

        ``mask`` (R, Q, S) is true where a token attends.
        """
        width = self._table.weight.shape[1]
        vectors, more = rows[..., :width], rows[..., width:]
        given: dict[str, Any] = {}
        if self._n_deep and bool(more.any()):
            features = more.unflatten(-1, (self._n_deep, width)).flatten(0, 1)
            given["visual_pos_masks"] = torch.ones(rows.shape[:2], dtype=torch.bool)
            given["deepstack_visual_embeds"] = list(features.unbind(1))
        if self._by_layer:
            given["per_layer_inputs"] = more.unflatten(-1, (self.config.num_hidden_layers, -1))
        output = self.module(
            inputs_embeds=vectors,
            attention_mask=self._masks(mask, vectors.dtype),
            position_ids=positions,
            use_cache=True,
            **{self._cache_name: cache},
            **given,
        )
        found: Tensor = output.last_hidden_state
        return found

    def _masks(self, mask: Tensor, dtype: torch.dtype) -> Any:
        full = additive_mask(mask[:, None], dtype)
        # The rows of a forward with states are equally long, and none is padded.
        others = dict.fromkeys((*RECURRENT, *STATELESS)) if self.has_states else {}
        if self._window is None:
            return {"full_attention": full, **others} if others else full
        # A token's key is at its place; the last key that a token attends to is its own.
        keys = torch.arange(mask.shape[-1], device=mask.device)
        near = keys > mask.sum(-1, keepdim=True) - 1 - self._window
        sliding = additive_mask((mask & near)[:, None], dtype)
        by_kind = {"full_attention": full, "sliding_attention": sliding, **others}
        return by_kind if self._by_kind else sliding

    def logits(self, hidden: Tensor) -> Tensor:
        return word_scores(self._whole, hidden)


def positions_of(chunks: Sequence[Chunk], places: Tensor) -> Tensor:
    """Positions (R, Q), or (A, R, Q) if a chunk has its own; padding repeats the last one."""
    own = [chunk.positions for chunk in chunks]
    axes = {len(positions) for positions in own if positions is not None}
    if not axes:
        return places
    found = places.expand(max(axes), -1, -1).clone()
    for row, positions in enumerate(own):
        if positions is not None:
            n = positions.shape[1]
            found[:, row, :n] = positions.to(places.device)
            found[:, row, n:] = positions[:, -1:].to(places.device)
    return found

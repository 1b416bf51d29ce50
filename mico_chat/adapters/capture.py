"""The rows that a multimodal model of Hugging Face gives to its decoder, in place of its answer.

Each family merges media into its prompt in its own way. All of them end in one call of the
language model's decoder. So the model's own forward runs up to this call, whose arguments are the
rows of all tokens, and their positions.
"""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mico_chat.engine.decoder import Decoder
from mico_chat.errors import ModelError

KNOWN = {"inputs_embeds", "attention_mask", "position_ids", "cache_position"}
KNOWN |= {"visual_pos_masks", "per_layer_inputs"}
"""Tensors that a decoder is given and that rows and positions hold, or that the engine makes."""


def moved(inputs: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model's inputs, tensors in dictionaries and lists, on its device; numbers in its dtype."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, dtype if inputs.is_floating_point() else None)
    if isinstance(inputs, Mapping):
        return {name: moved(value, device, dtype) for name, value in inputs.items()}
    return [moved(one, device, dtype) for one in inputs] if isinstance(inputs, list) else inputs


class _CapturedError(Exception):
    """The decoder was called; ``given`` are its arguments."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__("the decoder was called")
        self.given = given


class Capture:
    """Runs a model up to its decoder. Other threads may call the decoder at the same time."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._decoder = Decoder(model)
        self._here = threading.local()
        self._decoder.module.register_forward_pre_hook(self._stop, with_kwargs=True)

    def _stop(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if getattr(self._here, "running", False):
            raise _CapturedError(given)

    def rows(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Rows (R, Q, W) of a batch, and positions (A, R, Q) if the model has several axes."""
        given = self._given(inputs)
        positions = given.get("position_ids")
        if positions is not None and positions.ndim < 3:
            positions = None
        return self._decoder.joined(given), positions

    def why_not(self, inputs: Mapping[str, Tensor]) -> str | None:
        """Why rows and positions are not all that the decoder needs; None if they are."""
        given = self._given(inputs)
        masks = given.get("attention_mask")
        for mask in masks.values() if isinstance(masks, dict) else (masks,):
            if isinstance(mask, Tensor) and mask.ndim > 2:
                seen = mask if mask.dtype == torch.bool else mask == 0
                if bool(seen.triu(1).any()):
                    return "tokens of a medium attend to later ones"
        more = {name for name, value in given.items() if isinstance(value, Tensor)} - KNOWN
        return f"its decoder takes {', '.join(sorted(more))}" if more else None

    def _given(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments of the decoder's call."""
        own = moved(inputs, self._decoder.device, self._model.dtype)
        self._here.running = True
        try:
            with torch.inference_mode():
                self._model(**own, use_cache=False)
        except _CapturedError as captured:
            return captured.given
        finally:
            self._here.running = False
        raise ModelError("the model answers without a call of its decoder")

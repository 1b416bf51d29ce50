"""Which modules train, evaluate, or compute their activations again in the backward pass.

A frozen module stays in evaluation mode (a frozen batch norm must not move), with two exceptions,
both of the flag ``training`` alone and not of anything below the module:

* a layer that computes its activations again does so in training mode only;
* bitsandbytes' 4-bit layer, in evaluation mode on a CPU, repacks its weights for inference at the
  first input without a gradient (a batch of text alone), and gives no gradient from then on.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mico_chat.model.encoder import OmniEncoder


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters, all of them frozen."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    return [module for child in model.children() for module in frozen_modules(child)]


class Modes:
    """The modes of a model's modules, told once what trains, set before every step."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = frozen_modules(model)
        self._exceptions = [m for m in model.modules() if _checkpoints(m) or _is_4bit(m)]

    def set(self) -> None:
        """To be called after ``model.train()``."""
        for module in self._frozen:
            module.eval()
        for module in self._exceptions:
            module.training = True


def checkpoint_activations(model: nn.Module) -> None:
    """Transformer layers keep their input alone, and run again in the backward pass.

    That is, the layers of the language model and of the text branch, and the encoder's blocks where
    the encoder trains. Without reentrance: the inputs of a frozen layer carry the gradient to the
    bridge, and those of a batch of text alone carry none.
    """
    again: Any = partial(checkpoint, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            cast(Any, module)._gradient_checkpointing_func = again
        elif isinstance(module, OmniEncoder) and _trains(module.vit):
            cast(Any, module.vit).set_grad_checkpointing(True)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _checkpoints(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


def _is_4bit(module: nn.Module) -> bool:
    # By name: bitsandbytes need not be installed.
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith(
        "bitsandbytes"
    )

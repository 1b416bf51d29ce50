"""Training mode, evaluation mode, and recomputed activations of a model's modules.

A frozen module stays in evaluation mode: a frozen batch norm must not move. Two sorts of modules
get the flag ``training`` all the same, without the modules below them:

* a layer that recomputes its activations, which it does in training mode only;
* bitsandbytes' 4-bit layer: in evaluation mode on a CPU, at the first input without a gradient (a
  batch of text alone), it repacks its weights for inference and gives no gradient from then on.
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
    """Sets the modes of a model's modules; built once it is known what trains."""

    def __init__(self, model: nn.Module) -> None:
        self._frozen = frozen_modules(model)
        self._exceptions = [m for m in model.modules() if _checkpoints(m) or _is_4bit(m)]

    def set(self) -> None:
        """Set the modes before a step, after ``model.train()``."""
        for module in self._frozen:
            module.eval()
        for module in self._exceptions:
            module.training = True


def checkpoint_activations(model: nn.Module) -> None:
    """Let transformer layers keep only their input, and run again in the backward pass.

    These are the layers of language model and text branch, and the encoder's blocks if the encoder
    trains. Not reentrant: the inputs of a frozen layer carry the bridge's gradient, and in a batch
    of text alone they carry none.
    """
    again: Any = partial(checkpoint, use_reentrant=False)
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            cast(Any, module)._gradient_checkpointing_func = again
        elif isinstance(module, OmniEncoder) and trains(module.vit):
            cast(Any, module.vit).set_grad_checkpointing(True)


def trains(*modules: nn.Module) -> bool:
    return any(p.requires_grad for module in modules for p in module.parameters())


def _checkpoints(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


def _is_4bit(module: nn.Module) -> bool:
    # By name: bitsandbytes need not be installed.
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith(
        "bitsandbytes"
    )

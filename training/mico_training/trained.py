"""Which weights of a model train, the modes of its modules, and the record of its data.

A frozen module stays in evaluation mode: a frozen batch norm must not move. Two sorts of modules
get the flag ``training`` all the same, without the modules below them:

* a layer that recomputes its activations, which it does in training mode only;
* bitsandbytes' 4-bit layer: in evaluation mode on a CPU, at the first input without a gradient (a
  batch of text alone), it repacks its weights for inference and gives no gradient from then on.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mico_chat.errors import ConfigError
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.encoder import OmniEncoder
from mico_training.recipe import Recipe, TrainRecipe


def record_data(config: MicoConfig | MicoChatConfig, recipe: Recipe, stage: str, new: bool) -> None:
    """Add a stage's data to the record of a model, which its checkpoints keep.

    ``new`` weights begin a record, with what they start from; a folder without one is unknown.
    """
    given = [recipe.model.encoder_weights, recipe.model.text_weights]
    before = list(config.trained_on or [])
    if not new and (not before or recipe.model.encoder is not None):
        before.insert(0, {"stage": recipe.model.name, "data": None})
    elif not before and recipe.model.encoder is not None:
        before = [{"stage": str(recipe.model.encoder), "data": None}]
    elif any(given):
        before = [{"stage": "start", "data": [one for one in given if one]}]
    config.trained_on = [*before, {"stage": stage, "data": [source.path for source in recipe.data]}]


def freeze(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze the parameters below the prefixes; a ConfigError if a prefix has none."""
    _set_trained(model, prefixes, "freeze", False)


def train_only(model: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze all but the parameters below the prefixes; a ConfigError if a prefix has none."""
    model.requires_grad_(False)
    _set_trained(model, prefixes, "trainable", True)


def _set_trained(model: nn.Module, prefixes: Iterable[str], key: str, trains: bool) -> None:
    for prefix in prefixes:
        found = [parameter for name, parameter in model.named_parameters() if _below(name, prefix)]
        for parameter in found:
            parameter.requires_grad_(trains)
        if not found:
            tops = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"{key}: no parameter is below {prefix!r}; the parts are {tops}")


def _below(name: str, prefix: str) -> bool:
    """Whether a parameter's name is a prefix or lies below it; the wrappers of DDP and of set
    prediction are ignored."""
    name = name.removeprefix("module.").removeprefix("chat.")
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def parameter_groups(model: nn.Module, train: TrainRecipe) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and learning rate; a ConfigError if none trains."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    unused = set(train.lr_multipliers)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matching = [prefix for prefix in train.lr_multipliers if _below(name, prefix)]
        prefix = max(matching, key=len, default="")
        unused -= set(matching)
        plain = parameter.ndim < 2 or id(parameter) in embeddings or "embed" in name.split(".")[-1]
        decay = 0.0 if plain else train.weight_decay
        lr = train.lr * train.lr_multipliers.get(prefix, 1.0)
        groups.setdefault((decay, lr), []).append(parameter)
    if unused:
        raise ConfigError(
            f"train.lr_multipliers: no trained parameter is below {', '.join(sorted(unused))}"
        )
    if not groups:
        raise ConfigError("every parameter is frozen, so nothing would be trained")
    return [
        {"params": parameters, "weight_decay": decay, "lr": lr}
        for (decay, lr), parameters in groups.items()
    ]


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, and persistent buffers outside frozen modules, by name."""
    state: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {id(inner) for module in frozen_modules(model) for inner in module.modules()}
    for path, module in model.named_modules():
        if id(module) in frozen:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}" if path else name] = buffer
    return state


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
        self._exceptions = [
            module
            for module in model.modules()
            if (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing)
            or _is_4bit(module)
        ]

    def set(self) -> None:
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


def _is_4bit(module: nn.Module) -> bool:
    # By name: bitsandbytes need not be installed.
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith(
        "bitsandbytes"
    )

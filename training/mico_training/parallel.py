"""How several processes share a model, as ``train.parallel`` says.

``ddp``    every process holds the whole model, and gradients are averaged.
``fsdp``   every parameter is split over the processes. A transformer layer is whole only while it
           runs, the rest during a step (PyTorch's FSDP2).
``hsdp``   the same within groups of ``train.shard_over`` processes. Each group has a copy, and
           gradients are averaged over the copies: weights travel within a machine alone.
``zero2``  gradients and optimizer states are split (DeepSpeed).
``zero3``  parameters too (DeepSpeed).

accelerate splits models on GPUs alone, and names no reason where it leaves one whole. So
:func:`split` does it here, on CPUs and GPUs by the same lines: only the mesh's device type, and
with it the backend (gloo or NCCL), differs. :func:`check_parallel` refuses a run whose ``parallel``
did not take.

A process holds a piece of a split parameter. :func:`whole` and :func:`assign` read and write the
whole parameter; all processes must call them, in the same order.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.model.encoder import OmniEncoder
from mico_training.recipe import TrainRecipe

SINGLE = "single_numbers"
"""This attribute holds the names of the parameters that :func:`give_a_dimension` changed."""

DEEPSPEED = "ds_status"
"""DeepSpeed's stage 3 marks a parameter that it splits with this: whether it is whole now."""

BUCKET = 50_000_000
"""DeepSpeed sends so many numbers at once; its default of 500 million is much on a small card."""


def parallel_arguments(train: TrainRecipe) -> dict[str, Any]:
    """A recipe's ``parallel`` as fields of ``TrainingArguments``; an error if it cannot be had."""
    if train.parallel == "ddp":
        return {"ddp_find_unused_parameters": True}  # a batch may lack a modality
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            f"train.parallel {train.parallel} needs several processes, but there is only "
            "one; start the command with torchrun --nproc-per-node N, or leave out "
            "train.parallel"
        )
    if train.is_split:
        return {}  # see split
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError(f"train.parallel {train.parallel}", "deepspeed")
    config = {
        "zero_optimization": {
            "stage": int(train.parallel[-1]),
            # Only a GPU has streams that can overlap.
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
        },
        "bf16": {"enabled": "auto"},  # the Trainer fills in each "auto"
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"deepspeed": config}


def give_a_dimension(model: nn.Module) -> None:
    """Make single numbers vectors of length 1, until :func:`put_together`.

    FSDP splits no single numbers, and DeepSpeed 0.19 sends views of a parameter's bytes, which a
    single number lacks.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 0:
                parameter.data = parameter.data.view(1)
                module.__dict__.setdefault(SINGLE, set()).add(name)


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are split one by one.

    These are the encoder's blocks and the layers of language model and text branch: every process
    runs them once for each batch. The bridge runs once for each kind of media in a batch, and two
    processes may have different numbers of kinds, so it is split with the rest of the model.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            found.append(module)
        elif isinstance(module, OmniEncoder):
            found += cast(Any, module.vit).blocks
    return found


def mesh_of(train: TrainRecipe, ranks: int) -> tuple[int, ...]:
    """The processes as ``hsdp``'s copies and the processes that hold one, or in one row.

    A ConfigError if the processes do not make whole copies.
    """
    if train.parallel != "hsdp":
        return (ranks,)
    # A dry run is no process of a machine: it takes machines of 8.
    each = train.shard_over or int(os.environ.get("LOCAL_WORLD_SIZE", min(8, ranks)))
    if each < 2 or ranks % each:
        raise ConfigError(
            f"train.parallel hsdp: {ranks} processes are no whole number of copies over {each} "
            "processes each; set train.shard_over to a divisor of the processes above 1"
        )
    return (ranks // each, each) if ranks > each else (ranks,)


def split(model: nn.Module, device_type: str, train: TrainRecipe) -> None:
    """Split a model over the processes, in place, and move it to their devices.

    With ``train.bf16`` the layers' weights travel and compute in bfloat16. The rest keeps its
    precision under autocast: temperature and boxes need the digits.
    """
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        raise ConfigError(
            f"train.parallel {train.parallel} cannot split model.llm_quantization int8, whose "
            "scales lie beside the weights: use nf4, or leave out train.parallel"
        )
    shape = mesh_of(train, dist.get_world_size())
    names = ("copies", "pieces")[-len(shape) :]
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    half = half if train.bf16 else MixedPrecisionPolicy()
    for layer in layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=half)
    fully_shard(model, mesh=mesh)


def fetch_by_layer(engine: Any) -> None:
    """Have DeepSpeed's stage 3 put layers together one by one, and all other weights once a step.

    It would do so for each module that runs. Processes with other media run other modules, and
    would wait for each other's.
    """
    from deepspeed.utils import set_z3_leaf_module

    offload, model = engine.optimizer.parameter_offload, engine.module
    offload._remove_module_hooks()
    start = offload.get_param_coordinator().reset_step
    # Before the hooks of keep_step, which may run the encoder.
    offload.fwd_pre_hook = model.register_forward_pre_hook(lambda *_: start(), prepend=True)
    for number, layer in enumerate(layers(model)):
        set_z3_leaf_module(layer, True)
        offload._register_deepspeed_module(layer, count=[number])
    rest: list[Any] = [owner.get_parameter(name) for owner, name in outside_layers(model)]
    for parameter in rest:
        parameter.ds_persist = True
    engine.optimizer.persistent_parameters = rest  # gathered again after each update
    rest[0].all_gather(rest)
    clean_up = engine.optimizer._overflow_clean_up

    def leave_out(*arguments: Any) -> None:  # DeepSpeed gathers after an update alone
        clean_up(*arguments)
        rest[0].all_gather(rest)

    engine.optimizer._overflow_clean_up = leave_out


def load_deepspeed(engine: Any, checkpoint: Path) -> None:
    """Read DeepSpeed's own files; a ConfigError if they are of another number of processes."""
    before, now = len(list(checkpoint.glob("*/*_optim_states.pt"))), dist.get_world_size()
    if before != now:
        raise ConfigError(
            f"{checkpoint} has DeepSpeed's files of {before} processes, but now there are {now}: "
            f"start {before}; only ddp and fsdp go on with another number"
        )
    engine.load_checkpoint(str(checkpoint), load_module_strict=False)


def share_split(model: nn.Module) -> float:
    """The share of a model's numbers, trained and frozen, of which a process holds a piece."""
    sizes = [(p.numel(), _is_split(p)) for p in model.parameters()]
    return sum(size for size, is_split in sizes if is_split) / sum(size for size, _ in sizes)


def _is_split(parameter: Tensor) -> bool:
    return (
        isinstance(parameter, DTensor)
        and parameter.device_mesh.size(-1) > 1
        and parameter.placements[-1].is_shard()  # before it, the copies
    )


def check_parallel(wrapped: nn.Module, train: TrainRecipe) -> None:
    """A ConfigError if a model that is ready to train is not shared as the recipe says."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    stage = {"zero2": 2, "zero3": 3}.get(train.parallel)
    if train.is_split:
        share = share_split(wrapped)
        took, found = share > 0.9, f"{share:.0%} of the model's numbers are split"
    elif stage is not None:
        of_engine: Callable[[], int] | None = getattr(wrapped, "zero_optimization_stage", None)
        found = "DeepSpeed does not hold the model"
        if of_engine is not None:
            found = f"DeepSpeed runs at stage {of_engine()}"
        took = of_engine is not None and of_engine() == stage
    else:
        took = ranks == 1 or isinstance(wrapped, DistributedDataParallel)
        found = f"the model is a plain {type(wrapped).__name__}, whose gradients nobody averages"
    if not took:
        raise ConfigError(
            f"train.parallel {train.parallel} did not take: {found} over {ranks} processes; this "
            "is an error of the program, please report it with the versions of torch, accelerate "
            "and transformers"
        )


def outside_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The parameters outside :func:`layers`, as modules and names, in one order everywhere."""
    inside = {id(p) for layer in layers(model) for p in layer.parameters()}
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if id(parameter) not in inside
    ]


def keep_step(model: nn.Module, bf16: bool = False) -> None:
    """Have every batch run the encoder, and give a gradient to each trained weight outside layers.

    Processes that share a model wait for each other at both, whatever media a batch has. The
    gradients come in one order: DeepSpeed sends them as they come. One process does the same:
    AdamW moves a weight whose gradient is zero by its momentum, and leaves one without a gradient,
    so that a step without sounds would tell them apart. ``bf16``: whether the model runs under
    autocast.
    """
    rest = outside_layers(model)
    nothing: list[Tensor] = []

    def use_all(module: nn.Module, args: Any) -> None:
        # The first use of a weight in a forward pass is the last in the backward pass.
        weights = (owner._parameters[name] for owner, name in rest)
        uses = [w.sum() * 0 for w in weights if w is not None and w.requires_grad]
        nothing[:] = [sum(uses, start=torch.zeros((), device=uses[0].device))] if uses else []

    def add_nothing(module: nn.Module, args: Any, outputs: Any) -> None:
        if nothing and outputs.get("loss") is not None:
            outputs["loss"] = outputs["loss"] + nothing.pop()

    for module in model.modules():
        if isinstance(module, MicoChatForConditionalGeneration):
            blank = partial(_show_blank_picture, bf16)
            module.register_forward_pre_hook(blank, with_kwargs=True)
    model.register_forward_pre_hook(use_all, prepend=True)
    model.register_forward_hook(add_nothing)


def _show_blank_picture(
    bf16: bool, chat: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A batch of text alone runs the encoder on a blank picture, which changes nothing."""
    assert isinstance(chat, MicoChatForConditionalGeneration)
    kind: Tensor | None = kwargs.get("media_kind")
    if kwargs.get("input_ids") is None or (kind is not None and len(kind) > 0):
        return args, kwargs
    one = torch.ones(1, dtype=torch.long, device=chat.device)
    side = chat.config.encoder_config.image_size
    pixels = torch.zeros(1, 3, side, side, device=chat.device)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        see = kwargs.get("see") or chat.context_tokens
        blank = see(one - 1, one, pixel_values=pixels)[0]
        embeds = chat.embed_prompt(kwargs["input_ids"], {})
    embeds = embeds + blank.sum().to(embeds.dtype) * 0
    return args, kwargs | {"input_ids": None, "inputs_embeds": embeds}


def whole(parameter: Tensor) -> Tensor:
    """A whole parameter, detached; it may share memory with the parameter."""
    if isinstance(parameter, DTensor):
        return cast(Tensor, cast(Any, parameter.detach()).full_tensor())
    status = getattr(parameter, DEEPSPEED, None)
    if status is not None and status.name == "NOT_AVAILABLE":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def local(value: Tensor) -> Tensor:
    """The piece of a tensor that this process holds."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else getattr(value, "ds_tensor", value)


def piece(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, split as the parameter ``like``, if that is split; each takes its piece."""
    value = value.view(like.shape)  # a single number may be a vector in another run
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    pieces = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return pieces.clone()  # not a view, which would hold the whole value


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to a whole value; each process takes its piece."""
    parameter.copy_(piece(value.to(parameter.dtype), parameter))


def put_together(model: nn.Module, wanted: Callable[[str, nn.Parameter], bool], here: bool) -> None:
    """Make the ``wanted`` parameters of a trained model whole, on the CPU.

    Only the process with ``here`` gets them; the others keep their pieces.
    """
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            single = name in module.__dict__.get(SINGLE, ())
            split_here = isinstance(parameter, DTensor) or hasattr(parameter, DEEPSPEED)
            if (split_here or single) and wanted(f"{path}.{name}" if path else name, parameter):
                value = whole(parameter).cpu()
                value = value.view(()) if single else value
                if here:
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state with whole tensors, on the CPU: the same whatever the processes share.

    All processes call this.
    """
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {
        number: {
            name: whole(value).cpu() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return state


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Set an optimizer's state from whole tensors, of any number of processes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        like = parameters[number]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.numel() == like.numel() and name != "step":
                values[name] = piece(value, like)
    optimizer.load_state_dict(state)

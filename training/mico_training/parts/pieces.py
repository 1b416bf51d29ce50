"""Checkpoints in pieces: each process writes what it holds, by PyTorch's distributed checkpoints.

No process gathers the model. A run goes on from the pieces with any number of processes, whatever
these share: each reads what it will hold.
"""

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from mico_chat.errors import ConfigError
from mico_training.trained import trainable_state

PIECES = "pieces"
"""The folder within a checkpoint."""

# A single process is what it is told about, on another thread too.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")


def is_in_pieces(checkpoint: Path) -> bool:
    return (checkpoint / PIECES).is_dir()


def is_whole(checkpoint: Path) -> bool:
    """Whether all processes have written their pieces: the last file says so."""
    return not is_in_pieces(checkpoint) or (checkpoint / PIECES / ".metadata").is_file()


def weights_of(model: nn.Module) -> dict[str, Any]:
    """What trains, by name, in the memory of the model itself."""
    return {f"model.{name}": _vector(value) for name, value in trainable_state(model).items()}


def states_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The optimizer's states by the names of what trains, in its own memory."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}.{key}": _vector(value)
        for parameter, own in optimizer.state.items()
        for key, value in own.items()
    }


def _vector(value: Any) -> Any:
    """A single number is a vector of one where a model is split, so it is one in every file."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().view(1) if value.ndim == 0 else value.detach()


class Writer:
    """Writes checkpoints in pieces; with ``waits`` false from a copy, while training goes on."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits
        self._group: Any = None
        self._writing: Future[Any] | None = None

    def write(self, checkpoint: Path, model: nn.Module, optimizer: Any) -> None:
        """All processes call this. An error of writing comes here, or from :meth:`finish`."""
        state = weights_of(model) | states_of(model, optimizer)
        alone = not dist.is_initialized()
        (checkpoint / PIECES).mkdir(parents=True, exist_ok=True)  # it is incomplete from now on
        if self.waits:
            save(state, checkpoint_id=checkpoint / PIECES, no_dist=alone)
            return
        if self._group is None and not alone:  # messages of training do not mix with these
            self._group = dist.new_group(backend="gloo")
        where: Any = {"checkpoint_id": checkpoint / PIECES, "no_dist": alone}
        found = async_save(state, process_group=self._group, **where)
        self._writing = found if isinstance(found, Future) else found.upload_completion

    def finish(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def read_weights(checkpoint: Path, model: nn.Module) -> None:
    """Set what trains; a ConfigError if the checkpoint was made by another recipe."""
    state = weights_of(model)
    known = FileSystemReader(checkpoint / PIECES).read_metadata().state_dict_metadata
    check_names(
        checkpoint, {n[6:] for n in known if n.startswith("model.")}, {n[6:] for n in state}
    )
    load(state, checkpoint_id=checkpoint / PIECES, no_dist=not dist.is_initialized())


def read_states(checkpoint: Path, model: nn.Module, optimizer: Any) -> None:
    """Set an optimizer's states."""
    get_optimizer_state_dict(model, optimizer)  # a new optimizer gets its states by this
    state = states_of(model, optimizer)
    load(state, checkpoint_id=checkpoint / PIECES, no_dist=not dist.is_initialized())
    names = dict(model.named_parameters())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            path, _, key = name.removeprefix("optimizer.").rpartition(".")
            optimizer.state[names[path]][key] = value


def check_names(checkpoint: Path, before: set[str], now: set[str]) -> None:
    """A ConfigError if a checkpoint has other parameters than those that train."""
    differing = sorted(before ^ now)
    if differing:
        raise ConfigError(
            f"{checkpoint} was made by another recipe: {differing[0]} and {len(differing) - 1} "
            "more parameters are trained in only one of the two; choose another output"
        )

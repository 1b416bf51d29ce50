"""Which tensors are alive during a step that is only rehearsed, what for, and how much it computes.

Under torch's fake tensors a step runs with shapes alone: no memory is taken and nothing is
computed, yet autograd keeps and frees exactly what it would. This mode writes down when each
storage begins and ends; afterwards, when it is known what became a gradient and what was kept for
the backward pass, the peak is found and told apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

WORKING = "working memory"


class LiveMemory(TorchDispatchMode):
    """Records the storages of all tensors made while it is on, and counts the products' FLOPs."""

    def __init__(self) -> None:
        cast(Any, super()).__init__()
        self.flops = 0  # of the products so far, as torch counts them: two a multiplication
        self._keys: dict[int, int] = {}  # id of a living storage -> its number
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._bytes: dict[int, int] = {}
        self._uses: dict[int, str] = {}
        self._events: list[tuple[int, bool]] = []  # (number, begins)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def name(self, use: str, tensors: Iterable[Tensor]) -> None:
        """Say what tensors are for; those made before the mode was on are seen here first."""
        for tensor in tensors:
            number = self._see(tensor)
            if number is not None:
                self._uses[number] = use

    def alive(self) -> set[int]:
        """Numbers of the storages that are alive now."""
        return set(self._keys.values())

    def size(self, numbers: Iterable[int]) -> int:
        """Bytes of storages."""
        return sum(self._bytes[number] for number in numbers)

    def name_unnamed(self, use: str, numbers: Iterable[int]) -> None:
        """Say what storages are for that have no name yet."""
        for number in numbers:
            self._uses.setdefault(number, use)

    def forget_the_past(self) -> None:
        """The peak is looked for from here on."""
        self._events = [(number, True) for number in self._keys.values()]

    def peak(self) -> dict[str, int]:
        """Bytes by use at the moment when most are alive."""
        now = most = 0
        at = 0
        for index, (number, begins) in enumerate(self._events):
            now += self._bytes[number] if begins else -self._bytes[number]
            if now > most:
                most, at = now, index
        found: dict[str, int] = {}
        living = set()
        for number, begins in self._events[: at + 1]:
            if begins:
                living.add(number)
            else:
                living.discard(number)
        for number in living:
            use = self._uses.get(number, WORKING)
            found[use] = found.get(use, 0) + self._bytes[number]
        return found

    def _see(self, tensor: Tensor) -> int | None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if not size:
            return None
        known = self._keys.get(id(storage))
        if known is not None:
            return known
        number = len(self._bytes)
        self._keys[id(storage)] = number
        self._bytes[number] = size
        self._events.append((number, True))
        self._refs[id(storage)] = weakref.ref(storage, partial(self._end, id(storage)))
        return number

    def _end(self, key: int, ref: object) -> None:
        number = self._keys.pop(key)
        self._refs.pop(key)
        self._events.append((number, False))


def fake_weights(module: torch.nn.Module) -> None:
    """Give a module from the meta device fake weights on the CPU; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for inner in module.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(value, parameter.requires_grad)
            inner._parameters[name] = made[id(parameter)]
        for name, buffer in inner.named_buffers(recurse=False):
            inner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")

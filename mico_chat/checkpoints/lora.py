"""LoRA adapters in PEFT's form: small matrices beside the layers of a model, many on one model.

An adapter adds ``B A x`` to what a linear layer makes of ``x`` (arXiv 2106.09685, section 4.1). In
torch a hook of the layer adds it to the rows of the requests that wear the adapter: one forward
computes requests of several adapters, and no layer is replaced.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from mico_chat.errors import MissingLoraError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Parts: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Matrices A (r, inputs) and B (outputs, r), which is scaled, by the path of their layer."""

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?!.*\.experts\.)(.+)\.lora_([AB])\.weight")
_OTHERS = ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "use_dora")


@dataclass(eq=False)
class Lora:
    """An adapter of the model ``base``, under a name of its own; see :func:`read_lora`.

    ``key`` is a new one whenever a folder is read: prompts of different adapters share nothing.
    ``less`` is the adapter that the base has merged and this one stands in for. ``in_media``: it
    changes how media are encoded, too; ``encoder`` is the folder of the model that encodes them.
    """

    name: str
    folder: Path
    base: str
    config: Mapping[str, Any]
    less: Path | None = None
    encoder: Path | None = None
    in_media: bool = False
    bytes: int = 0
    users: int = 0
    key: int = field(default_factory=count(1).__next__)

    def parts(self) -> Parts:
        """Its matrices; a :class:`ModelError` if the file is broken or holds other tensors."""
        found = _parts(self.folder, self.config)
        for path, (down, up) in _parts(self.less).items() if self.less else ():
            mine, out = found.get(path, (down[:0], up[:, :0]))
            found[path] = torch.cat([mine, down]), torch.cat([out, -up], 1)
        return found

    def misfit(self, why: str) -> ModelError:
        made_for = self.config.get("base_model_name_or_path") or "another model"
        return ModelError(f"adapter {self.name} ({self.folder}, made for {made_for}): {why}")


def read_lora(
    name: str, folder: Path, base: str, names: Sequence[str] = (), merged: Path | None = None
) -> Lora:
    """The adapter in a folder, for the model ``base``, which has the ``names`` if some are given.

    The last one is that of the model without its ``merged`` adapter: an adapter of that model
    stands in for the merged one.

    Raises:
        MissingLoraError: there is none.
        ModelError: it is no LoRA of linear layers alone, or is made for another model.
    """
    lora = Lora(name, folder, base, config := _config(folder))
    if other := [key for key in _OTHERS if config.get(key)]:
        raise lora.misfit(f"it has {other[0]}, which is not served beside other adapters; merge it")
    if not (folder / WEIGHTS).is_file():
        raise MissingLoraError(f"No adapter found for {folder}: it lacks {WEIGHTS}")
    lora.bytes = (folder / WEIGHTS).stat().st_size
    made_for = _plain(config.get("base_model_name_or_path") or base)
    own = [_plain(one) for one in names]
    if own and not any(made_for.startswith(one) or one.startswith(made_for) for one in own):
        known = f"served is {base}; if that is the same, write its name into {CONFIG} as"
        raise lora.misfit(f"{known} base_model_name_or_path")
    lora.less = merged if made_for in own[-1:] else None
    return lora


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / CONFIG).read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MissingLoraError(f"No adapter found for {folder}: {CONFIG}: {error}") from error


def _parts(folder: Path, config: Mapping[str, Any] | None = None) -> Parts:
    config, halves = config or _config(folder), dict[tuple[str, str], Tensor]()
    try:
        for key, tensor in load_file(folder / WEIGHTS).items():
            if (found := _TENSOR.fullmatch(key)) is None:
                reason = f"{key} is no matrix of a linear layer, and only those are served"
                raise ModelError(f"{folder}: {reason}; merge the adapter into its base")
            halves[found[1], found[2]] = tensor
        pairs = [(p, half, halves[p, "B"]) for (p, which), half in halves.items() if which == "A"]
        return {path: (a, b * _scale(config, path, b.shape[1])) for path, a, b in pairs}
    except ModelError:
        raise
    except Exception as error:  # a broken file of either kind may raise anything
        raise ModelError(f"{folder}: {WEIGHTS} or {CONFIG} is broken: {error!r}") from error


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """PEFT's scaling of a layer; keys of ``alpha_pattern`` are ends of paths, as expressions."""
    patterns = (config.get("alpha_pattern") or {}).items()
    own = (value for key, value in patterns if re.match(rf"(.*\.)?({key})$", path))
    alpha: float = next(own, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


# --- in torch ---------------------------------------------------------------------------------

_Worn: TypeAlias = tuple[int, dict[Lora, list[int]]]
"""A number of equal parts of a batch, and which of them wear each adapter."""

_WORN: ContextVar[_Worn] = ContextVar("WORN", default=(0, {}))  # each thread has its own


@contextmanager
def wearing(*loras: Lora | None) -> Iterator[None]:
    """Compute with the adapter of each row of a batch; a single one is that of all rows."""
    parts: dict[Lora, list[int]] = {}
    for place, lora in enumerate(loras):
        if lora is not None:
            parts.setdefault(lora, []).append(place)
    before = _WORN.set((len(loras), parts))
    try:
        yield
    finally:
        _WORN.reset(before)


class Wardrobe:
    """The adapters of a model in torch, in its device and precision."""

    def __init__(self, llm: nn.Module) -> None:
        self._llm: Any = llm
        self._hooks: dict[Lora, list[Any]] = {}

    def load(self, lora: Lora) -> None:
        """Hang an adapter beside the layers; a ModelError if the model lacks one of these."""
        llm, found = self._llm, dict[Any, list[Tensor]]()
        named = {name: m for name, m in llm.named_modules() if hasattr(m, "in_features")}
        for path, (down, up) in lora.parts().items():
            layer = named.get(_name_of(path, list(named)))
            if layer is None or layer in found:
                raise lora.misfit(f"it adapts {path}, a linear layer that {lora.base} lacks")
            own, its = (down.shape[1], len(up)), (layer.in_features, layer.out_features)
            if own != its or up.shape[1] != len(down):
                sizes = f"its {path} reads and gives {own} numbers"
                raise lora.misfit(f"{sizes}, but that of {lora.base} {its}")
            found[layer] = [half.to(llm.device, llm.dtype) for half in (down, up)]
        decoding = {*llm.get_decoder().modules(), llm.get_output_embeddings()}
        lora.in_media |= not decoding.issuperset(found)
        self._hooks[lora] = [
            layer.register_forward_hook(partial(_add, lora, own)) for layer, own in found.items()
        ]

    def unload(self, lora: Lora) -> None:
        for hook in self._hooks.pop(lora, ()):
            hook.remove()


def _name_of(path: str, names: Sequence[str]) -> str:
    """The layer of a path, which another version of transformers may have begun otherwise.

    It ends like the path, at least from the words before its number on; of several layers that do,
    it is the one whose name has most words of the path.
    """
    words = path.split(".")
    numbers = (at for at, word in enumerate(words) if word.isdecimal())
    for start in range(max(1, next(numbers, len(words)))):
        end = "." + ".".join(words[start:])
        if found := [name for name in names if f".{name}".endswith(end)]:
            return max(found, key=lambda name: len({*words} & {*name.split(".")}))
    return ""


def _add(lora: Lora, own: Sequence[Tensor], _: Any, args: tuple[Tensor], output: Tensor) -> None:
    n, parts = _WORN.get()
    if (places := parts.get(lora)) is not None:
        down, up = own
        rows = args[0].unflatten(0, (n, -1))[places].to(down.dtype)
        output.unflatten(0, (n, -1))[places] += linear(linear(rows, down), up)

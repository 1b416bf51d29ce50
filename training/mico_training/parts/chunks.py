"""A batch whose samples run a chunk at a time, with the whole batch's gradients.

This is gradient caching (Gao et al. 2021, arXiv 2101.06983) over equations 4 to 6.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from mico_chat.errors import ConfigError
from mico_chat.model.pretraining import EncodedContexts, MicoForPretraining
from mico_training.trained import frozen_modules

T = TypeVar("T")


def run_by_chunks(model: MicoForPretraining, size: int) -> None:
    """Have stage 1's model run ``size`` samples at a time, once it is known what trains.

    Autograd keeps the result of a chunk alone, without what no objective uses, and computes the
    rest again in the backward pass, with the same random numbers. A ConfigError names a batch norm,
    which would see a chunk as its batch.
    """
    held = {id(inner) for module in frozen_modules(model.encoder) for inner in module.modules()}
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in held:
            raise ConfigError(
                f"stage1.chunk: encoder.{name} takes its mean from a batch, but would see chunks "
                f"of {size} samples: leave chunk out, or add the part that holds it to train.freeze"
            )

    def of_chunk(compute: Callable[[slice], T], rows: slice) -> T:
        found: Any = compute(rows)
        if isinstance(found, EncodedContexts):
            weights = model.objective_weights
            used = {"tokens": weights.get("region"), "features": weights.get("concept")}
            unused = {name: getattr(found, name)[:0] for name, use in used.items() if not use}
            found = found._replace(**unused)
        return cast(T, found)

    def by_rows(compute: Callable[[slice], T], n: int) -> list[T]:
        if n <= size:
            return [compute(slice(0, n))]
        chunks = (slice(at, min(at + size, n)) for at in range(0, n, size))
        return [checkpoint(of_chunk, compute, rows, use_reentrant=False) for rows in chunks]

    model.by_rows = by_rows

"""A short name for a model's weights, so that two runs are known to be of the same ones."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(model: nn.Module, more: str = "") -> str:
    """Names the weights, whatever folder they lie in: a digest of each tensor's shape and sum.

    Reading all bytes of a large model takes longer than evaluating some items. ``more`` is what
    else decides what the model sees.
    """
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(model.state_dict().items()):
        total = tensor.double().sum().item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total!r}\n".encode())
    return digest.hexdigest()[:16]

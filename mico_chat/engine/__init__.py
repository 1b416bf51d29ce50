"""Engines: one protocol, and what runs the model underneath.

Only the protocol is imported here; an engine brings its own heavy imports when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mico_chat.engine.base import (
    Answer,
    Decoder,
    Engine,
    GenerationOptions,
    Usage,
    decode_media,
    media_reports,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "Answer",
    "Decoder",
    "Engine",
    "GenerationOptions",
    "Usage",
    "decode_media",
    "load_engine",
    "media_reports",
]


def load_engine(
    model: str | Path,
    decoder: Decoder,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
) -> Engine:
    """Load ``model`` ("mini", a folder or a hub name) into the engine for this machine.

    ``decoder`` stays the caller's, who closes it.
    """
    from mico_chat.engine.transformers import TransformersEngine

    return TransformersEngine.load(model, decoder, dtype=dtype, device=device)

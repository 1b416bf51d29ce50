"""The protocol of every engine. :mod:`mico_chat.load` imports an engine when a model is loaded."""

from __future__ import annotations

from mico_chat.engine.base import Delta, Engine, EngineStats, GenerationOptions, Prompt
from mico_chat.wire import FinishReason, TokenLogprob, Usage

__all__ = [
    "Delta",
    "Engine",
    "EngineStats",
    "FinishReason",
    "GenerationOptions",
    "Prompt",
    "TokenLogprob",
    "Usage",
]

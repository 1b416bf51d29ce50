"""Engines: one protocol, and what runs the language model underneath.

Only the protocol is imported here; :mod:`mico_chat.load` brings an engine and its heavy
imports when a model is loaded.
"""

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

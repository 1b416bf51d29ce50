"""Loads a model of two GGUF files: a language model, and the projector of its media (mmproj)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mico_chat.adapters.gguf import GgufAdapter
from mico_chat.adapters.mtmd import Projector
from mico_chat.adapters.vocabulary import Vocabulary
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.llamacpp import LlamaCppModel

if TYPE_CHECKING:
    from mico_chat.load import EngineOptions


def load_gguf(
    model: Path, mmproj: Path | None, options: EngineOptions, *, max_running: int
) -> tuple[GgufAdapter, BatchingEngine]:
    """A GGUF model's adapter and engine; without an ``mmproj`` it reads text alone."""
    llm = LlamaCppModel(model, max_batch=options.max_batch, mixed=False, **options.arguments)
    try:
        vocabulary = Vocabulary(llm.weights)
        threads = options.arguments.get("threads")
        projector = None if mmproj is None else Projector(mmproj, llm.weights, threads)
        adapter = GgufAdapter(vocabulary, projector)
    except BaseException:
        llm.close()
        raise
    engine = BatchingEngine(llm, vocabulary, llm.ends, name="llamacpp", max_running=max_running)
    return adapter, engine

"""An assistant whose media layer, preprocessing and encoder are real; only its words are not."""

from __future__ import annotations

from collections.abc import Sequence

from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Chunk
from mico_chat.media.decoder import Decoder
from mico_chat.model.config import MicoChatConfig
from tests.engine.fake_model import END, FakeModel, joined_letters
from tests.tiny import chat_model, processor_for


def decoding_assistant(decoder: Decoder, cache_bytes: int = 1 << 20) -> Assistant:
    """A tiny random encoder behind ``decoder``; it fails on context tokens that are no numbers."""

    def check(batch: Sequence[Chunk]) -> None:
        model.batches.clear()  # kept for other tests
        for chunk in batch:
            for tokens in chunk.context:
                if not bool(tokens.isfinite().all()):
                    raise ValueError("context tokens that are no finite numbers")

    config = MicoChatConfig.tiny()
    processor = processor_for(config)
    model = FakeModel(n_cells=4_000, max_position=1_000, max_batch=256, before=check)
    engine = BatchingEngine(model, joined_letters(), (END,), name="fake")
    encoder = MediaEncoder(chat_model(config), processor, decoder, cache_bytes=cache_bytes)
    return Assistant(engine, encoder, processor, name="tiny")

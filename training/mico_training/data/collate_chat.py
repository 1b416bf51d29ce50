"""Batches of stages 2 and 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mico_chat.errors import DataError
from mico_chat.messages import Message
from mico_chat.model.processing import MicoChatProcessor
from mico_training.data.conversations import ChatExample
from mico_training.data.media import LoadedMedium, MediaLoader, regions_by_part
from mico_training.data.regions import region_batch

PAD_TO = 16
"""Lengths are rounded up: attention over an odd length is twice as slow on a CPU."""


class ChatCollator:
    """Conversations to a batch for ``MicoChatForConditionalGeneration``.

    Args:
        processor: the model's.
        loader: gives the media's pixels or features.
        max_length: a conversation that is longer loses its last turns.
    """

    def __init__(self, processor: MicoChatProcessor, loader: MediaLoader, max_length: int) -> None:
        self.processor = processor
        self.loader = loader
        self.max_length = max_length

    def __call__(self, examples: Sequence[ChatExample]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` (B, S) and the media inputs."""
        tokens, rows = [], []
        for example in examples:
            media = [self.loader.load(medium) for medium in example.media]
            ids, labels, n_media = self._fit(example.id, example.messages, media)
            tokens.append((ids, labels))
            rows.append(media[:n_media])
        batch = {
            **self.processor.pad(tokens, train=True, multiple=PAD_TO),
            **self.loader.batch(rows),
        }
        regions = region_batch(
            [
                found
                for example, media in zip(examples, rows, strict=True)
                for found, _ in regions_by_part(example.regions, media)
            ],
            self._word,
        )
        if regions is not None:
            batch |= regions.inputs()
        if any(example.simulated >= 0 for example in examples):
            simulated = torch.tensor([example.simulated for example in examples])
            batch["simulated_names"] = simulated[batch["media_row"]]
        return batch

    def _word(self, word: str) -> list[int]:
        """A word's tokens as they stand inside a sentence."""
        ids: list[int] = self.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return ids

    def _fit(
        self, name: str, messages: Sequence[Message], media: Sequence[LoadedMedium]
    ) -> tuple[list[int], list[int], int]:
        """Ids and labels of as many turns as fit, and how many media these have.

        Raises:
            DataError: not even the first question and answer fit.
        """
        ids: list[int] = []
        for kept in range(len(messages), 1, -1):
            if messages[kept - 1].role == "assistant":
                n_media = sum(len(message.media) for message in messages[:kept])
                measured = [medium.measured for medium in media[:n_media]]
                ids, labels = self.processor.tokenize(messages[:kept], False, measured)
                if len(ids) <= self.max_length:
                    return ids, labels, n_media
        raise DataError(
            name,
            None,
            f"its first turn has {len(ids)} tokens, more than train.max_length {self.max_length}",
        )

"""Stage 1's batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mico_chat.media.kinds import Kind
from mico_chat.model.captioning import question_prefix
from mico_training.data.contexts import ContextExample
from mico_training.data.media import LoadedMedium, MediaLoader, regions_by_part
from mico_training.data.regions import region_batch

NO_CONCEPT = -100


class ContextCollator:
    """Contexts to a batch for ``MicoForPretraining``.

    Args:
        tokenizer: the text branch's own.
        loader: gives the media's pixels or features.
        concepts: per kind, the class of each name; a name nobody knows has no label.
        caption_length: longer captions, and answers, are cut to so many tokens.
        most_units: of a medium with more frames or slices, so many are taken, evenly spread.
        most_slices: of a sound with more slices (0: a video's track is left out); as
            ``most_units`` where not given.
        positions: of the text branch, which a question and its answer share.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loader: MediaLoader,
        concepts: Mapping[Kind, Mapping[str, int]],
        caption_length: int,
        most_units: int,
        most_slices: int | None = None,
        positions: int = 128,
    ) -> None:
        self.tokenizer = tokenizer
        self.loader = loader
        self.concepts = concepts
        self.caption_length = caption_length
        self.most_units = most_units
        self.positions = positions
        self.most_slices = most_units if most_slices is None else most_slices

    def __call__(self, examples: Sequence[ContextExample]) -> dict[str, Tensor]:
        """A batch of B rows with M media and captions of L tokens."""
        text = self.tokenizer(
            [example.caption for example in examples],
            padding=True,
            truncation=True,
            max_length=self.caption_length,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        questions = [example.question for example in examples]
        asked: dict[str, Tensor] = {}
        if any(questions):
            names = ("question_ids", "question_mask")
            prefix = question_prefix(questions, self.tokenizer, self.positions)
            asked = dict(zip(names, prefix, strict=True))
        rows = [
            [
                thinned(self.loader.load(medium), self.most_units, self.most_slices)
                for medium in example.media
            ]
            for example in examples
        ]
        labels: list[int] = []
        for example, media in zip(examples, rows, strict=True):
            for medium, name in zip(media, example.concepts, strict=True):
                labels.append(self.concepts.get(medium.kind, {}).get(name, NO_CONCEPT))
                # What is seen in a video need not be what its sound track is of.
                labels += [NO_CONCEPT] * (medium.track is not None)
        # The encoder sees one frame at a time and cannot tell a motion.
        regions = region_batch(
            [
                found if len(inputs) == 1 else ()
                for example, media in zip(examples, rows, strict=True)
                for found, inputs in regions_by_part(example.regions, media)
            ],
            self._word,
        )
        return {
            **({} if regions is None else regions.inputs()),
            **asked,
            **self.loader.batch(rows),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "corpus_pair": torch.tensor([example.corpus_pair for example in examples]),
            "concept_labels": torch.tensor(labels),
        }

    def _word(self, word: str) -> list[int]:
        """A word's pieces; none where the vocabulary lacks one."""
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return [] if self.tokenizer.unk_token_id in ids else list(ids)


def thinned(medium: LoadedMedium, most: int, most_slices: int) -> LoadedMedium:
    """A medium with at most ``most`` frames and ``most_slices`` of sound, evenly spread.

    With no slices a video loses its sound track; a sound has at least one.
    """

    def cut(inputs: Tensor, most: int) -> Tensor:
        if len(inputs) <= most:
            return inputs
        return inputs[torch.linspace(0, len(inputs) - 1, most).round().long()]

    track = cut(medium.track, most_slices) if most_slices and medium.track is not None else None
    own = cut(medium.inputs, max(1, most_slices) if medium.kind == "audio" else most)
    return LoadedMedium(medium.kind, own, track)

"""Batches: conversations for stages 2 and 3, contexts for stage 1."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import DataError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MeasuredMedium, Words
from mico_chat.media.sampling import of_segments
from mico_chat.messages import Message, with_system
from mico_chat.model.processing import IGNORED, MicoChatProcessor
from mico_chat.model.released import Subtitles
from mico_chat.model.text_branch import question_prefix
from mico_training.data.examples import CORPORA, ChatExample, ContextExample
from mico_training.data.media import LoadedMedium, MediaLoader, regions_by_part
from mico_training.data.sources.sample import region_batch
from mico_training.recipe import Stage1Recipe

PAD_TO = 16
"""Lengths are multiples of it: attention over odd lengths is twice as slow on a CPU."""


Row = tuple[list[int], list[int]]
"""It holds the ids and the labels of a conversation."""
PreparedChat = tuple[ChatExample, list[Row], list[LoadedMedium]]
"""A conversation, its row or those of its two ends, and the media of the turns that fit."""
PreparedContext = tuple[ContextExample, list[LoadedMedium]]


@dataclass(frozen=True)
class ChatCollator:
    """Makes a chat model's batch of conversations.

    A conversation with more than ``max_length`` tokens loses its last turns. What can fail for one
    example alone, such as to load its media, is in :meth:`prepare`. With ``pairs`` the rows are
    those of the chosen answers, then those of the rejected ones, and have a loss on the answers
    alone; the media are there once. With ``packing`` short conversations share a row.
    """

    processor: MicoChatProcessor
    loader: MediaLoader
    max_length: int
    pairs: bool = False
    packing: bool = False

    def __call__(self, examples: Sequence[ChatExample]) -> dict[str, Tensor]:
        return self.batch([self.prepare(example) for example in examples])

    def prepare(self, example: ChatExample) -> PreparedChat:
        """A MediaError if a medium cannot be loaded, a DataError if its first turn is too long."""
        generator = drawing(example.seed)
        prompt = self.processor.system_prompt
        messages = with_system(example.messages, prompt)
        media = [self.loader.load(medium, generator) for medium in example.media]
        measured = [
            replace(medium.measured, words=words)
            for medium, words in zip(media, [*example.words, *[Words()] * len(media)], strict=False)
        ]
        if self.pairs:
            both = messages, with_system(example.rejected, prompt)
            return example, self._pair(example.id, both, measured), media
        ids, labels, n_media = self._fit(example.id, messages, measured)
        return example, [(ids, labels)], media[:n_media]

    def batch(self, prepared: Sequence[PreparedChat]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` (B, S) and the media inputs.

        Of packed rows, ``position_ids`` (B, S) begin again with each conversation.
        """
        shared: list[list[int]] = []
        if self.packing:
            shared = together([len(ids) for _, [(ids, _)], _ in prepared])
            prepared = [prepared[number] for row in shared for number in row]
        examples, rows, media = zip(*prepared, strict=True)
        tokens = [row for column in zip(*rows, strict=True) for row in column]
        tokens, positions = packed(tokens, map(len, shared)) if shared else (tokens, [])
        batch = self.processor.pad(tokens, train=True, multiple=PAD_TO) | self.loader.batch(media)
        if positions:
            length = batch["input_ids"].shape[1]
            padding = (list(range(length - len(own))) for own in positions)
            filled = [own + rest for own, rest in zip(positions, padding, strict=True)]
            batch["position_ids"] = torch.tensor(filled)
        by_part = (regions_by_part(one.regions, media) for one, _, media in prepared)
        found = [part for parts in by_part for part, _ in parts]
        regions = region_batch(found, self._word)
        if regions is not None:
            batch |= regions.inputs()
        if any(example.simulated >= 0 for example in examples):
            simulated = torch.tensor([(one.simulated, one.unsure) for one in examples])
            batch["simulated_names"] = simulated[batch["media_row"]]
        if any(example.given for example in examples):
            batch["given"] = torch.tensor([example.given for example in examples])[
                batch["media_row"]
            ]
        return batch

    def _word(self, word: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        return ids

    def _fit(
        self, name: str, messages: Sequence[Message], media: Sequence[MeasuredMedium]
    ) -> tuple[list[int], list[int], int]:
        """Ids, labels and number of media of the turns that fit; a DataError if none fits."""
        ids: list[int] = []
        for kept in range(len(messages), 1, -1):
            if messages[kept - 1].role == "assistant":
                n_media = sum(len(message.media) for message in messages[:kept])
                ids, labels = self.processor.tokenize(messages[:kept], False, media[:n_media])
                if len(ids) <= self.max_length:
                    return ids, labels, n_media
        raise DataError(
            name,
            None,
            f"its first turn has {len(ids)} tokens, more than train.max_length {self.max_length}",
        )

    def _pair(
        self, name: str, both: Sequence[Sequence[Message]], media: Sequence[MeasuredMedium]
    ) -> list[Row]:
        """The chosen and the rejected conversation; labels are those of the ends that differ."""
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False))
        prompt = [message for message, _ in alike]
        start = len(self.processor.tokenize(prompt, False, media)[0])
        found = []
        for messages in both:
            ids, labels = self.processor.tokenize(messages, False, media)
            if len(ids) > self.max_length:
                reason = f"an answer with its prompt has {len(ids)} tokens, more than "
                raise DataError(name, None, f"{reason}train.max_length {self.max_length}")
            found.append((ids, [IGNORED] * start + labels[start:]))
        return found


def together(lengths: Sequence[int]) -> list[list[int]]:
    """The numbers of the conversations of each row, none longer than the longest conversation.

    The long ones come first, each into the first row with room for it.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fits = (row for row, left in enumerate(room) if left >= lengths[number])
        if (row := next(fits, None)) is None:
            row = len(rows)
            rows.append([])
            room.append(max(lengths))
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def packed(tokens: Sequence[Row], sizes: Iterable[int]) -> tuple[list[Row], list[list[int]]]:
    """Rows of so many conversations each, and the places of their tokens in the conversations.

    No conversation predicts the first token of the next one.
    """
    each, rows, places = iter(tokens), list[Row](), list[list[int]]()
    for size in sizes:
        row: Row = ([], [])
        places.append([])
        for ids, labels in islice(each, size):
            row[0].extend(ids)
            row[1].extend([IGNORED, *labels[1:]])
            places[-1].extend(range(len(ids)))
        rows.append(row)
    return rows, places


NO_CONCEPT = -100


@dataclass(frozen=True)
class ContextCollator:
    """Makes a batch of contexts for ``MicoForPretraining``.

    Args:
        tokenizer: the text branch's.
        loader: loads the media.
        concepts: for each kind, the class of each name; an unknown name has no label.
        recipe: how many tokens of each caption or answer, and units of a medium are used.
        positions: the text branch's positions, which all captions of a row share, or a question
            and its answer.
    """

    tokenizer: PreTrainedTokenizerBase
    loader: MediaLoader
    concepts: Mapping[Kind, Mapping[str, int]]
    recipe: Stage1Recipe
    positions: int = 128

    def __call__(self, examples: Sequence[ContextExample]) -> dict[str, Tensor]:
        return self.batch([self.prepare(example) for example in examples])

    def prepare(self, example: ContextExample) -> PreparedContext:
        """A MediaError if a medium cannot be loaded."""
        generator = drawing(example.seed)
        loaded = [self.loader.load(medium, generator) for medium in example.media]
        return example, [thinned(medium, self.recipe, generator) for medium in loaded]

    def batch(self, prepared: Sequence[PreparedContext]) -> dict[str, Tensor]:
        """A batch of B rows with M media and captions of L tokens, side by side as in eq. (2)."""
        examples = [example for example, _ in prepared]
        texts, of_caption = self._side_by_side(examples)
        asked: dict[str, Tensor] = {}
        if any(questions := [example.question for example in examples]):
            ids, mask = question_prefix(questions, self.tokenizer, self.positions)
            asked = {"question_ids": ids, "question_mask": mask}
        if self.recipe.subtitles:  # in every batch, so that all ranks compute the same
            said = [example.subtitle for example in examples]
            subtitles = Subtitles.of(said, self.tokenizer, self.positions)
            asked |= {"subtitle_ids": subtitles.ids, "subtitle_mask": subtitles.mask}
        if self.recipe.scst:
            asked["reference_ids"] = self._references([one.references for one in examples])
        found = []
        labels: list[int] = []
        media_corpus: list[int] = []
        caption_corpus: list[Tensor] = []
        for number, (example, media) in enumerate(prepared):
            corpora = [CORPORA[m.kind] * example.joint for m in example.media]
            own = [0 if caption is None else corpora[caption] for caption in of_caption[number]]
            caption_corpus.append(torch.tensor(own))
            for medium, name, corpus in zip(media, example.concepts, corpora, strict=True):
                media_corpus += [corpus] * (1 + (medium.track is not None))
                labels.append(self.concepts.get(medium.kind, {}).get(name, NO_CONCEPT))
                # A video's sound track need not be of the thing that the frames show.
                labels += [NO_CONCEPT] * (medium.track is not None)
            # Regions of clips are left out: the encoder sees single frames, so no motion.
            if self.recipe.weights.region > 0:
                for shown, inputs in regions_by_part(example.regions, media):
                    found.append(shown if len(inputs) == 1 else ())
        regions = region_batch(found, self._word)
        batch = self.loader.batch([media for _, media in prepared])
        if any(example.simulated >= 0 for example in examples):
            simulated = torch.tensor([example.simulated for example in examples])
            batch["simulated_names"] = simulated[batch["media_row"]]
        return {
            **({} if regions is None else regions.inputs()),
            **asked,
            **batch,
            "input_ids": pad_sequence(texts, True, int(self.tokenizer.pad_token_id or 0)),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in texts], True),
            "caption_corpus": pad_sequence(caption_corpus, True),
            "media_corpus": torch.tensor(media_corpus),
            "concept_labels": torch.tensor(labels),
        }

    def _side_by_side(
        self, examples: Sequence[ContextExample]
    ) -> tuple[list[Tensor], list[list[int | None]]]:
        """The ids of each example's captions, and the caption that each token is of.

        Each caption loses what is beyond its own budget, so that none is lost to those before it.
        Where more captions stand in a row than it has room for, they share the room equally.
        """
        read = self.tokenizer(
            [list(example.captions) for example in examples],
            is_split_into_words=True,  # so that each token's word is the number of its caption
            verbose=False,  # of lengths: texts are cut here
        )
        rows: list[Tensor] = []
        of_caption: list[list[int | None]] = []
        for number, example in enumerate(examples):
            budgets = [self.recipe.budget(text in example.fused) for text in example.captions]
            places = read.word_ids(number)
            lengths = Counter(place for place in places if place is not None)
            wanted = sum(min(lengths[place], most) for place, most in enumerate(budgets))
            if wanted > (room := self.positions - places.count(None)):
                budgets = [min(most, room // len(budgets)) for most in budgets]
            before = Counter[int | None]()
            kept = []
            for token, place in enumerate(places):
                if place is None or before[place] < budgets[place]:
                    kept.append(token)
                before[place] += 1
            rows.append(torch.tensor(read["input_ids"][number])[kept])
            of_caption.append([places[token] for token in kept])
        return rows, of_caption

    def _references(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """Ids (B, R, S) of the references of B samples, with rows of padding where some lack."""
        most = max(map(len, texts))
        flat = [text for row in texts for text in row]
        read = self.tokenizer(
            flat,
            padding=True,
            truncation=True,
            max_length=self.recipe.caption_length,
            return_tensors="pt",
        )["input_ids"]
        assert isinstance(read, Tensor)
        ids = torch.full((len(texts), most, read.shape[1]), int(self.tokenizer.pad_token_id or 0))
        for row, own in enumerate(read.split(list(map(len, texts)))):
            ids[row, : len(own)] = own
        return ids

    def _word(self, word: str) -> list[int]:
        ids = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return [] if self.tokenizer.unk_token_id in ids else list(ids)


def drawing(seed: int | None) -> np.random.Generator | None:
    """The generator of an example's frames and slices; None draws nothing."""
    return None if seed is None else np.random.default_rng(seed)


def thinned(
    medium: LoadedMedium, recipe: Stage1Recipe, generator: np.random.Generator | None = None
) -> LoadedMedium:
    """A medium with at most ``most_units`` frames and ``most_slices`` slices.

    Each is the middle one of a run of them, or a random one with a ``generator``. With
    ``most_slices`` 0 a video loses its sound track, and a sound keeps one slice.
    """
    slices = recipe.most_units if recipe.most_slices is None else recipe.most_slices

    def cut(inputs: Tensor, most: int) -> Tensor:
        if len(inputs) <= most:
            return inputs
        return inputs[of_segments(len(inputs), most, generator)]

    track = cut(medium.track, slices) if slices and medium.track is not None else None
    own = cut(medium.inputs, max(1, slices) if medium.kind == "audio" else recipe.most_units)
    return LoadedMedium(medium.kind, own, track)

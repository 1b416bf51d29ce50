"""ContrastiveSpace: stage 1's model at work, texts and media's tokens to vectors and matches.

Nothing here waits or is safe for two threads at once: :mod:`mico_chat.similarity` sees to that.

Legend: B texts, S text length, U units of an item's media, T tokens a unit, D encoder width,
d text width, P width of the contrastive space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import RequestError
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import EncodedMedium
from mico_chat.model.context import Units
from mico_chat.model.pretraining import MicoForPretraining

CORPUS_PAIR = 0
"""Row of E_Sam for a sample of one corpus, as all of a request are (eq. 3)."""


class MediaTokens(NamedTuple):
    """The encoder's tokens (U, T, D) of an item's media, and whose they are."""

    tokens: Tensor
    units: Units


class ContrastiveSpace:
    """Text branch, projections and matching head of a pretraining model.

    ``dim`` is P, ``max_tokens`` the longest text's length, [CLS] and [SEP] included.
    """

    def __init__(self, model: MicoForPretraining, tokenizer: PreTrainedTokenizerBase) -> None:
        text = model.config.text_config
        self.dim = text.projection_dim
        self.max_tokens = text.max_position_embeddings
        self._fill = text.pad_token_id
        self._model = model
        self._tokenizer = tokenizer
        self._device = next(model.text.parameters()).device

    def of_encoded(self, media: Sequence[EncodedMedium]) -> MediaTokens:
        """Tokens of media whose blocks hold the encoder's, sound tracks included."""
        encoder = self._model.encoder
        rows = torch.cat([block.tokens for medium in media for block in medium.blocks])
        shown = list(_with_tracks(media))
        kinds = torch.tensor([KINDS.index(medium.kind) for medium in shown])
        units = Units.of(kinds, torch.tensor([medium.units for medium in shown]))
        return MediaTokens(rows.unflatten(0, (-1, encoder.n_prefix + encoder.grid**2)), units)

    def tokenize(self, text: str, where: str) -> list[int]:
        """Ids of a text. What is typed is never markup.

        Raises:
            RequestError: naming the field ``where`` of a text without a token of its own, or with
                more than ``max_tokens``.
        """
        ids = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        if len(ids) <= self._tokenizer.num_special_tokens_to_add():
            raise RequestError.at(where, "the text is empty")
        if len(ids) > self.max_tokens:
            raise RequestError.at(
                where,
                f"the text has {len(ids)} tokens, more than the text branch's {self.max_tokens}: "
                "shorten it, or give its parts as items of their own",
            )
        return cast(list[int], ids)

    def truncated(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of texts, at most ``length`` of each. What is typed is never markup."""
        found = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=min(length, self.max_tokens),
            split_special_tokens=True,
        )
        return cast(list[list[int]], found["input_ids"])

    @torch.inference_mode()
    def of_texts(self, rows: Sequence[list[int]]) -> Tensor:
        """Ids of B texts to unit-length vectors (B, P) on the CPU, eq. (4)."""
        return self._model.encode_text(*self._padded(rows)).cpu()

    @torch.inference_mode()
    def of_media(self, media: MediaTokens) -> Tensor:
        """An item's media to a unit-length vector (P,) on the CPU, eq. (4)."""
        return self._context(media)[1].cpu()

    @torch.inference_mode()
    def match(self, rows: Sequence[list[int]], media: MediaTokens) -> list[float]:
        """The probability that each of B texts describes the media of an item, eq. (5)."""
        logits = self.match_logits(rows, self._context(media)[0][0])
        return cast(list[float], logits.sigmoid().tolist())

    @torch.inference_mode()
    def match_logits(self, rows: Sequence[list[int]], context: Tensor) -> Tensor:
        """Matching logits (B,) of B texts over one context (N, d), eq. (5)."""
        contexts = context.to(self._device).expand(len(rows), -1, -1)
        seen = torch.ones(contexts.shape[:2], dtype=torch.bool, device=self._device)
        return self._model.match(*self._padded(rows), contexts, seen)

    def _context(self, media: MediaTokens) -> tuple[Tensor, Tensor]:
        """One item's media to its context (1, U * T, d) and vector (P,), eq. (1)."""
        row = torch.zeros(len(media.tokens), dtype=torch.long, device=self._device)
        pair = torch.full((1,), CORPUS_PAIR, device=self._device)
        units = Units(*(values.to(self._device) for values in media.units))
        context, _, pooled, _ = self._model.join(media.tokens.to(self._device), units, row, pair)
        return context, pooled[0]

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, S), their mask and the corpus pairs (B,)."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self._fill)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        pair = torch.full((len(rows),), CORPUS_PAIR)
        return ids.to(self._device), mask.to(self._device), pair.to(self._device)


def _with_tracks(media: Sequence[EncodedMedium]) -> Iterator[EncodedMedium]:
    for medium in media:
        yield medium
        if medium.audio is not None:
            yield medium.audio

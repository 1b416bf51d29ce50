"""ContrastiveSpace: stage 1's model at work, which gives vectors and matches of texts and media.

It is not safe for two threads at once: :mod:`mico_chat.similarity` sees to that.

Legend: B texts, S text length, U units of media, T tokens a unit, N context tokens of an item,
D encoder width, d text width, P width of the contrastive space.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import RequestError
from mico_chat.fields import check_bytes
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import MeasuredMedium
from mico_chat.model.context import Units
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.released import Subtitles


class MediaContext(NamedTuple):
    """An item's media: the context (N, d) that the text branch reads, and the vector (P,)."""

    context: Tensor
    vector: Tensor


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

    @torch.inference_mode()
    def of_tokens(
        self,
        tokens: Tensor,
        units: Units,
        row: Tensor,
        n_items: int,
        subtitles: Sequence[str] = (),
    ) -> list[MediaContext]:
        """Each item's media, eq. (1) and (4).

        ``tokens`` (U, T, D) are those of :meth:`MicoForPretraining.in_context`; ``row`` (U,) is the
        item that a unit belongs to. ``subtitles``, one for each item or none, count where the model
        reads them.
        """
        units = Units(*(values.to(self._device) for values in units))
        tokens, row = tokens.to(self._device), row.to(self._device)
        said = None
        if any(subtitles) and self._model.text.subtitle is not None:
            read = Subtitles.of(subtitles, self._tokenizer, self.max_tokens)
            said = Subtitles(*(ids.to(self._device) for ids in read))
        context, mask, vectors, _ = self._model.join(tokens, units, row, n_items, said)
        vectors = vectors.cpu()
        return [MediaContext(context[i][mask[i]], vectors[i]) for i in range(n_items)]

    def of_encoded(self, media: Sequence[MeasuredMedium]) -> MediaContext:
        """One item's media, whose blocks hold the encoder's tokens; sound tracks are included."""
        shown = [part for medium in media for part in medium.parts]
        rows = torch.cat([part.encoded.tokens for part in shown])
        tokens = rows.unflatten(0, (-1, self._model.unit_length))
        kinds = torch.tensor([KINDS.index(part.kind) for part in shown])
        units = Units.of(kinds, torch.tensor([part.units for part in shown]))
        row = torch.zeros(len(tokens), dtype=torch.long)
        return self.of_tokens(tokens, units, row, 1)[0]

    def tokenize(self, text: str, where: str) -> list[int]:
        """Ids of a whole text, in which special tokens are plain text.

        The error for an empty or too long text names the text's place, ``where``.
        """
        check_bytes(len(text.encode()), self.max_tokens, where)
        ids = self._tokenizer(text, split_special_tokens=True)["input_ids"]
        if len(ids) <= self._tokenizer.num_special_tokens_to_add():
            raise RequestError.at(where, "the text is empty")
        if len(ids) > self.max_tokens:
            said = f"the text has {len(ids)} tokens, more than the text branch's {self.max_tokens}"
            raise RequestError.at(where, f"{said}: shorten it, or give its parts as items")
        return cast(list[int], ids)

    def truncated(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of texts, at most ``length`` of each. Special tokens in a text are plain text."""
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
    def match_logits(self, rows: Sequence[list[int]], context: Tensor) -> Tensor:
        """Matching logits (B,) of B texts and the context (N, d) of one item's media, eq. (5).

        Their sigmoid is the probability that the text describes the media.
        """
        contexts = context.to(self._device).expand(len(rows), -1, -1)
        seen = torch.ones(contexts.shape[:2], dtype=torch.bool, device=self._device)
        return self._model.match(*self._padded(rows), contexts, seen)

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, S) and their mask."""
        ids = pad_sequence([torch.tensor(row) for row in rows], True, self._fill)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        return ids.to(self._device), mask.to(self._device)

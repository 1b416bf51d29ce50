"""The pretraining model as an evaluation uses it: media in, contexts, vectors, words out.

Encoder and context run in the dtype asked for; the text branch in float32, as in
:mod:`mico_chat.similarity`: bfloat16 would tell near candidates in no order.

Legend: B items, U units, N context tokens, d text width, P width of the contrastive space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from mico_chat.checkpoints.assemble import read_preprocessing
from mico_chat.checkpoints.folders import PRETRAINING, local_folder
from mico_chat.checkpoints.load import load_pretraining, model_folder
from mico_chat.evaluation.fingerprint import fingerprint
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.captioning import answers, captions
from mico_chat.model.config import MicoConfig, MicoEncoderConfig, MicoTextConfig
from mico_chat.model.context import Units
from mico_chat.model.contrastive import CORPUS_PAIR
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor

UNITS_AT_ONCE = 64
"""Frames, slices and stills that the encoder takes in one step."""


class ItemUnits(NamedTuple):
    """An item's media as the encoder takes them: kinds, and of each its units (n, 3, H, W)."""

    kinds: tuple[Kind, ...]
    units: tuple[Tensor, ...]


class EncodedItem(NamedTuple):
    """An item's context (N, d) for the text branch and its vector (P,) of unit length; float32."""

    context: Tensor
    vector: Tensor


@dataclass(frozen=True)
class EvaluatedModel:
    """A pretraining model, its text branch's tokenizer, and how it wants its media."""

    name: str
    model: MicoForPretraining
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing

    @classmethod
    def load(cls, name: str, dtype: str = "float32", device: str | None = None) -> EvaluatedModel:
        """A stage 1 folder, or a chat model's that keeps its text branch.

        Args:
            name: ``mini``, or a folder.
            dtype: of encoder and context.
            device: ``cuda`` where there is one, else ``cpu``.

        Raises:
            ModelError: it has no text branch.
        """
        model, tokenizer = load_pretraining(name)
        nn.Module.to(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.encoder.to(getattr(torch, dtype))
        assert isinstance(model.config, MicoConfig)
        return cls(name, model, tokenizer, _preprocessing(name, model.config))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.text.parameters()).device

    @property
    def resolution(self) -> int:
        """Pixels a side of what it sees."""
        assert isinstance(self.model.config, MicoConfig)
        encoder = self.model.config.encoder_config
        assert isinstance(encoder, MicoEncoderConfig)
        return encoder.image_size

    def fingerprint(self) -> str:
        """Names its weights and how it sees; see :mod:`mico_chat.evaluation.fingerprint`."""
        return fingerprint(self.model, self.preprocessing.model_dump_json())

    @torch.inference_mode()
    def encode(self, items: Sequence[ItemUnits]) -> list[EncodedItem]:
        """Media of B items to their contexts and vectors, eq. (1) and (4)."""
        model = self.model
        kinds = torch.tensor([KINDS.index(kind) for item in items for kind in item.kinds])
        counts = torch.tensor([len(units) for item in items for units in item.units])
        owner = torch.tensor([row for row, item in enumerate(items) for _ in item.units])
        pixels = torch.cat([units for item in items for units in item.units])
        tokens = torch.cat([self._tokens(part) for part in pixels.split(UNITS_AT_ONCE)])
        kinds, counts, owner = (x.to(self.device) for x in (kinds, counts, owner))
        tokens = model.context(tokens, kinds, counts)
        units = Units.of(kinds, counts)
        row = torch.repeat_interleave(owner, counts)
        pair = torch.full((len(items),), CORPUS_PAIR, device=self.device)
        context, mask, vectors, _ = model.join(tokens, units, row, pair)
        return [
            EncodedItem(context[i, : int(mask[i].sum())], vectors[i]) for i in range(len(items))
        ]

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Pixels (U, 3, H, W) to the encoder's tokens (U, T, D) in float32."""
        encoder = self.model.encoder
        dtype = next(encoder.vit.parameters()).dtype
        features = encoder.features(pixels.to(self.device, dtype))
        tokens: Tensor = encoder(features)
        return tokens.float()

    def tokenize(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Ids of texts, at most ``length`` of each; what is typed is never markup."""
        assert isinstance(self.model.config, MicoConfig)
        text = self.model.config.text_config
        assert isinstance(text, MicoTextConfig)
        found: list[list[int]] = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=min(length, text.max_position_embeddings),
            split_special_tokens=True,
        )["input_ids"]
        return found

    @torch.inference_mode()
    def text_vectors(self, rows: Sequence[list[int]]) -> Tensor:
        """Ids of B texts to unit-length vectors (B, P), eq. (4)."""
        return self.model.encode_text(*self._padded(rows))

    @torch.inference_mode()
    def match(self, rows: Sequence[list[int]], context: Tensor) -> Tensor:
        """Matching logits (B,) of B texts over one context (N, d), eq. (5)."""
        ids, mask = self._padded(rows)
        pair = torch.full((len(rows),), CORPUS_PAIR, device=self.device)
        contexts = context.to(self.device, torch.float32).expand(len(rows), -1, -1)
        seen = torch.ones(contexts.shape[:2], dtype=torch.bool, device=self.device)
        return self.model.match(ids, mask, pair, contexts, seen)

    def caption(self, items: Sequence[EncodedItem]) -> list[str]:
        """A caption of each item by beam search, eq. (6)."""
        return captions(self.model, *_side_by_side(items), self.tokenizer, num_beams=3)

    def answer(self, items: Sequence[EncodedItem], questions: Sequence[str]) -> list[str]:
        """An answer to a question about each item."""
        return answers(self.model, *_side_by_side(items), questions, self.tokenizer, num_beams=3)

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, S) and their mask."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows]).unsqueeze(1)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        return ids.to(self.device), mask.to(self.device)


def _side_by_side(items: Sequence[EncodedItem]) -> tuple[Tensor, Tensor]:
    """Contexts (B, N, d) filled up with zeros, and where they are true (B, N)."""
    contexts = pad_sequence([item.context for item in items], batch_first=True)
    lengths = torch.tensor([len(item.context) for item in items], device=contexts.device)
    places = torch.arange(contexts.shape[1], device=contexts.device)
    return contexts, places < lengths.unsqueeze(1)


def _preprocessing(name: str, config: MicoConfig) -> Preprocessing:
    """How a model was trained to see: what a chat model's processor says, or stage 1's folder."""
    folder = local_folder(model_folder(name))
    if (folder / PRETRAINING).is_dir():
        return Preprocessing(**MicoChatProcessor.from_pretrained(folder).preprocessing)
    return read_preprocessing(folder, config)

"""How alike texts and media are: the contrastive space and the matching head of stage 1.

A text or a medium becomes a vector of unit length, near to the others of like content (paper 3.4,
eq. 4); the matching head reads a text over a medium's tokens and says how surely it is told of it
(eq. 5). Encoder and context are the loaded chat model's own. The text branch is small, and in
float32 beside them: in bfloat16 a cosine would come in steps of 0.004, and near ones in no order.

As in stage 1, media of one item stand side by side in one context (eq. 1), a video's sound track
beside its frames as a sound of its own; frames and slices have an equal part in the vector.

Legend: U units of an item's media, T tokens a unit, D encoder width, P width of the vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mico_chat.encode import CacheStats, MediaEncoder
from mico_chat.errors import ModelError, RequestError
from mico_chat.media.decoder import Decoder
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import EncodedMedium, MediaReport, Medium
from mico_chat.messages import check_text
from mico_chat.model.contrastive import ContrastiveSpace, MediaTokens
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor

Item: TypeAlias = str | MediaFile | Medium | Sequence[str | MediaFile | Medium]
"""A text, a medium, or several media that are taken together."""

DEFAULT_CACHE_BYTES = 64 << 20
TEXTS_AT_ONCE = 32
CONTEXT_AT_ONCE = 16_384
"""Tokens of contexts that are matched in one step, each with a text: 0.1 s of the mini's."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Items in the contrastive space.

    ``vectors`` float32 (n, P) have unit length: their dot product is their cosine. ``tokens`` are
    those of each text, [CLS] and [SEP] included, and the encoder's of an item's media. ``media``
    has a report for each medium, in order.
    """

    vectors: NDArray[np.float32]
    tokens: tuple[int, ...]
    media: tuple[MediaReport, ...]


class Score(BaseModel):
    """How alike two items are.

    ``similarity`` is their cosine in [-1, 1]. ``match`` is how surely the text is told of the
    media, in [0, 1]; None where both are texts or both are media.
    """

    model_config = ConfigDict(frozen=True)

    similarity: float
    match: float | None = None


@dataclass(frozen=True)
class Scored:
    """``scores[q][d]`` of query ``q`` and document ``d``; ``tokens`` and ``media`` as in
    :class:`Embedded`, those of the queries first."""

    scores: tuple[tuple[Score, ...], ...]
    tokens: tuple[int, ...]
    media: tuple[MediaReport, ...]


@dataclass(frozen=True, eq=False)
class _Taken:
    """An item before it is a vector: a text's ids, or the tokens of its media."""

    ids: list[int]
    tokens: MediaTokens | None = None
    media: tuple[EncodedMedium, ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.ids) if self.tokens is None else self.tokens.tokens.shape[:2].numel()


class _EncoderAlone:
    """Encoder and context, as :class:`MediaEncoder` takes a model."""

    use_concepts = use_grid = True  # paths of the bridge, which is not here

    def __init__(self, model: MicoForPretraining) -> None:
        self._model = model
        first = next(model.encoder.parameters())
        self.device, self.dtype = first.device, first.dtype

    def context_tokens(self, kind: Tensor, units: Tensor, pixels: Tensor) -> list[Tensor]:
        """Tokens of each medium, unit by unit (U * T, D)."""
        features = self._model.encoder.unit_features(pixels, None, units)
        tokens = self._model.context(self._model.encoder(features), kind, units)
        return [of_one.flatten(0, 1) for of_one in tokens.split(units.tolist())]


class Similarity:
    """Vectors and scores of texts and media, for many requests at once.

    Args:
        model: best one that shares its encoder with a chat model (``load_pretraining``).
        tokenizer: of its text branch.
        processor: of the chat model.
        decoder: for media that are not decoded yet; it stays the caller's.
        cache_bytes: of media's tokens that are kept, so that they are encoded once.
    """

    def __init__(
        self,
        model: MicoForPretraining,
        tokenizer: PreTrainedTokenizerBase,
        processor: MicoChatProcessor,
        decoder: Decoder,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._space = ContrastiveSpace(model, tokenizer)
        self.dim = self._space.dim
        self.max_tokens = self._space.max_tokens
        alone = _EncoderAlone(model)
        self._encoder = MediaEncoder(alone, processor, decoder, cache_bytes=cache_bytes)
        # One thread: the tokenizer takes no two at once, and the cores no more work at a time.
        self._thread = ThreadPoolExecutor(1, "mico-similarity")

    @property
    def cache(self) -> CacheStats:
        """Hits, misses and bytes of the cache of media's tokens."""
        return self._encoder.cache.stats()

    async def embed(
        self,
        items: Sequence[Item],
        *,
        salt: str = "",
        name: str = "items",
    ) -> Embedded:
        """The vector of each item.

        Args:
            items: at least one.
            salt: only requests of the same one share what was encoded.
            name: what the client calls ``items``, for errors.

        Raises:
            RequestError: for an item that is empty, text beside media, or a text of more tokens
                than ``max_tokens``.
            MediaError: for a medium that cannot be decoded.
            ModelError: after :meth:`close`.
        """
        taken = await self._take(_read(items, name), salt)
        vectors = await self._vectors(taken)
        return Embedded(vectors.numpy(), *_costs(taken))

    async def score(
        self,
        queries: Sequence[Item],
        documents: Sequence[Item],
        *,
        salt: str = "",
        names: tuple[str, str] = ("queries", "documents"),
    ) -> Scored:
        """How alike each query and each document are; arguments and errors as :meth:`embed`."""
        read = _read(queries, names[0]) + _read(documents, names[1])
        taken = await self._take(read, salt)
        vectors = await self._vectors(taken)
        n = len(queries)
        cosines = (vectors[:n] @ vectors[n:].T).clamp(-1, 1)
        matches = await self._matches(taken[:n], taken[n:])
        scores = tuple(
            tuple(
                Score(similarity=float(cosines[q, d]), match=matches.get((q, d)))
                for d in range(len(documents))
            )
            for q in range(n)
        )
        return Scored(scores, *_costs(taken))

    def close(self) -> None:
        """End the threads after what they have begun; the decoder stays the caller's."""
        self._encoder.close()
        self._thread.shutdown()

    # --- items ------------------------------------------------------------------------------------

    async def _take(self, items: Sequence[_Read], salt: str) -> list[_Taken]:
        ids = await self._in_thread(self._tokenize, items)  # before the work: it may refuse
        shown = [medium for item in items for medium in item.media]
        encoded = iter(await self._encoder.encode(shown, salt=salt))
        taken: list[_Taken] = []
        for item, found in zip(items, ids, strict=True):
            if not item.media:
                taken.append(_Taken(found))
                continue
            media = tuple(next(encoded) for _ in item.media)
            taken.append(_Taken([], self._space.of_encoded(media), media))
        return taken

    def _tokenize(self, items: Sequence[_Read]) -> list[list[int]]:
        """Ids of the texts, none for media."""
        space = self._space
        return [[] if item.media else space.tokenize(item.text, item.where) for item in items]

    # --- vectors and matches ----------------------------------------------------------------------

    async def _vectors(self, taken: Sequence[_Taken]) -> Tensor:
        """Unit-length vectors (n, P) on the CPU."""
        vectors = torch.empty(len(taken), self.dim)
        texts = [place for place, item in enumerate(taken) if item.tokens is None]
        for places in _chunks(texts, TEXTS_AT_ONCE):
            rows = [taken[place].ids for place in places]
            vectors[places] = await self._in_thread(self._space.of_texts, rows)
        for place, item in enumerate(taken):
            if item.tokens is not None:
                vectors[place] = await self._in_thread(self._space.of_media, item.tokens)
        return vectors

    async def _matches(
        self, queries: Sequence[_Taken], documents: Sequence[_Taken]
    ) -> dict[tuple[int, int], float]:
        """Matching probabilities of the pairs (query, document) of a text and media."""
        found: dict[tuple[int, int], float] = {}
        for side, other, flip in ((queries, documents, False), (documents, queries, True)):
            texts = [place for place, item in enumerate(other) if item.tokens is None]
            for m, item in enumerate(side):
                if item.tokens is None:
                    continue
                for places in _chunks(texts, max(1, CONTEXT_AT_ONCE // item.n_tokens)):
                    rows = [other[place].ids for place in places]
                    matches = await self._in_thread(self._space.match, rows, item.tokens)
                    for place, match in zip(places, matches, strict=True):
                        found[(place, m) if flip else (m, place)] = match
        return found

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        """What the text branch does, after all that others asked of it before."""
        try:
            future = self._thread.submit(work, *given)
        except RuntimeError as error:  # of the executor, after its shutdown
            raise ModelError("similarity is closed") from error
        return await asyncio.wrap_future(future)


@dataclass(frozen=True)
class _Read:
    """An item that is a text, or media, and the field it stands in."""

    where: str
    text: str = ""
    media: tuple[MediaFile | Medium, ...] = ()


def _read(items: Sequence[Item], name: str) -> list[_Read]:
    """Each item as a text or as media.

    Raises:
        RequestError: naming the item that is neither.
    """
    if not items:
        raise RequestError.at(name, "expected at least one text or medium")
    return [_item(item, f"{name}[{number}]") for number, item in enumerate(items)]


def _item(item: Item, where: str) -> _Read:
    if isinstance(item, str):
        check_text(item, where)
        return _Read(where, item)
    if isinstance(item, MediaFile | Medium):
        return _Read(where, media=(item,))
    media = tuple(part for part in item if not isinstance(part, str))
    if not item:
        raise RequestError.at(where, "expected a text or at least one medium, got an empty list")
    if not media:
        raise RequestError.at(
            where,
            "a list holds media that are taken together: give each text as an item of its own",
        )
    if len(media) != len(item):
        raise RequestError.at(
            where,
            "an item holds both text and media, but one encoder reads text and another "
            "reads media: give the text as an item of its own",
        )
    return _Read(where, media=media)


def _costs(taken: Sequence[_Taken]) -> tuple[tuple[int, ...], tuple[MediaReport, ...]]:
    """Tokens of each item, and the report of each medium."""
    reports = tuple(medium.report for item in taken for medium in item.media)
    return tuple(item.n_tokens for item in taken), reports


def _chunks(places: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]

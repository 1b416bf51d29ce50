"""How alike texts and media are: the contrastive space and the matching head of stage 1.

A text or a medium becomes a vector of unit length; similar content has near vectors (paper 3.4,
eq. 4). The matching head reads a text together with a medium's tokens and gives the probability
that the text describes the medium (eq. 5). Encoder and context are the loaded chat model's. The
small text branch is always in float32: in bfloat16 cosines would have steps of 0.004.

As in stage 1, the media of one item form one context (eq. 1), in which a video's sound track is a
sound. The vector is the mean over all frames, slices and stills.
The text branch is loaded for the first item: with it come transformers' models, whose import takes
longer than all else that a service loads.

Legend: U units of an item's media, T tokens a unit, D encoder width, P width of the vectors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.encode import AnyMedium, MediaEncoder
from mico_chat.errors import ModelError, RequestError
from mico_chat.fields import check_text
from mico_chat.late import late
from mico_chat.media.decoder import Decoder
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import MediaReport, Medium
from mico_chat.model.processing import MicoChatProcessor

with late():
    from mico_chat.model import contrastive, pretraining

Item: TypeAlias = str | AnyMedium | Sequence[str | AnyMedium]
"""A text, a medium, or several media that have one vector together."""

DEFAULT_CACHE_BYTES = 64 << 20
TEXTS_AT_ONCE = 32
CONTEXT_AT_ONCE = 16_384
"""One step of the matching head has at most these context tokens, all texts together: 0.1 s with
the mini."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Embedded:
    """Items in the contrastive space.

    ``vectors`` float32 (n, P) have unit length: a dot product is a cosine. ``tokens`` counts each
    text's tokens, with [CLS] and [SEP], or the encoder's tokens of each item's media.
    """

    vectors: NDArray[np.float32]
    tokens: tuple[int, ...]
    media: tuple[MediaReport, ...]


class Score(BaseModel):
    """``similarity`` is a cosine; ``match`` the probability that the text describes the media."""

    model_config = ConfigDict(frozen=True)

    similarity: float
    match: float | None = None


@dataclass(frozen=True)
class Scored:
    """``scores[q][d]`` of query ``q`` and document ``d``; the other fields list queries first."""

    scores: tuple[tuple[Score, ...], ...]
    tokens: tuple[int, ...]
    media: tuple[MediaReport, ...]


@dataclass
class _Item:
    """A text or media, its field in the request, and the model's input that is made of it."""

    where: str
    text: str = ""
    media: tuple[AnyMedium, ...] = ()
    ids: list[int] = field(default_factory=list)
    context: contrastive.MediaContext | None = None
    reports: tuple[MediaReport, ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.ids) if self.context is None else len(self.context.context)


class _EncoderTokens:
    """Encoder and context without a bridge, for :class:`MicoAdapter`."""

    def __init__(self, model: pretraining.MicoForPretraining) -> None:
        self._model = model
        first = next(model.encoder.parameters())
        self.device, self.dtype, self.rows = first.device, first.dtype, model.rows

    def context_tokens(
        self, media_kind: Tensor, media_units: Tensor, pixel_values: Tensor
    ) -> list[Tensor]:
        """Tokens of each medium, unit by unit (U * T, D)."""
        tokens, _ = self._model.seen(media_kind, media_units, pixel_values)
        return [of_one.flatten(0, 1) for of_one in tokens.split(media_units.tolist())]


class Similarity:
    """Vectors and scores of texts and media, for many requests at once.

    ``load`` gives the model, which should share its encoder with a chat model, and its tokenizer.
    ``dim`` and ``max_tokens`` are known from :meth:`ready` on. The caller closes ``decoder``.
    """

    def __init__(
        self,
        load: Callable[[], tuple[pretraining.MicoForPretraining, PreTrainedTokenizerBase]],
        processor: MicoChatProcessor,
        decoder: Decoder,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self._load, self._processor = load, processor
        self._decoder, self._cache_bytes = decoder, cache_bytes
        # One thread: the tokenizer is not thread-safe, and one computation uses all cores.
        self._thread = ThreadPoolExecutor(1, "mico-similarity")

    @cached_property
    def _space(self) -> contrastive.ContrastiveSpace:
        model, tokenizer = self._load()
        space = contrastive.ContrastiveSpace(model, tokenizer)
        adapter = MicoAdapter(_EncoderTokens(model), self._processor)
        self._encoder = MediaEncoder(adapter, self._decoder, cache_bytes=self._cache_bytes)
        self.dim, self.max_tokens = space.dim, space.max_tokens
        return space

    async def ready(self) -> None:
        """Load the model, unless it is there; a :class:`ModelError` if a file of it is broken."""
        await self._in_thread(lambda: self._space)

    async def embed(
        self, items: Sequence[Item], *, tenant: str = "", name: str = "items"
    ) -> Embedded:
        """The vector of each item. ``name`` is the client's name for ``items``, for errors."""
        read = _read(items, name)
        await self._prepare(read, tenant)
        vectors = await self._vectors(read)
        return Embedded(vectors.numpy(), *_costs(read))

    async def score(
        self,
        queries: Sequence[Item],
        documents: Sequence[Item],
        *,
        tenant: str = "",
        names: tuple[str, str] = ("queries", "documents"),
    ) -> Scored:
        """How alike each query and each document are; see :meth:`embed`."""
        asked, offered = _read(queries, names[0]), _read(documents, names[1])
        await self._prepare(asked + offered, tenant)
        vectors = await self._vectors(asked + offered)
        cosines = (vectors[: len(asked)] @ vectors[len(asked) :].T).clamp(-1, 1).tolist()
        matches = await self._matches(asked, offered)
        scores = []
        for q, row in enumerate(cosines):
            found = (Score(similarity=s, match=matches.get((q, d))) for d, s in enumerate(row))
            scores.append(tuple(found))
        return Scored(tuple(scores), *_costs(asked + offered))

    def close(self) -> None:
        self._thread.shutdown()
        if "_space" in vars(self):
            self._encoder.close()

    async def _prepare(self, items: Sequence[_Item], tenant: str) -> None:
        await self.ready()
        for item in items:  # texts first: the tokenizer refuses long texts
            if not item.media:
                item.ids = await self._in_thread(self._space.tokenize, item.text, item.where)
        media = [medium for item in items for medium in item.media]
        encoded = iter(await self._encoder.encode(media, tenant=tenant))
        for item in items:
            if item.media:
                own = [next(encoded) for _ in item.media]
                item.reports = tuple(medium.report for medium in own)
                found = await self._in_thread(self._space.of_encoded, own)
                item.context = contrastive.MediaContext(found.context.cpu(), found.vector)

    async def _vectors(self, items: Sequence[_Item]) -> Tensor:
        vectors = torch.empty(len(items), self.dim)
        for places in _chunks(_texts(items), TEXTS_AT_ONCE):
            rows = [items[place].ids for place in places]
            vectors[places] = await self._in_thread(self._space.of_texts, rows)
        for place, item in enumerate(items):
            if item.context is not None:
                vectors[place] = item.context.vector
        return vectors

    async def _matches(
        self, queries: Sequence[_Item], documents: Sequence[_Item]
    ) -> dict[tuple[int, int], float]:
        """Matching probabilities of the pairs (query, document) that are a text and media."""
        found: dict[tuple[int, int], float] = {}
        for media, texts, flip in ((queries, documents, False), (documents, queries, True)):
            for m, item in enumerate(media):
                if item.context is None:
                    continue
                for places in _chunks(_texts(texts), max(1, CONTEXT_AT_ONCE // item.n_tokens)):
                    rows = [texts[place].ids for place in places]
                    read = self._space.match_logits
                    logits = await self._in_thread(read, rows, item.context.context)
                    for place, match in zip(places, logits.sigmoid().tolist(), strict=True):
                        found[(place, m) if flip else (m, place)] = match
        return found

    async def _in_thread(self, work: Callable[..., T], *given: Any) -> T:
        try:
            future = self._thread.submit(work, *given)
        except RuntimeError as error:  # the executor was shut down
            raise ModelError("similarity is closed") from error
        return await asyncio.wrap_future(future)


def _read(items: Sequence[Item], name: str) -> list[_Item]:
    if not items:
        raise RequestError.at(name, "expected at least one text or medium")
    return [_item(item, f"{name}[{number}]") for number, item in enumerate(items)]


def _item(item: Item, where: str) -> _Item:
    if isinstance(item, str):
        check_text(item, where)
        return _Item(where, item)
    if isinstance(item, MediaFile | Medium):
        return _Item(where, media=(item,))
    media = tuple(part for part in item if not isinstance(part, str))
    if media and len(media) == len(item):
        return _Item(where, media=media)
    reason = "expected a text or at least one medium, got an empty list"
    if media:
        reason = "an item holds both text and media, but one encoder reads text and another "
        reason += "reads media: give the text as an item of its own"
    elif item:
        reason = "a list holds media that are taken together: give each text as an item of its own"
    raise RequestError.at(where, reason)


def _texts(items: Sequence[_Item]) -> list[int]:
    return [place for place, item in enumerate(items) if item.context is None]


def _costs(items: Sequence[_Item]) -> tuple[tuple[int, ...], tuple[MediaReport, ...]]:
    reports = tuple(report for item in items for report in item.reports)
    return tuple(item.n_tokens for item in items), reports


def _chunks(places: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]

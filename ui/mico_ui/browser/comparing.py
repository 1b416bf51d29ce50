"""How well media and sentences go together, each with each, in the encoder's own space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mico_ui.browser.media import Shown
from mico_ui.browser.profile import Profile
from mico_ui.calls import Call
from mico_ui.client import ApiError

MAX_ITEMS = 24

CAUTIONS = {
    "mini": "The mini learned these scores from drawings and sampled sounds. They do not know real "
    "photographs and recordings yet. In a test with 54 photographs and their 52 names, the right "
    "name had the best match for 6 photographs (11 %). With 46 recordings and their 46 names: for "
    "3 recordings (7 %)."
}
"""How far the scores of a model can be trusted, by its name; ``python -m benchmarks.real_media``
measures it."""


class Compared(BaseModel):
    """What is to be compared: ``model`` by name, media by id, and sentences."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: str
    media: tuple[Shown, ...] = Field((), max_length=MAX_ITEMS)
    texts: tuple[str, ...] = Field((), max_length=MAX_ITEMS)


class Grid(BaseModel):
    """``similarity[i][j]`` of items i and j, media first: the cosine of their embeddings.

    ``match[m][t]`` of medium m and text t: the matching head's probability, None without a head.
    """

    model_config = ConfigDict(frozen=True)

    similarity: tuple[tuple[float, ...], ...]
    match: tuple[tuple[float | None, ...], ...]


class _Embedding(BaseModel):
    index: int
    embedding: list[float]


class _Embeddings(BaseModel):
    data: list[_Embedding]


class _Pair(BaseModel):
    query: int
    document: int
    match: float | None


class _Pairs(BaseModel):
    data: list[_Pair]


@dataclass(frozen=True)
class Comparing:
    """Asks the server at ``api``."""

    api: str

    async def compare(self, profile: Profile, compared: Compared) -> Grid:
        """Every item with every item.

        Raises:
            ApiError: for fewer than two items, or when the server refuses.
        """
        media = [_part(shown) for shown in compared.media]
        texts = [text.strip() for text in compared.texts if text.strip()]
        if len(media) + len(texts) < 2:
            raise ApiError(
                "Compare needs at least two: add a file, or write a sentence on each line",
                status=415,
            )
        body = {"model": compared.model, "input": [*media, *texts]}
        async with profile.client(self.api) as client:
            vectors = await client.send(_embeddings(body))
            match: tuple[tuple[float | None, ...], ...] = ()
            if media and texts:
                asked = {"model": compared.model, "queries": media, "documents": texts}
                pairs = await client.send(_score(asked))
                found = {(pair.query, pair.document): pair.match for pair in pairs}
                match = tuple(
                    tuple(found[m, t] for t in range(len(texts))) for m in range(len(media))
                )
        return Grid(
            similarity=tuple(tuple(_dot(one, other) for other in vectors) for one in vectors),
            match=match,
        )


def _part(shown: Shown) -> dict[str, Any]:
    kind = f"{shown.kind}_url"
    return {"type": kind, kind: {"url": f"media:{shown.id}"}}


def _dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _embeddings(body: dict[str, Any]) -> Call[list[list[float]]]:
    """Of /v1/embeddings: vectors of unit length, in the order of ``input``."""
    return Call(
        "POST",
        "/v1/embeddings",
        lambda r: [one.embedding for one in _Embeddings.model_validate_json(r.content).data],
        body=body,
    )


def _score(body: dict[str, Any]) -> Call[list[_Pair]]:
    """Of /v1/score."""
    return Call(
        "POST", "/v1/score", lambda r: _Pairs.model_validate_json(r.content).data, body=body
    )

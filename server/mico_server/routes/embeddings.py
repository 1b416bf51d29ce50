"""POST /v1/embeddings and /v1/score: texts and media in the encoder's contrastive space."""

from __future__ import annotations

import base64
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import LimitError, RequestError
from mico_chat.media.medium import MediaReport
from mico_chat.options import DepthScale
from mico_server.errors import UnsupportedError
from mico_server.fetch.media_reader import MediaReader
from mico_server.host import ModelHost
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import SCHEMAS
from mico_server.service import CurrentClient, Service

if TYPE_CHECKING:
    from mico_chat.similarity import Similarity

router = APIRouter(route_class=JsonRoute)

Items = Annotated[
    str | dict[str, Any] | list[Any], Field(json_schema_extra=SCHEMAS["EmbeddedItems"])
]


class EmbeddingsRequest(BaseModel):
    """OpenAI's request, whose ``input`` may have media too."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    input: Items
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, description="the length of the model's vectors; no other is possible"
    )
    depth_scale: DepthScale = 0.001
    user: str | None = None


class Embedding(BaseModel):
    """A vector of unit length: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class TokenUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, tokens: tuple[int, ...]) -> TokenUsage:
        return cls(prompt_tokens=sum(tokens), total_tokens=sum(tokens))


class EmbeddingList(BaseModel):
    """OpenAI's answer, and ``media``: a report of each medium in the order of the request."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TokenUsage
    media: tuple[MediaReport, ...]


class ScoreRequest(BaseModel):
    """Queries and documents; each query is compared with each document."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    queries: Items
    documents: Items
    depth_scale: DepthScale = 0.001


class PairScore(BaseModel):
    """A query and a document by index.

    ``similarity`` is the cosine of their embeddings. ``match`` is the matching head's probability
    that the text describes the media; it is null if both are texts or both are media.
    """

    object: Literal["score"] = "score"
    query: int
    document: int
    similarity: float
    match: float | None


class ScoreList(BaseModel):
    """The scores of every query with every document."""

    object: Literal["list"] = "list"
    data: list[PairScore]
    model: str
    usage: TokenUsage
    media: tuple[MediaReport, ...]


_ERRORS = error_responses(400, 404, 410, 413, 422, 501, 504)


@router.post("/v1/embeddings", responses=_ERRORS)
async def embeddings(body: EmbeddingsRequest, client: CurrentClient) -> EmbeddingList:
    """Vectors of texts, pictures, sounds, clips, depth and normal maps, comparable by cosine."""
    _check(body, client.service)
    async with AsyncExitStack() as stack:
        host = await client.use(stack, body.model)
        return await client.connected(embed(body, client.service, host, client.tenant))


def _check(body: EmbeddingsRequest, service: Service) -> list[Any]:
    given = _listed(body.input, "input", service)
    if given and all(isinstance(token, int) for token in given):
        raise RequestError.at("input", "token ids are not taken; send the text")
    return given


async def embed(
    body: EmbeddingsRequest, service: Service, host: ModelHost, tenant: str
) -> EmbeddingList:
    """The vectors of a request by a loaded model."""
    given = _check(body, service)
    similarity = _similarity(host)

    async def work() -> EmbeddingList:
        async with service.media.work_folder() as folder:
            reader = MediaReader(service, tenant, folder)
            items = await reader.items(given, "input", body.depth_scale)
            await similarity.ready()
            if body.dimensions not in (None, similarity.dim):
                reason = f"{body.dimensions}, but this model's vectors have {similarity.dim}"
                raise RequestError.at("dimensions", reason)
            found = await similarity.embed(items, tenant=tenant, name="input")
        vectors = found.vectors.tolist()
        if body.encoding_format == "base64":
            vectors = [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in found.vectors]
        data = [Embedding(index=n, embedding=vector) for n, vector in enumerate(vectors)]
        usage = TokenUsage.of(found.tokens)
        return EmbeddingList(data=data, model=body.model, usage=usage, media=found.media)

    return await host.guarded(work())


@router.post("/v1/score", responses=_ERRORS)
async def score(body: ScoreRequest, client: CurrentClient) -> ScoreList:
    """How well each query and each document go together: text with media, or any other pair."""
    queries = _listed(body.queries, "queries", client.service)
    documents = _listed(body.documents, "documents", client.service)

    async def work(similarity: Similarity) -> ScoreList:
        async with client.service.media.work_folder() as folder:
            reader = MediaReader(client.service, client.tenant, folder)
            found = await similarity.score(
                await reader.items(queries, "queries", body.depth_scale),
                await reader.items(documents, "documents", body.depth_scale),
                tenant=client.tenant,
            )
        data = [
            PairScore(query=q, document=d, similarity=pair.similarity, match=pair.match)
            for q, row in enumerate(found.scores)
            for d, pair in enumerate(row)
        ]
        usage = TokenUsage.of(found.tokens)
        return ScoreList(data=data, model=body.model, usage=usage, media=found.media)

    async with AsyncExitStack() as stack:
        host = await client.use(stack, body.model)
        return await client.connected(host.guarded(work(_similarity(host))))


def _similarity(host: ModelHost) -> Similarity:
    assistant = host.assistant
    if assistant.similarity is None:
        raise UnsupportedError(
            f"{assistant.name}: a model without the text branch of pretraining has no embeddings"
        )
    return assistant.similarity


def _listed(given: str | dict[str, Any] | list[Any], name: str, service: Service) -> list[Any]:
    items = given if isinstance(given, list) else [given]
    most = service.settings.max_inputs
    if len(items) > most:
        raise LimitError(
            name, f"{len(items)} items, over the limit of {most} (MICO_SERVER_MAX_INPUTS)"
        )
    return items

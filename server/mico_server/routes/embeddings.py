"""POST /v1/embeddings and /v1/score: texts and media in the encoder's contrastive space."""

from __future__ import annotations

import base64
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import LimitError, MicoError, RequestError
from mico_chat.media.medium import MediaReport
from mico_chat.similarity import Similarity
from mico_server.description import ITEMS
from mico_server.disconnect import while_connected
from mico_server.errors import ModelNotFoundError, error_responses
from mico_server.openai_media import MediaReader
from mico_server.service import CurrentCaller, CurrentService, Service
from mico_server.work_folder import WorkFolder

router = APIRouter()

_ITEMS = (
    "One item or a list of them: a text, a content part (image_url, input_audio, audio_url, "
    "video_url, depth_url, normal_url), or a list of media parts that are taken together."
)


class UnsupportedError(MicoError):
    """The served model cannot do this."""

    status = 501


class EmbeddingsRequest(BaseModel):
    """OpenAI's request, whose ``input`` may have media too."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    input: str | dict[str, Any] | list[Any] = Field(description=_ITEMS, json_schema_extra=ITEMS)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="the model's own, if it is given")
    depth_scale: float = Field(
        0.001, gt=0, le=1000, description="metres for one unit of a 16-bit depth map"
    )
    user: str | None = None


class Embedding(BaseModel):
    """A vector of unit length: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class TokenUsage(BaseModel):
    """Tokens that were encoded."""

    prompt_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, tokens: tuple[int, ...]) -> TokenUsage:
        """Their sum."""
        return cls(prompt_tokens=sum(tokens), total_tokens=sum(tokens))


class EmbeddingList(BaseModel):
    """OpenAI's answer, and ``media``: a report of each medium, in the request's order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: TokenUsage
    media: tuple[MediaReport, ...]


class ScoreRequest(BaseModel):
    """What is to be compared with what."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(examples=["mini"])
    queries: str | dict[str, Any] | list[Any] = Field(description=_ITEMS, json_schema_extra=ITEMS)
    documents: str | dict[str, Any] | list[Any] = Field(description=_ITEMS, json_schema_extra=ITEMS)
    depth_scale: float = Field(
        0.001, gt=0, le=1000, description="metres for one unit of a 16-bit depth map"
    )


class PairScore(BaseModel):
    """A query and a document by index.

    ``similarity`` is the cosine of their embeddings; ``match`` the matching head's probability that
    the text tells of the media, null where both are texts or both are media.
    """

    object: Literal["score"] = "score"
    query: int
    document: int
    similarity: float
    match: float | None


class ScoreList(BaseModel):
    """Every query with every document."""

    object: Literal["list"] = "list"
    data: list[PairScore]
    model: str
    usage: TokenUsage
    media: tuple[MediaReport, ...]


@router.post("/v1/embeddings", responses=error_responses(400, 404, 410, 413, 422, 501, 504))
async def embeddings(
    request: Request, body: EmbeddingsRequest, service: CurrentService, caller: CurrentCaller
) -> EmbeddingList:
    """Vectors of texts, pictures, sounds, clips, depth and normal maps, comparable by cosine."""
    similarity = _similarity(service, body.model)
    if body.dimensions not in (None, similarity.dim):
        raise RequestError.at(
            "dimensions", f"{body.dimensions}, but this model's vectors have {similarity.dim}"
        )
    given = body.input if isinstance(body.input, list) else [body.input]
    if given and all(isinstance(token, int) for token in given):
        raise RequestError.at("input", "token ids are not taken; send the text")
    _check_number(len(given), "input", service)

    async def work() -> EmbeddingList:
        async with WorkFolder(service.media) as folder:
            reader = MediaReader(service, caller.tenant, folder, body.depth_scale)
            found = await similarity.embed(
                await reader.items(given, "input"),
                salt=caller.tenant,
                name="input",
            )
        as_text = body.encoding_format == "base64"
        vectors = [
            base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if as_text
            else vector.tolist()
            for vector in found.vectors
        ]
        data = [Embedding(index=n, embedding=vector) for n, vector in enumerate(vectors)]
        usage = TokenUsage.of(found.tokens)
        return EmbeddingList(data=data, model=body.model, usage=usage, media=found.media)

    return await while_connected(request.receive, service.host.guarded(work()))


@router.post("/v1/score", responses=error_responses(400, 404, 410, 413, 422, 501, 504))
async def score(
    request: Request, body: ScoreRequest, service: CurrentService, caller: CurrentCaller
) -> ScoreList:
    """How well each query and each document go together: text with media, or any other pair."""
    similarity = _similarity(service, body.model)
    queries = body.queries if isinstance(body.queries, list) else [body.queries]
    documents = body.documents if isinstance(body.documents, list) else [body.documents]
    _check_number(len(queries), "queries", service)
    _check_number(len(documents), "documents", service)

    async def work() -> ScoreList:
        async with WorkFolder(service.media) as folder:
            reader = MediaReader(service, caller.tenant, folder, body.depth_scale)
            found = await similarity.score(
                await reader.items(queries, "queries"),
                await reader.items(documents, "documents"),
                salt=caller.tenant,
            )
        data = [
            PairScore(
                query=q,
                document=d,
                similarity=pair.similarity,
                match=pair.match,
            )
            for q, row in enumerate(found.scores)
            for d, pair in enumerate(row)
        ]
        usage = TokenUsage.of(found.tokens)
        return ScoreList(data=data, model=body.model, usage=usage, media=found.media)

    return await while_connected(request.receive, service.host.guarded(work()))


def _similarity(service: Service, model: str) -> Similarity:
    service.host.check()
    assistant = service.host.assistant
    if model != assistant.name:
        raise ModelNotFoundError(f"no model {model!r} here; this server has {assistant.name!r}")
    if assistant.similarity is None:
        raise UnsupportedError(
            f"{assistant.name}: a model without the text branch of pretraining has no embeddings"
        )
    return assistant.similarity


def _check_number(n: int, name: str, service: Service) -> None:
    most = service.settings.max_inputs
    if n > most:
        raise LimitError(name, f"{n} items, over the limit of {most} (MICO_SERVER_MAX_INPUTS)")

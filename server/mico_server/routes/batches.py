"""/v1/files and /v1/batches: requests of a JSONL file, answered in the background."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema
from pydantic_core import core_schema
from starlette.concurrency import run_in_threadpool

from mico_chat.errors import RequestError
from mico_chat.wire import Seconds
from mico_server.batch_runner import Endpoint
from mico_server.dialects import DIALECTS
from mico_server.fetch.media_reader import display_name
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import (
    FILE_SCHEMA,
    Metadata,
    check_known,
    copy,
    open_form,
    request_body,
)
from mico_server.routes.embeddings import EmbeddingList, EmbeddingsRequest, embed
from mico_server.service import CurrentCaller, CurrentClient, CurrentService, Service
from mico_server.store.batches import ENDED, BatchRecord, BatchStatus, Purpose
from mico_server.store.tables import check_text

router = APIRouter(route_class=JsonRoute)


# --- What batches may ask ---


async def _embeddings(body: EmbeddingsRequest, service: Service, tenant: str) -> EmbeddingList:
    async with service.models.use(body.model, tenant) as host:
        return await embed(body, service, host, tenant)


ENDPOINTS: dict[str, Endpoint] = {
    **{dialect.path: Endpoint(dialect.body, dialect.answered) for dialect in DIALECTS},
    "/v1/embeddings": Endpoint(EmbeddingsRequest, _embeddings),
}

BatchEndpoint = Annotated[
    str, GetPydanticSchema(lambda _type, _handler: core_schema.literal_schema([*ENDPOINTS]))
]


# --- Files ---


class FileObject(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: Seconds
    filename: str = Field(validation_alias="name")
    purpose: Purpose
    status: Literal["processed"] = "processed"
    expires_at: None = None


class Page(BaseModel):
    object: Literal["list"] = "list"
    data: list[Any]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, found: list[Any], limit: int) -> Self:
        """The first ``limit`` of the objects that were found."""
        data = found[:limit]
        ids = [one.id for one in data] or [None]
        more = len(found) > limit
        return cls.model_validate(
            {"data": data, "has_more": more, "first_id": ids[0], "last_id": ids[-1]}
        )


class FileList(Page):
    data: list[FileObject]


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


_UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": FILE_SCHEMA, "purpose": {"const": "batch"}},
    "additionalProperties": False,
}


@router.post(
    "/v1/files",
    responses=error_responses(400, 413),
    openapi_extra=request_body({"multipart/form-data": _UPLOAD}),
)
async def upload_file(request: Request, client: CurrentClient) -> FileObject:
    """Store a file of requests, a JSON object a line, for a batch."""
    async with (
        open_form(request, client.service.settings) as form,
        client.service.media.work_folder() as folder,
    ):
        for name, _ in form.multi_items():
            check_known(name, ("file", "purpose"))
        if form.get("purpose") != "batch":
            raise RequestError.at("purpose", "expected 'batch': files are for batches here")
        file = form.get("file")
        if file is None or isinstance(file, str) or len(form.getlist("file")) != 1:
            raise RequestError.at("file", "expected exactly one file")
        if not file.size:
            raise RequestError.at("file", "the upload is empty")
        path = folder.file("upload")
        await run_in_threadpool(copy, file, path)
        named = display_name(file.filename or "") or "upload.jsonl"
        record = await client.service.batches.add_file(client.tenant, named, path)
        return FileObject.model_validate(record)


@router.get("/v1/files", responses=error_responses(400, 404))
async def list_files(
    client: CurrentClient,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: str | None = None,
    purpose: Purpose | None = None,
) -> FileList:
    """Files, the newest first."""
    found = await client.service.batches.files(
        client.tenant, limit=limit + 1, after=after, purpose=purpose
    )
    return FileList.of([FileObject.model_validate(record) for record in found], limit)


@router.get("/v1/files/{file_id}", responses=error_responses(404))
async def get_file(file_id: str, client: CurrentClient) -> FileObject:
    """A file without its content."""
    return FileObject.model_validate(await client.service.batches.file(client.tenant, file_id))


@router.get(
    "/v1/files/{file_id}/content",
    response_class=FileResponse,
    responses={
        200: {
            "content": {"application/jsonl": {"schema": FILE_SCHEMA}},
            "description": "The file.",
        },
        **error_responses(404, 410),
    },
)
async def file_content(file_id: str, client: CurrentClient) -> FileResponse:
    """The file itself."""
    record = await client.service.batches.file(client.tenant, file_id)
    headers = {"content-security-policy": "sandbox", "x-content-type-options": "nosniff"}
    return FileResponse(
        client.service.batches.content(record),
        media_type="application/jsonl",
        filename=record.name,
        headers=headers,
    )


@router.delete("/v1/files/{file_id}", responses=error_responses(404, 409))
async def delete_file(file_id: str, client: CurrentClient) -> FileDeleted:
    """Delete a file that no running batch reads."""
    await client.service.batches.delete_file(client.tenant, file_id)
    return FileDeleted(id=file_id)


# --- Batches ---


class BatchRequest(BaseModel):
    """A line of the file is ``{"custom_id": ..., "method": "POST", "url": the endpoint,
    "body": {...}}``."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: Literal["24h"] = "24h"
    metadata: Metadata | None = None


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchError(BaseModel):
    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchObject(BaseModel):
    """OpenAI's batch. It ends when all is answered: ``completion_window`` is a word of OpenAI's."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: Seconds
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    expires_at: None = None
    expired_at: None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, record: BatchRecord) -> BatchObject:
        ended = record.status in ENDED
        return cls(
            id=record.id,
            endpoint=record.endpoint,
            errors=BatchErrors.model_validate({"data": record.errors}) if record.errors else None,
            input_file_id=record.input_file_id,
            status=record.status,
            output_file_id=record.output_file_id if ended and record.completed else None,
            error_file_id=record.error_file_id if ended and record.failed else None,
            created_at=int(record.created_at.timestamp()),
            request_counts=RequestCounts(
                total=record.total, completed=record.completed, failed=record.failed
            ),
            metadata=record.labels,
            **{name: at for name, at in record.times.items() if name in cls.model_fields},
        )


class BatchList(Page):
    data: list[BatchObject]


@router.post("/v1/batches", responses=error_responses(400, 404, 413))
async def create_batch(body: BatchRequest, client: CurrentClient) -> BatchObject:
    """Answer the requests of a file in the background, behind those of waiting clients."""
    for name, value in (body.metadata or {}).items():
        check_text(name, "metadata")
        check_text(value, f"metadata.{name[:64]}")
    asked = body.endpoint, body.input_file_id, body.metadata
    return BatchObject.of(await client.service.batches.create(client.tenant, *asked))


@router.get("/v1/batches", responses=error_responses(400, 404))
async def list_batches(
    service: CurrentService,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> BatchList:
    """Batches, the newest first; with a key of the scope ``admin`` those of all tenants."""
    found = await service.batches.batches(caller.batches_of, limit=limit + 1, after=after)
    return BatchList.of([BatchObject.of(record) for record in found], limit)


@router.get("/v1/batches/{batch_id}", responses=error_responses(404))
async def get_batch(batch_id: str, service: CurrentService, caller: CurrentCaller) -> BatchObject:
    """How far a batch has come."""
    return BatchObject.of(await service.batches.batch(caller.batches_of, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", responses=error_responses(404, 409))
async def cancel_batch(
    batch_id: str, service: CurrentService, caller: CurrentCaller
) -> BatchObject:
    """End a batch early; what is answered by then stays."""
    return BatchObject.of(await service.batches.cancel(caller.batches_of, batch_id))

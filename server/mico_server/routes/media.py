"""/v1/media: upload once, use by id."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.file import mime_type
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.wire import Deleted, MediaList, MediaObject
from mico_server.disconnect import while_connected
from mico_server.errors import error_responses
from mico_server.media_store import MediaRecord
from mico_server.service import CurrentCaller, CurrentService
from mico_server.settings import MAX_TTL_S
from mico_server.uploads import open_form, request_body, saved, text_of, validated
from mico_server.work_folder import WorkFolder

router = APIRouter()


class MediaFields(BaseModel):
    """Fields of an upload beside its file."""

    model_config = ConfigDict(frozen=True)

    ttl_s: int | None = Field(
        None,
        ge=1,
        le=MAX_TTL_S,
        description="seconds it is kept; a conversation that shows it keeps it longer",
    )
    depth_scale: float = Field(
        0.001, gt=0, le=1000, description="metres for one unit of a 16-bit depth map"
    )


def _shown(record: MediaRecord) -> MediaObject:
    """A record as the API shows it."""
    expires = record.expires_at
    return MediaObject(
        id=record.id,
        kind=record.kind,
        name=record.name,
        bytes=record.bytes,
        sha256=record.sha256,
        created_at=int(record.created_at.timestamp()),
        expires_at=None if expires is None else int(expires.timestamp()),
        report=record.report,
    )


_FILE = {"type": "string", "format": "binary"}


def _schema() -> dict[str, Any]:
    fields = MediaFields.model_json_schema()["properties"]
    return {
        "type": "object",
        "description": "exactly one file of one kind",
        "properties": {**dict.fromkeys(KINDS, _FILE), **fields},
        "oneOf": [{"required": [kind]} for kind in KINDS],
        "additionalProperties": False,
    }


@router.post(
    "/v1/media",
    status_code=201,
    responses=error_responses(400, 413, 422),
    openapi_extra=request_body({"multipart/form-data": _schema()}),
)
async def upload(request: Request, service: CurrentService, caller: CurrentCaller) -> MediaObject:
    """Store a file, in the field of its kind, if it can be decoded."""
    service.host.check()
    async with (
        open_form(request, service.settings) as form,
        WorkFolder(service.media) as folder,
    ):
        parts: list[MediaFile] = []
        texts: dict[str, str] = {}
        for name, value in form.multi_items():
            if name in KINDS and not isinstance(value, str):
                parts.append(await saved(name, value, folder.file(str(len(parts)))))
            else:
                texts[name] = text_of(name, value, (*KINDS, *MediaFields.model_fields))
        if len(parts) != 1 or any(name in KINDS for name in texts):
            raise RequestError(
                f"expected exactly one file, in one of the fields {', '.join(KINDS)}; "
                f"got {len(parts)}"
            )
        fields = validated(MediaFields, texts)
        file = replace(parts[0], depth_scale=fields.depth_scale)
        inspecting = service.host.inspect(file, caller.tenant)
        report = await while_connected(request.receive, inspecting)
        path = file.path
        assert path is not None  # where the upload was written
        record = await service.media.add(
            caller.tenant,
            parts[0].kind,
            path,
            parts[0].name,
            ttl_s=fields.ttl_s or service.settings.media_ttl_s,
            report=report,
        )
    return _shown(record)


@router.get("/v1/media", responses=error_responses(400, 404))
async def list_media(
    service: CurrentService,
    caller: CurrentCaller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
    kind: Kind | None = None,
) -> MediaList:
    """Stored media, the newest first."""
    found = await service.media.list(caller.tenant, limit=limit + 1, after=after, kind=kind)
    data = [_shown(record) for record in found[:limit]]
    return MediaList(data=data, has_more=len(found) > limit)


@router.get("/v1/media/{media_id}", responses=error_responses(404))
async def get_medium(media_id: str, service: CurrentService, caller: CurrentCaller) -> MediaObject:
    """What is known of a stored medium."""
    return _shown(await service.media.get(caller.tenant, media_id))


@router.get(
    "/v1/media/{media_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"*/*": {"schema": _FILE}}, "description": "The file, as uploaded."},
        **error_responses(404, 410),
    },
)
async def content(media_id: str, service: CurrentService, caller: CurrentCaller) -> FileResponse:
    """The file itself."""
    record = await service.media.get(caller.tenant, media_id)
    path = service.media.path(record)
    with path.open("rb") as file:
        kind = mime_type(record.kind, file.read(64))
    # Nothing in an uploaded file is ever run by a browser that opens this address.
    headers = {"content-security-policy": "sandbox", "x-content-type-options": "nosniff"}
    return FileResponse(path, media_type=kind, filename=record.name, headers=headers)


@router.delete("/v1/media/{media_id}", responses=error_responses(404, 409))
async def delete_medium(media_id: str, service: CurrentService, caller: CurrentCaller) -> Deleted:
    """Forget a medium that no conversation shows."""
    await service.media.delete(caller.tenant, media_id)
    return Deleted(id=media_id)

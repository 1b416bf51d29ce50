"""/v1/teach: names of one's own things, taught by a few pictures or sounds, at once."""

import base64
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import RequestError
from mico_chat.media.taught import features_of
from mico_chat.wire import Deleted, TaughtList, TaughtObject
from mico_server.dialects.chat import read_fields
from mico_server.fetch.media_reader import MediaReader
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.routes.bodies import FILE_SCHEMA, SCHEMAS, request_body, validated
from mico_server.service import CurrentClient
from mico_server.store.taught import Record, checked_name

router = APIRouter(route_class=JsonRoute)

_KINDS = ("image", "audio")


class NewName(BaseModel):
    """What is taught: a name, and for an answer that it corrects the turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str | None = Field(None, description="a served model; by default the first")
    conversation_id: str | None = Field(None, description="the conversation of a wrong answer")
    turn: int | None = Field(None, description="the turn with the wrong answer")


def _schema(media: dict[str, Any]) -> dict[str, Any]:
    fields = NewName.model_json_schema()
    return {**fields, "properties": {**fields["properties"], **dict.fromkeys(_KINDS, media)}}


_URLS = {"anyOf": [SCHEMAS["ChatUrl"], {"type": "array", "items": SCHEMAS["ChatUrl"]}]}
_BODIES = {
    "multipart/form-data": _schema({"type": "array", "items": FILE_SCHEMA}),
    "application/json": _schema(_URLS),
}


def _object(row: Record, *, features: bool = False) -> TaughtObject:
    held = base64.b64encode(row["features"]).decode() if features else None
    return TaughtObject.model_validate({**row, "features": held})


@router.post(
    "/v1/teach",
    status_code=201,
    responses=error_responses(400, 404, 413, 422, 504),
    openapi_extra=request_body(_BODIES),
)
async def teach(request: Request, client: CurrentClient) -> TaughtObject:
    """Teach a name by 1 to 5 pictures, or as many sounds: files, `media:ID`, or data URIs.

    A name that is known already gets more examples. The model says it from the next answer on.
    """
    service = client.service
    service.models.check(client.tenant)
    async with service.media.work_folder() as folder, AsyncExitStack() as stack:
        reader = MediaReader(service, client.tenant, folder)
        media, values = await read_fields(request, reader, (*_KINDS, *NewName.model_fields))
        fields = validated(NewName, values)
        corrected = None
        if fields.conversation_id is not None:
            found = await service.conversations.load(
                client.tenant, fields.conversation_id, fields.turn
            )
            corrected = {"conversation_id": found.id, "turn": fields.turn}
        host = await client.use(stack, fields.model)
        work = host.assistant.taught(checked_name(fields.name), media, client.tenant)
        name = await client.connected(host.guarded(work))
        space = host.assistant.space or ""
        return _object(await service.taught.add(client.tenant, name, host.name, space, corrected))


@router.get("/v1/teach", responses=error_responses(400))
async def list_taught(
    client: CurrentClient,
    features: Annotated[bool, Query(description="with what PUT needs to import them")] = False,
) -> TaughtList:
    """The names that are taught, to list or to export them."""
    rows = await client.service.taught.all(client.tenant)
    return TaughtList(data=tuple(_object(row, features=features) for row in rows))


@router.put("/v1/teach", responses=error_responses(400, 404, 413, 504))
async def import_taught(
    body: TaughtList, client: CurrentClient, model: str | None = None
) -> TaughtList:
    """Import names that were exported for the same model; a known name gets more examples."""
    async with AsyncExitStack() as stack:
        host = await client.use(stack, model)
        names = []
        for at, one in enumerate(body.data):
            if one.space != host.assistant.space:
                reason = f"{one.name!r} was taught to {one.model} and means nothing to {host.name}"
                raise RequestError.at(f"data[{at}]", f"{reason}: teach it again")
            try:
                data = base64.b64decode(one.features or "", validate=True)
                values = features_of(data, one.examples)
            except ValueError as error:
                reason = f"expected base64 of float32 numbers for {one.examples} examples"
                raise RequestError.at(f"data[{at}].features", reason) from error
            name = checked_name(one.name)
            names.append(await host.assistant.retaught(name, one.kind, values, client.tenant))
    add = client.service.taught.add
    rows = [await add(client.tenant, name, host.name, one.space) for name in names]
    return TaughtList(data=tuple(map(_object, rows)))


@router.patch("/v1/teach/{taught_id}", responses=error_responses(400, 404))
async def rename_taught(taught_id: str, body: NewName, client: CurrentClient) -> TaughtObject:
    """Give a taught thing another name."""
    async with AsyncExitStack() as stack:
        host = await client.use(stack, body.model)
        name = checked_name(body.name)
        ids = await host.assistant.ids_of(name, client.tenant)
    return _object(await client.service.taught.rename(client.tenant, taught_id, name, ids))


@router.delete("/v1/teach/{taught_id}", responses=error_responses(404))
async def forget_taught(taught_id: str, client: CurrentClient) -> Deleted:
    """Forget a name at once, with its examples."""
    await client.service.taught.forget(client.tenant, taught_id)
    return Deleted(id=taught_id)

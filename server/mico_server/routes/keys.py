"""``/v1/keys``: keys made, listed and revoked over HTTP, with a key of the scope ``admin``."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from mico_server.auth import KeyScope
from mico_server.errors import error_responses
from mico_server.keys import Key
from mico_server.service import CurrentService

router = APIRouter(tags=["keys"])


class KeyRequest(BaseModel):
    """A key to be made; see ``mico-chat keys create``."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(description="whose key it is; for the list")]
    tenant: Annotated[
        str | None, Field(description="whose media and conversations it has; its own if not set")
    ] = None
    rate_limit: Annotated[str | None, Field(description="such as 60/minute")] = None
    scopes: Annotated[list[KeyScope], Field(min_length=1)] = ["chat"]


class KeyObject(BaseModel):
    """A key without its secret."""

    id: str
    object: Literal["key"] = "key"
    name: str
    tenant: str
    scopes: list[str]
    rate_limit: str | None
    created_at: datetime
    revoked_at: datetime | None

    @classmethod
    def values_of(cls, key: Key) -> dict[str, Any]:
        return {**vars(key), "scopes": sorted(key.scopes)}


class NewKeyObject(KeyObject):
    """A key that was just made; ``secret`` cannot be had again."""

    secret: str


class KeyList(BaseModel):
    """All keys, the oldest first, revoked ones too."""

    object: Literal["list"] = "list"
    data: list[KeyObject]


@router.post("/v1/keys", status_code=201, responses=error_responses(400))
async def create_key(body: KeyRequest, service: CurrentService) -> NewKeyObject:
    """Make a key."""
    secret, key = await service.keys.create(body.name, body.tenant, body.rate_limit, body.scopes)
    return NewKeyObject(**KeyObject.values_of(key), secret=secret)


@router.get("/v1/keys")
async def list_keys(service: CurrentService) -> KeyList:
    """List all keys."""
    found = await service.keys.list()
    return KeyList(data=[KeyObject(**KeyObject.values_of(key)) for key in found])


@router.delete("/v1/keys/{key_id}", responses=error_responses(404))
async def revoke_key(key_id: str, service: CurrentService) -> KeyObject:
    """End a key at once; it stays in the list."""
    return KeyObject(**KeyObject.values_of(await service.keys.revoke(key_id)))

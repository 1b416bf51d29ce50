"""The service itself: whether it answers, its models, its figures, its keys, its first page."""

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mico_chat.wire import Architecture, Live, ModelInfo, ModelList, Ready
from mico_server.host import ModelHost
from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.service import CurrentService, Service
from mico_server.store.keys import KeyScope

router = APIRouter(route_class=JsonRoute)

_STARTED = int(time.time())


@router.get("/health/live", responses=error_responses(503))
async def live(service: CurrentService) -> Live:
    """Whether the process works, so that it need not be started again."""
    service.models.check_alive()
    return Live()


@router.get("/health/ready", responses=error_responses(503))
async def ready(service: CurrentService) -> Ready:
    """Whether the service answers: its first model has been loaded."""
    service.models.check_ready()
    return Ready(model=service.models.named(None).name)


def _info(host: ModelHost, service: Service) -> ModelInfo:
    if host.loaded is not None:
        host.see()
    return ModelInfo(
        id=host.name,
        created=_STARTED,
        modalities=host.reads,
        architecture=Architecture.reading(host.reads),
        status=host.status(),
        max_media=service.settings.max_media,
        root=host.source.name if host.lora is None else str(host.lora.folder),
        parent=None if host.base is None else host.base.name,
        **host.facts,
    )


@router.get("/v1/models")
async def models(service: CurrentService) -> ModelList:
    """The served models, the default first, each before its adapters."""
    service.models.check_ready()
    return ModelList(data=[_info(view, service) for view in service.models.views])


@router.get("/v1/models/{model:path}", responses=error_responses(404))
async def model(model: str, service: CurrentService) -> ModelInfo:
    """One model."""
    service.models.check_ready()
    return _info(service.models.named(model), service)


@router.get("/metrics", response_class=Response)
async def metrics(service: CurrentService) -> Response:
    """Counts and times in Prometheus's text format."""
    return service.models.metrics.response()


# --- Keys, for a key of the scope ``admin`` ---


class KeyRequest(BaseModel):
    """A key to be made; see ``mico-chat keys create``."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(description="whose key it is; for the list")]
    tenant: Annotated[
        str | None, Field(description="whose media and conversations it has; its own if not set")
    ] = None
    rate_limit: Annotated[str | None, Field(description="such as 60/minute")] = None
    scopes: Annotated[list[KeyScope], Field(min_length=1, fail_fast=True)] = ["chat"]


class KeyObject(BaseModel):
    """A key without its secret."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    object: Literal["key"] = "key"
    name: str
    tenant: str
    scopes: Annotated[list[str], BeforeValidator(sorted)]
    rate_limit: str | None
    created_at: datetime
    revoked_at: datetime | None


class NewKeyObject(KeyObject):
    """A key that was just made; its ``secret`` is shown this once."""

    secret: str


class KeyList(BaseModel):
    """All keys, the oldest first, revoked ones too."""

    object: Literal["list"] = "list"
    data: list[KeyObject]


@router.post("/v1/keys", tags=["keys"], status_code=201, responses=error_responses(400))
async def create_key(body: KeyRequest, service: CurrentService) -> NewKeyObject:
    """Make a key."""
    secret, key = await service.keys.create(body.name, body.tenant, body.rate_limit, body.scopes)
    return NewKeyObject.model_validate({**vars(key), "secret": secret})


@router.get("/v1/keys", tags=["keys"])
async def list_keys(service: CurrentService) -> KeyList:
    """List all keys."""
    return KeyList(data=[KeyObject.model_validate(key) for key in await service.keys.list()])


@router.delete("/v1/keys/{key_id}", tags=["keys"], responses=error_responses(404))
async def revoke_key(key_id: str, service: CurrentService) -> KeyObject:
    """End a key at once; it stays in the list."""
    return KeyObject.model_validate(await service.keys.revoke(key_id))


@router.get("/", include_in_schema=False)
async def welcome() -> HTMLResponse:
    return HTMLResponse(Path(__file__).with_name("welcome.html").read_text("utf-8"))

"""Adapters that come and go while the service runs, by vLLM's two routes, for ``admin``."""

from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from mico_server.http.errors import error_responses
from mico_server.http.json_body import JsonRoute
from mico_server.service import CurrentService

router = APIRouter(route_class=JsonRoute, tags=["adapters"])

_SAYS: dict[int | str, Any] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadRequest(BaseModel):
    """A LoRA adapter: its name, and its folder on the server or its name on the hub."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: Annotated[bool, Field(description="in place of one of the same name")] = False


class UnloadRequest(BaseModel):
    """An adapter that goes; vLLM's number of it has no meaning here."""

    model_config = ConfigDict(extra="forbid")

    lora_name: Name
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter", responses=_SAYS | error_responses(400, 404, 507))
async def load_lora_adapter(body: LoadRequest, service: CurrentService) -> PlainTextResponse:
    """Serve an adapter as a model of its own."""
    await service.models.load_lora(body.lora_name, body.lora_path, in_place=body.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=_SAYS | error_responses(400, 404))
async def unload_lora_adapter(body: UnloadRequest, service: CurrentService) -> PlainTextResponse:
    """Serve an adapter no more; answers that have begun with it end with it."""
    service.models.unload_lora(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

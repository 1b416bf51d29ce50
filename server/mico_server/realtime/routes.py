"""/v1/realtime: speech, pictures and text in and out over a WebSocket, in OpenAI's protocol."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, WebSocket
from pydantic import BaseModel, ConfigDict, Field

from mico_chat.errors import MicoError
from mico_chat.fields import check_one_of
from mico_chat.speech.events import Session, new_id
from mico_server.errors import NotFoundError
from mico_server.fetch.media_reader import MediaReader
from mico_server.http.auth import Caller
from mico_server.http.errors import error_responses, mico_error_response
from mico_server.http.json_body import JsonRoute
from mico_server.realtime.session import RealtimeSession, configured
from mico_server.realtime.stored import StoredChat
from mico_server.service import Client, CurrentCaller, CurrentService, Service

router = APIRouter(route_class=JsonRoute, tags=["realtime"])


def _is_alias(model: str | None) -> bool:
    """Whether a client names one of OpenAI's models: it gets the service's first one."""
    return model is None or model.startswith("gpt-realtime")


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, Field(ge=10, le=7200)] = 600


class SecretRequest(BaseModel):
    """How long a secret is to last, and the sessions that it opens."""

    model_config = ConfigDict(extra="forbid")

    expires_after: ExpiresAfter = ExpiresAfter()
    session: dict[str, Any] = {}


class ClientSecret(BaseModel):
    """A secret for a browser, in place of a key; it opens sessions of /v1/realtime alone."""

    value: str
    expires_at: int
    session: Session


def _session(given: dict[str, Any], model: str | None, service: Service) -> Session:
    """A new session with the fields that are ``given``."""
    named = service.models.named(None if _is_alias(model) else model).name
    lasts = int(time.time() + service.settings.realtime_session_s)
    return configured(Session(id=new_id("sess"), model=named, expires_at=lasts), given)


@router.post("/v1/realtime/client_secrets", responses=error_responses(400, 404))
async def client_secret(
    body: SecretRequest, request: Request, service: CurrentService, caller: CurrentCaller
) -> ClientSecret:
    """Make a secret that opens sessions of /v1/realtime for a while, for whoever may not see a key.

    This server alone knows it, until it ends.
    """
    session = _session(body.session, body.session.get("model"), service)
    expires_at = int(time.time()) + body.expires_after.seconds
    value = service.secrets.make(caller, expires_at, {**body.session, "model": session.model})
    return ClientSecret(value=value, expires_at=expires_at, session=session)


@router.websocket("/v1/realtime")
async def realtime(
    socket: WebSocket,
    model: str | None = None,
    conversation: str | None = None,
    store_media: str = "true",
) -> None:
    """Talk with the service; see docs/serving.md.

    The turns stand in a stored ``conversation``, or in a "new" one, with the recordings and
    pictures unless ``store_media`` is "false".
    """
    service: Service = socket.app.state.service
    caller: Caller = socket.scope["state"]["caller"]
    given: dict[str, Any] = socket.scope["state"].get("session", {})

    async def valid() -> bool:
        if caller.key_id is None:
            return True
        try:
            return (await service.keys.get(caller.key_id)).revoked_at is None
        except NotFoundError:
            return False

    client, chat = Client(service, caller.tenant), None
    async with AsyncExitStack() as stack:
        try:
            service.models.check(caller.tenant)
            config = _session(given, given.get("model") or model, service)
            check_one_of(store_media, ("true", "false"), "store_media")
            if conversation is not None:
                media = store_media == "true"
                chat = await StoredChat.opened(client, conversation, media=media)
            stack.enter_context(service.sessions.entered())
        except MicoError as error:
            await socket.send_denial_response(mico_error_response(error))
            return
        offered = socket.scope.get("subprotocols", [])
        await socket.accept("realtime" if "realtime" in offered else None)

        async def reader() -> MediaReader:  # with a folder for each item: names are the same
            folder = await stack.enter_async_context(service.media.work_folder())
            return MediaReader(service, caller.tenant, folder)

        await RealtimeSession(socket, client, reader, config, caller, valid, chat).run()

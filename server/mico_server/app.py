"""The FastAPI application: its parts, and the order in which a request passes through them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from mico_chat import __version__
from mico_chat.assistant import Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MicoError
from mico_chat.media import MediaLimits
from mico_chat.wire import DeltaEvent, MediaEvent
from mico_server.fetch.fetcher import Fetcher
from mico_server.http.auth import Auth, OriginGuard, cors_options, is_loopback
from mico_server.http.errors import add_error_handlers, error_responses
from mico_server.http.limits import BodyLimit, RateLimit, counters
from mico_server.http.request_log import RequestLog
from mico_server.routes import about, chat, completions, embeddings, stored
from mico_server.routes.chat_request import schema_of
from mico_server.service import ModelHost, Service
from mico_server.settings import ServerSettings
from mico_server.store.conversations import ConversationStore
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from mico_server.store.media import MediaStore

logger = logging.getLogger(__name__)

DRAIN_S = 5.0
"""Seconds in which cancelled requests may store the text that they have."""


def create_app(
    load: Callable[[], Assistant],
    settings: ServerSettings | None = None,
    *,
    on_ready: Callable[[], None] | None = None,
    on_failed: Callable[[Exception], None] | None = None,
    local_secret: str | None = None,
) -> FastAPI:
    """The application. ``load`` makes the assistant once the application has started; then
    ``on_ready`` or ``on_failed`` is called. A request with ``local_secret`` needs no key.
    """
    settings = settings or ServerSettings()

    def loaded() -> Assistant:
        assistant = load()
        if settings.default_max_tokens is not None:
            asked = GenerationOptions(max_tokens=settings.default_max_tokens)
            assistant.defaults = asked.over(assistant.defaults)
        return assistant

    host = ModelHost(
        loaded,
        max_requests=settings.max_requests,
        timeout_s=settings.request_timeout_s,
        on_ready=on_ready,
        on_failed=on_failed,
    )
    database = Database(settings.database_url, settings.data_dir)
    keys = KeyStore(database)
    counting = counters(settings.rate_limit_store, database)
    media_store = MediaStore(database, settings.media_folder)
    fetcher = None
    if settings.allow_urls:
        fetcher = Fetcher(
            timeout_s=settings.url_timeout_s,
            max_bytes=MediaLimits().max_bytes,
            max_redirects=settings.max_redirects,
            hosts=settings.url_hosts,
        )
    conversations = ConversationStore(database, media_store)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await database.start()
        tasks = [asyncio.create_task(host.run()), asyncio.create_task(_sweep(media_store))]
        try:
            yield
        finally:
            if not await running.ended(DRAIN_S):
                logger.warning("cancelled requests have not ended after %g s", DRAIN_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if fetcher is not None:
                fetcher.close()
            await counting.close()
            await database.close()

    app = FastAPIOffline(
        title="MiCo-Chat",
        version=__version__,
        description="Chat about images, sounds, video clips, depth maps and surface normals.",
        lifespan=lifespan,
        responses=error_responses(401, 403, 408, 429, 500, 503),
    )
    app.openapi = functools.partial(described, app.openapi)  # type: ignore[method-assign]
    app.state.service = Service(settings, host, keys, media_store, conversations, fetcher)
    add_error_handlers(app)
    for routes in (chat, completions, stored, embeddings, about):
        app.include_router(routes.router)
    # A request passes the middleware that is added last first.
    loopback = is_loopback(settings.host)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_json_bytes=settings.max_json_bytes,
        timeout_s=settings.body_timeout_s,
    )
    app.add_middleware(RateLimit, default=settings.rate_limit, counters=counting)
    app.add_middleware(OriginGuard, loopback=loopback, cors_origins=settings.cors_origins)
    app.add_middleware(
        Auth,
        keys=keys,
        required=settings.require_keys or not (loopback or settings.insecure),
        insecure=settings.insecure,
        local_secret=local_secret,
    )
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.cors_origins))
    # Outside of the framework's own handler of crashes, so that those are logged with their id.
    app.middleware_stack = running = RequestLog(app.build_middleware_stack(), host.metrics)
    return app


async def _sweep(store: MediaStore) -> None:
    while True:
        try:
            logger.debug("swept: %s", await store.sweep())
        except MicoError as error:  # the database does not answer; the next sweep tries again
            logger.warning("not swept: %s", error)
        await asyncio.sleep(600)


def described(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's description with the keys and the events, and for a request that does not fit a
    route's types this service's 400 instead of FastAPI's 422.
    """
    schema = describe()
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}, {}]  # a service on loopback may need none
    schemas = schema["components"]["schemas"]
    for event in (MediaEvent, DeltaEvent):
        schemas[event.__name__] = schema_of(event, "serialization")
    if schemas.pop("HTTPValidationError", None) is None:  # a later call: all is done
        return schema
    del schemas["ValidationError"]
    error = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
    invalid = {"description": "Bad Request", "content": {"application/json": error}}
    for path in schema["paths"].values():
        for operation in path.values():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]
                responses.setdefault("400", invalid)
    return schema

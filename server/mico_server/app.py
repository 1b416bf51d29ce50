"""The FastAPI application: what it is made of, and in which order a request passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from mico_chat import __version__
from mico_chat.assistant import Assistant
from mico_chat.engine import GenerationOptions
from mico_chat.errors import MicoError
from mico_chat.media import MediaLimits
from mico_server.addresses import is_loopback
from mico_server.auth import Auth
from mico_server.body_limit import BodyLimit
from mico_server.conversations import ConversationStore
from mico_server.database import Database
from mico_server.description import DescribedApi
from mico_server.draining import Draining
from mico_server.errors import add_error_handlers, error_responses
from mico_server.fetch import Fetcher
from mico_server.keys import KeyStore
from mico_server.media_store import MediaStore
from mico_server.metrics import CountRequests, Metrics
from mico_server.model_host import ModelHost
from mico_server.origins import OriginGuard, cors_options
from mico_server.rate_limit import RateLimit, counters
from mico_server.request_log import RequestLog
from mico_server.routes import (
    chat,
    completions,
    conversations,
    embeddings,
    estimate,
    health,
    media,
    pages,
)
from mico_server.routes import keys as key_routes
from mico_server.service import Service
from mico_server.settings import ServerSettings

logger = logging.getLogger(__name__)

ROUTES = (
    *(chat, completions, conversations, media, embeddings, estimate, key_routes, health),
    pages,
)
"""In the order of the description."""

SWEEP_S = 600.0
"""Seconds between two looks for media that have expired."""

DRAIN_S = 5.0
"""Seconds in which requests that were cut may keep what was said."""


def create_app(
    load: Callable[[], Assistant],
    settings: ServerSettings | None = None,
    *,
    on_ready: Callable[[], None] | None = None,
    on_failed: Callable[[Exception], None] | None = None,
    local_secret: str | None = None,
) -> FastAPI:
    """The application. ``load`` makes the assistant once the application has started.

    ``on_ready`` or ``on_failed`` is called when the model is loaded, or cannot be.
    ``local_secret`` is shared with the program that started the service: it needs no key.
    """
    settings = settings or ServerSettings()
    metrics = Metrics(lambda: host.engine_stats(), lambda: host.cache_stats())
    host = ModelHost(
        lambda: _with_settings(load(), settings),
        metrics,
        max_requests=settings.max_requests,
        timeout_s=settings.request_timeout_s,
        on_ready=on_ready,
        on_failed=on_failed,
    )
    database = Database(settings.database_url, settings.data_dir)
    keys = KeyStore(database)
    counting = counters(settings.rate_limit_store, database)
    media_store = MediaStore(database, settings.media_folder)
    fetcher = _fetcher(settings)
    service = Service(
        settings=settings,
        host=host,
        keys=keys,
        media=media_store,
        conversations=ConversationStore(database, media_store),
        metrics=metrics,
        fetcher=fetcher,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await database.start()
        tasks = [asyncio.create_task(host.run()), asyncio.create_task(_sweep(media_store))]
        try:
            yield
        finally:
            if not await draining.drained(DRAIN_S):
                logger.warning("requests that were cut have not ended after %g s", DRAIN_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if fetcher is not None:
                fetcher.close()
            await counting.close()
            await database.close()

    app = DescribedApi(
        title="MiCo-Chat",
        version=__version__,
        description="Chat about images, sounds, video clips, depth maps and surface normals.",
        lifespan=lifespan,
        docs_url=None,  # routes/pages.py has them
        redoc_url=None,
        responses=error_responses(401, 403, 408, 429, 500, 503),
    )
    app.state.service = service
    add_error_handlers(app)
    for routes in ROUTES:
        app.include_router(routes.router)
    # The last one added is the first that a request meets.
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
    app.add_middleware(CountRequests, metrics=metrics)
    # Outside of the framework's own handler of crashes, so that those are logged with their id.
    app.middleware_stack = draining = Draining(RequestLog(app.build_middleware_stack()))
    return app


def _with_settings(assistant: Assistant, settings: ServerSettings) -> Assistant:
    if settings.default_max_tokens is not None:
        asked = GenerationOptions(max_tokens=settings.default_max_tokens)
        assistant.defaults = asked.over(assistant.defaults)
    return assistant


def _fetcher(settings: ServerSettings) -> Fetcher | None:
    if not settings.allow_urls:
        return None
    return Fetcher(
        timeout_s=settings.url_timeout_s,
        max_bytes=MediaLimits().max_bytes,
        max_redirects=settings.max_redirects,
        hosts=settings.url_hosts,
    )


async def _sweep(store: MediaStore) -> None:
    """Remove what has expired, every few minutes, as long as the service runs."""
    while True:
        try:
            swept = await store.sweep()
            logger.debug("swept: %s", swept)
        except MicoError as error:  # the database is away: the next time will do
            logger.warning("not swept: %s", error)
        await asyncio.sleep(SWEEP_S)

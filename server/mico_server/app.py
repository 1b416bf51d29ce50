"""``mico-chat serve``: the FastAPI application, the order in which a request passes through its
parts, and the process around it."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from mico_chat import __version__
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.folders import model_name
from mico_chat.engines.base import OFFERED
from mico_chat.errors import ConfigError, MicoError
from mico_chat.load import (
    EngineOptions,
    asked_quantization,
    input_modalities,
    load_assistant,
    lora_of,
    needed_bytes,
    usable_bytes,
)
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.options import GenerationOptions
from mico_chat.settings import Settings
from mico_chat.system import give_back_memory
from mico_chat.wire import DeltaEvent, MediaEvent, Progress
from mico_server.batch_runner import BatchRunner
from mico_server.dialects import DIALECTS, chat
from mico_server.fetch.fetcher import Fetcher
from mico_server.host import ModelSource
from mico_server.http.auth import Auth, OriginGuard, check_binding, cors_options, is_loopback
from mico_server.http.errors import add_error_handlers, error_responses
from mico_server.http.limits import BodyLimit, RateLimit, Sessions, count, counters, left
from mico_server.http.protocol import allow_open_files, bounded_protocol
from mico_server.http.request_log import RequestLog, configure_logging
from mico_server.models import Models
from mico_server.realtime import routes as realtime
from mico_server.routes import (
    about,
    adapters,
    batches,
    embeddings,
    estimate,
    preferences,
    speech,
    stored,
    teach,
    tokens,
    transcriptions,
)
from mico_server.routes.bodies import schema_of
from mico_server.service import Service
from mico_server.settings import ServerSettings
from mico_server.store.batches import BatchStore
from mico_server.store.conversations import ConversationStore
from mico_server.store.database import Database
from mico_server.store.keys import History, KeyStore
from mico_server.store.media import MediaStore
from mico_server.store.quota import Quota
from mico_server.store.taught import TaughtStore
from mico_server.watchdog import Watchdog

logger = logging.getLogger(__name__)

DRAIN_S = 4.0
"""Seconds in which cancelled requests may store the text that they have."""

GIVE_BACK_S = 60.0
"""Seconds from one giving back of free memory to the next. glibc keeps what a thread has freed for
that thread: without this an hour of load rose by 150 MB."""


def create_app(
    sources: Sequence[ModelSource],
    settings: ServerSettings,
    *,
    on_ready: Callable[[], None] = lambda: None,
    on_failed: Callable[[Exception], None] = lambda error: None,
    local_secret: str | None = None,
) -> FastAPI:
    """The application. The first of ``sources`` is loaded once the application has started; then
    ``on_ready`` or ``on_failed`` is called. A request with ``local_secret`` needs no key.
    """

    database = Database(settings.database_url, settings.data_dir)
    taught = TaughtStore(database)
    models = _models(sources, settings, on_ready, on_failed, taught)
    keys = KeyStore(database)
    counting = counters(settings.rate_limit_store, database)
    quota = Quota(settings.max_stored_bytes, settings.max_stored_files)
    media_store = MediaStore(database, settings.media_folder, quota)
    fetcher = None
    if settings.allow_urls:
        fetcher = Fetcher.of(settings)
    conversations = ConversationStore(database, media_store)
    batch_store = BatchStore(database, settings.media_folder / "uploads", quota)
    sessions = Sessions(settings.max_realtime_sessions)
    service = Service(
        *(settings, models, keys, media_store, conversations, batch_store, fetcher, taught),
        *(sessions, functools.partial(count, counting, settings.rate_limit)),
        functools.partial(left, counting, settings.rate_limit),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await database.start()
        runner = BatchRunner(service, batches.ENDPOINTS)
        works = (models.run(), _sweep(media_store), _give_back(), runner.run())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            yield
        finally:
            if not await running.ended(DRAIN_S):
                logger.warning("cancelled requests have not ended after %g s", DRAIN_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            service.voices.close()  # FastAPI's caches keep an app for as long as the process runs
            if fetcher is not None:
                fetcher.close()
            await counting.close()
            await database.close()

    app = FastAPIOffline(
        title="MiCo-Chat",
        version=__version__,
        description="Chat about images, sounds, video clips, depth maps and surface normals.",
        lifespan=lifespan,
        responses=error_responses(401, 403, 408, 429, 500, 503, 507),
    )
    app.state.service = service
    _add_routes(app)
    # A request passes the middleware that is added last first.
    loopback = is_loopback(settings.host)
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(RateLimit, default=settings.rate_limit, counters=counting)
    app.add_middleware(OriginGuard, loopback=loopback, cors_origins=settings.cors_origins)
    app.add_middleware(
        Auth,
        keys=keys,
        required=settings.require_keys or not (loopback or settings.insecure),
        insecure=settings.insecure,
        local_secret=local_secret,
        loopback=loopback,
        adopt=History(database, settings.media_folder).adopt,
        secrets=service.secrets,
    )
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **cors_options(settings.cors_origins))
    # Outside of the framework's own handler of crashes, so that those are logged with their id.
    app.middleware_stack = running = RequestLog(app.build_middleware_stack(), models.metrics)
    return app


def _models(
    sources: Sequence[ModelSource],
    settings: ServerSettings,
    on_ready: Callable[[], None],
    on_failed: Callable[[Exception], None],
    taught: TaughtStore,
) -> Models:
    def loaded(source: ModelSource) -> Assistant:
        assistant = source.load()
        assistant.engine.prepare()
        assistant.say(taught.names)
        if settings.default_max_tokens is not None:
            asked = GenerationOptions(max_tokens=settings.default_max_tokens)
            assistant.defaults = asked.over(assistant.defaults)
        return assistant

    models = Models(
        [replace(source, load=functools.partial(loaded, source)) for source in sources],
        max_requests=settings.max_requests,
        timeout_s=settings.request_timeout_s,
        max_step_s=settings.max_step_s,
        max_bytes=settings.max_models_bytes,
        keep_alive_s=settings.keep_alive_s,
        on_ready=on_ready,
        on_failed=on_failed,
    )
    for adapter in settings.adapter:
        models.declare(adapter)
    return models


def _add_routes(app: FastAPI) -> None:
    app.openapi = functools.partial(described, app.openapi)  # type: ignore[method-assign]
    forms = {
        path: dialect.error_form
        for dialect in DIALECTS
        if dialect.error_form is not None
        for path in (dialect.path, *dialect.more_paths)
    }
    add_error_handlers(app, forms)
    for router in (chat.router, *(dialect.router for dialect in DIALECTS)):
        app.include_router(router)
    kept = (batches, stored, preferences, teach)
    for routes in (
        estimate,
        tokens,
        *kept,
        embeddings,
        transcriptions,
        speech,
        realtime,
        adapters,
        about,
    ):
        app.include_router(routes.router)


async def _sweep(store: MediaStore) -> None:
    while True:
        try:
            logger.debug("%d expired media were removed", await store.sweep())
        except MicoError as error:  # the database does not answer; the next sweep tries again
            logger.warning("not swept: %s", error)
        await asyncio.sleep(600)


async def _give_back() -> None:
    while True:
        await asyncio.sleep(GIVE_BACK_S)
        await asyncio.to_thread(give_back_memory)


def described(describe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's description with the keys and the events, and for a request that does not fit a
    route's types this service's 400 instead of FastAPI's 422.
    """
    schema = describe()
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"key": []}, {}]  # a service on loopback may need none
    schemas = schema["components"]["schemas"]
    for event in (MediaEvent, DeltaEvent, Progress):
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


# --- The process ---


def main(
    settings: ServerSettings, announce: Callable[[str], None], local_secret: str | None = None
) -> None:
    """``mico-chat serve``; ``announce`` gets each line for the user.

    A page or terminal chat that starts the service gives it ``local_secret``. Settings can be
    printed, so it is none.
    """
    configure_logging(settings.log_level, settings.log_format)
    quantization = asked_quantization(
        settings.quantization, settings.load_in_4bit, settings.load_in_8bit
    )
    depth = Settings().depth_model
    # Twice: beside one tenant's media there is a process for another tenant's.
    with MediaDecoder(MediaLimits(), workers=2 * settings.decoder_workers) as decoder:
        options = EngineOptions(
            settings.engine,
            quantization,
            settings.dtype,
            settings.device,
            max_running=settings.max_running,
            prefer=settings.prefer,
            max_media=settings.max_media,
            media_token_budget=settings.media_token_budget,
            context_cache_bytes=settings.context_cache_bytes,
            arguments=settings.engine_arguments,
            trust_remote_code=settings.trust_remote_code,
            mmproj=settings.mmproj,
            depth_model=OFFERED if depth is None else depth or None,
        )
        names = settings.model or (Settings().model,)
        if settings.max_models_bytes is None and len(names) > 1:
            settings = settings.model_copy(update={"max_models_bytes": usable_bytes(options)})

        def renew(reason: str) -> None:
            logger.critical("%s; the service starts anew", reason)
            decoder.close()
            if local_secret is not None or settings.port == 0:
                os._exit(1)  # whoever started it knows the secret and the port, and starts it again
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

        serve(
            [_source(name, decoder, options) for name in distinct(names)],
            announce=announce,
            settings=settings,
            local_secret=local_secret,
            renew=renew,
        )


def distinct(names: Sequence[str]) -> Sequence[str]:
    """The names; an error if two models would be served under the same one."""
    served = [model_name(name) for name in names]
    if twice := next((name for name in served if served.count(name) > 1), None):
        raise ConfigError(
            f"model: two would be served as {twice!r}; rename one of the folders, or leave it out"
        )
    return names


def _source(name: str, decoder: MediaDecoder, options: EngineOptions) -> ModelSource:
    return ModelSource(
        model_name(name),
        load=functools.partial(load_assistant, name, decoder, options),
        needs=functools.partial(needed_bytes, name, options),
        reads=functools.partial(input_modalities, name, options.mmproj),
        lora=functools.partial(lora_of, name, options.mmproj),
    )


def serve(
    sources: Sequence[ModelSource],
    *,
    announce: Callable[[str], None],
    settings: ServerSettings,
    local_secret: str | None = None,
    renew: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted. ``announce`` gets one line once the model answers.

    The address is bound first, so that a port in use is reported before minutes of loading. After
    SIGTERM or SIGINT running requests may end within ``shutdown_timeout_s``; after SIGTERM this
    function returns normally. An error of loading the first model is raised. ``renew`` starts the
    process anew, for a reason; with it a :class:`Watchdog` ends what does not come on.
    """
    check_binding(settings.host, settings.insecure, asyncio.run(_has_keys(settings)))
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        bound = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}; "
            "try another --port"
        ) from error
    allow_open_files(settings.max_connections)
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{address}:{bound.getsockname()[1]}"
    failures: list[Exception] = []

    def on_failed(error: Exception) -> None:
        failures.append(error)
        stop()

    app = create_app(
        sources,
        settings,
        on_ready=lambda: announce(f"mico-chat is ready at {url}"),
        on_failed=on_failed,
        local_secret=local_secret,
    )
    watchdog = None
    if renew is not None:
        models = app.state.service.models
        watchdog = Watchdog(
            models, max_step_s=settings.max_step_s, renew=renew, end=lambda: os._exit(1)
        )
    server = _Server(
        watchdog,
        uvicorn.Config(
            app,
            http=bounded_protocol(settings),
            log_config=None,  # set up by the caller
            access_log=False,  # RequestLog's is better
            server_header=False,
            timeout_graceful_shutdown=settings.shutdown_timeout_s,
        ),
    )

    def stop(*_: object) -> None:
        server.handle_exit(signal.SIGTERM, None)

    # For a SIGTERM before uvicorn listens to it, and for the one that uvicorn raises when it ends.
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with bound:
            server.run(sockets=[bound])
    finally:
        signal.signal(signal.SIGTERM, before)
    if failures:
        raise failures[0]


class _Server(uvicorn.Server):
    """Tells the watchdog that the event loop works, and when the process is to end."""

    def __init__(self, watchdog: Watchdog | None, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._watchdog = watchdog
        if watchdog is not None:
            watchdog.start()

    async def on_tick(self, counter: int) -> bool:
        if self._watchdog is not None:
            self._watchdog.beat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service: Service = cast(FastAPI, self.config.app).state.service
        service.ending.set()
        await service.sessions.ended(DRAIN_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._watchdog is not None:
            self._watchdog.end_within((self.config.timeout_graceful_shutdown or 0) + DRAIN_S)
        super().handle_exit(sig, frame)


async def _has_keys(settings: ServerSettings) -> bool:
    database = Database(settings.database_url, settings.data_dir)
    await database.start()
    try:
        return await KeyStore(database).any()
    finally:
        await database.close()

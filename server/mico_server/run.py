"""``mico-chat serve``: bind the address, load the model, serve."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from mico_chat.assistant import Assistant
from mico_chat.errors import ConfigError
from mico_chat.load import EngineOptions, asked_quantization, load_assistant
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.settings import Settings
from mico_server.app import create_app
from mico_server.http.auth import check_binding
from mico_server.http.request_log import configure_logging
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore


def main(settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """``mico-chat serve``; ``announce`` gets each line for the user."""
    configure_logging(settings.log_level, settings.log_format)
    # A page or terminal chat that starts the service gives it this secret. Settings can be printed,
    # so it is none; it is removed before processes start that decode other people's files.
    local_secret = os.environ.pop("MICO_LOCAL_SECRET", None)
    quantization = asked_quantization(
        settings.quantization, settings.load_in_4bit, settings.load_in_8bit
    )
    with MediaDecoder(MediaLimits(), workers=settings.decoder_workers) as decoder:
        options = EngineOptions(
            settings.engine,
            quantization,
            settings.dtype,
            settings.device,
            max_running=settings.max_running,
            context_cache_bytes=settings.context_cache_bytes,
            arguments=settings.engine_arguments,
        )
        model = settings.model or Settings().model
        serve(
            lambda: load_assistant(model, decoder, options),
            announce=announce,
            settings=settings,
            local_secret=local_secret,
        )


def serve(
    load: Callable[[], Assistant],
    *,
    announce: Callable[[str], None],
    settings: ServerSettings,
    local_secret: str | None = None,
) -> None:
    """Serve until interrupted. ``announce`` gets one line once the model answers.

    The address is bound first, so that a port in use is reported before minutes of loading. After
    SIGTERM or SIGINT running requests may end within ``shutdown_timeout_s``; after SIGTERM this
    function returns normally. An error of loading the model is raised.
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
    address = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{address}:{bound.getsockname()[1]}"
    failures: list[Exception] = []

    def on_failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        load,
        settings,
        on_ready=lambda: announce(f"mico-chat is ready at {url}"),
        on_failed=on_failed,
        local_secret=local_secret,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # set up by the caller
            access_log=False,  # RequestLog's is better
            server_header=False,
            timeout_graceful_shutdown=settings.shutdown_timeout_s,
        )
    )

    def stop(*_: object) -> None:
        server.should_exit = True

    with bound, _on_sigterm(stop):
        server.run(sockets=[bound])
    if failures:
        raise failures[0]


@contextmanager
def _on_sigterm(stop: Callable[..., None]) -> Iterator[None]:
    """Calls ``stop`` for a SIGTERM before uvicorn listens to it, and for the SIGTERM that uvicorn
    raises again when it ends."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


async def _has_keys(settings: ServerSettings) -> bool:
    database = Database(settings.database_url, settings.data_dir)
    await database.start()
    try:
        return await KeyStore(database).any()
    finally:
        await database.close()

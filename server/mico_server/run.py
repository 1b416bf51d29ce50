"""Bind, load, serve: what ``mico-chat serve`` does."""

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
from mico_server.auth import check_binding
from mico_server.database import Database
from mico_server.keys import KeyStore
from mico_server.rate_limit import check_store
from mico_server.request_log import configure_logging
from mico_server.settings import ServerSettings

LOCAL_SECRET_VARIABLE = "MICO_LOCAL_SECRET"
"""By which a page or terminal chat hands a secret to the service that it starts: its own requests
need no key then. Not a setting, which a command line or a printed configuration could show."""


def main(settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """``mico-chat serve``; ``announce`` gets what is for the user.

    Raises:
        ConfigError: for settings that make no sense, or an address that cannot be bound.
        Exception: what loading the model raised.
    """
    configure_logging(settings.log_level, settings.log_format)
    # Taken away before the processes start that decode strangers' files.
    local_secret = os.environ.pop(LOCAL_SECRET_VARIABLE, None)
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

    The address is bound first: a port in use is said before minutes of loading, and
    ``/health/ready`` can be asked while the model loads. After SIGTERM or SIGINT no request is
    taken any more, and those that run may end within ``shutdown_timeout_s``. After SIGTERM this
    returns like any function that has done its work.

    Raises:
        ConfigError: when the address cannot be bound, or must not be without a key, or when
            what the service needs beside its model does not answer.
        Exception: what loading the model raised.
    """
    check_store(settings.rate_limit_store)
    check_binding(settings.host, settings.insecure, asyncio.run(_has_keys(settings)))
    bound = _bind(settings.host, settings.port)
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
    """Before uvicorn listens to the signal, and when it raises it again at its own end."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
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


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; try another --port"
        ) from error

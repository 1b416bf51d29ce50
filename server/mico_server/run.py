"""Bind, load, serve: what ``mico-chat serve`` does."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from mico_chat.assistant import Assistant
from mico_chat.errors import ConfigError
from mico_server.app import create_app
from mico_server.settings import ServerSettings


def serve(
    load: Callable[[], Assistant],
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
    settings: ServerSettings | None = None,
) -> None:
    """Serve until interrupted. ``announce`` gets one line once the model answers.

    The address is bound first: a port in use is said before minutes of loading, and
    ``/health/ready`` can be asked while the model loads.

    Raises:
        ConfigError: when the address cannot be bound.
        Exception: what loading the model raised.
    """
    bound = _bind(host, port)
    address = f"[{host}]" if ":" in host else host
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
    )
    # Logging is the caller's to set up.
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with bound:
        server.run(sockets=[bound])
    if failures:
        raise failures[0]


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; try another --port"
        ) from error

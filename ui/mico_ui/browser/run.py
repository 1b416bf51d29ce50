"""Serve the page: what ``mico-chat ui`` does, alone or with a server beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import uvicorn

from mico_chat.errors import ConfigError
from mico_ui.client import ApiError
from mico_ui.local_server import tied_to_us

STOP_S = 40.0
"""Seconds that the server may take to end its last answers."""


def main(api: str, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page for the server at ``api`` until interrupted. ``announce`` is told where.

    Raises:
        ConfigError: for an address that makes no sense, or that cannot be bound.
    """
    with tempfile.TemporaryDirectory(prefix="mico-ui-") as folder, _bound(host, port) as listening:
        # Gradio reads these when its components are made: a cache of our own that ends with us, and
        # nothing sent to anybody.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from mico_ui.browser.app import create_app

        try:
            app = create_app(api)
        except ApiError as error:
            raise ConfigError(str(error)) from error
        shown = f"[{host}]" if ":" in host else host
        announce(f"chat at http://{shown}:{listening.getsockname()[1]} (server: {api})")
        if host not in ("127.0.0.1", "::1", "localhost"):
            announce("note: everybody who reaches this address can use the server through it")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        config.timeout_graceful_shutdown = 3  # pages keep a connection open for as long as they are
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            announce("ended")
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; try another --port"
        ) from error
    with listening:
        yield listening


class ServerAddress(Protocol):
    """Where a server listens: its settings, as far as they matter here."""

    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


def local_url(server: ServerAddress) -> str:
    """Where a server of this machine is reached.

    Raises:
        ConfigError: for any free port, which only the server would know.
    """
    if server.port == 0:
        raise ConfigError("port 0 is any free one, but the page must know the server's port")
    # What listens on every address is reached on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


@contextmanager
def server_beside(arguments: Sequence[str]) -> Iterator[int]:
    """``mico-chat serve`` as a child process, for as long as the block runs.

    Gives its process id. When the server ends first, for example because its port is taken, the
    block is interrupted.

    Raises:
        ConfigError: when the server ended by itself.
    """
    # A session of its own: Ctrl-C is for us, and we end it when the page has ended.
    child = subprocess.Popen(
        tied_to_us("serve", *arguments), stdin=subprocess.PIPE, start_new_session=True
    )
    ended = False

    def on_child(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended and child.poll() is not None:
            ended = True
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGCHLD, on_child)
    try:
        yield child.pid
    except KeyboardInterrupt:
        if not ended:
            raise
    finally:
        signal.signal(signal.SIGCHLD, before)
        _end(child)
    if ended:
        raise ConfigError(
            f"the server ended with status {child.returncode}, for the reason above; "
            "--api-port takes another port, --api a server that runs already"
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()

"""Serve the page: what ``mico-chat ui`` does, alone or with a server beside it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any, Protocol

import uvicorn

from mico_chat.errors import ConfigError
from mico_ui import calls
from mico_ui.browser.profile import Access
from mico_ui.client import ApiError, Client, is_local
from mico_ui.local_server import KeptRunning, environment, tied_to_us

START_S = 60.0
"""Seconds that a server may take to listen; its model may take longer."""

STOP_S = 40.0
"""Seconds that the server may take to end its last answers."""


def main(
    api: str,
    host: str,
    port: int,
    announce: Callable[[str], None],
    *,
    insecure: bool = False,
    secret: str | None = None,
) -> None:
    """Serve the page for the server at ``api`` until interrupted. ``announce`` is told where.

    ``secret`` is taken by a server of our own in the place of a key (:func:`server_beside`). A
    page that other machines reach does not use it, and has the server ask for keys, unless it is
    ``insecure``.

    Raises:
        ConfigError: for an address that makes no sense, or that cannot be bound, and for one that
            other machines reach although the server asks for no key, unless that is ``insecure``.
    """
    with tempfile.TemporaryDirectory(prefix="mico-ui-") as folder, _bound(host, port) as listening:
        try:
            shared = not is_local(host)
            if shared and not insecure:
                _check_keys(api, host)
            access = Access(None if shared else secret, require_key=shared and not insecure)
            # Gradio reads these when its components are made: a cache of our own that ends with us,
            # and nothing sent to anybody.
            os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
            from mico_ui.browser.app import create_app

            app = create_app(api, access)
        except ApiError as error:
            raise ConfigError(str(error)) from error
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        config.timeout_graceful_shutdown = 3  # pages keep a connection open for as long as they are
        server = uvicorn.Server(config)

        def end(number: int, frame: FrameType | None) -> None:
            server.should_exit = True  # an exception could be lost in what happens to run

        before = signal.signal(signal.SIGTERM, end)
        try:
            announce(f"chat at http://{shown}:{listening.getsockname()[1]} (server: {api})")
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
        announce("ended")


def _check_keys(api: str, host: str) -> None:
    """The page reaches what is bound to this machine alone, and may not make it everybody's."""
    until = time.monotonic() + START_S
    with Client(api) as client:
        while True:
            try:
                client.send(calls.models())
            except ApiError as error:
                if error.status == HTTPStatus.UNAUTHORIZED:
                    return
                if error.status is None:  # not there yet: it may be starting beside the page
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.2)
                    continue
            raise ConfigError(
                f"other machines can reach {host or 'every address'}, and the server asks for no "
                "API key: make one with `mico-chat keys create NAME`, or let anyone in with "
                "--insecure"
            )


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
def server_beside(
    arguments: Sequence[str],
    announce: Callable[[str], None] = lambda line: None,
    secret: str | None = None,
) -> Iterator[int]:
    """``mico-chat serve`` as a child process, for as long as the block runs.

    Gives its process id. A server that dies is started again, of which ``announce`` is told. The
    block is interrupted when the server cannot start, for example because its port is taken, or
    dies too often (:class:`KeptRunning`). A request that sends ``secret`` needs no key.

    Raises:
        ConfigError: when the server has ended for good.
    """

    def start() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is for us, and we end it when the page has ended.
        command = tied_to_us("serve", *arguments)
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True, env=environment(secret)
        )

    # What a script starts in its background ignores interrupts, and would not hear of the end.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    kept = KeptRunning(
        start, announce=announce, on_left=lambda: os.kill(os.getpid(), signal.SIGINT)
    )
    try:
        yield kept.process.pid
    except KeyboardInterrupt:
        if kept.left is None:
            raise
    finally:
        signal.signal(signal.SIGINT, interrupt)
        _end(kept.release())
    if kept.left is not None:
        raise ConfigError(
            f"{kept.left}, for the reason above; --api-port takes another port, --api a server "
            "that runs already"
        )


def _end(child: subprocess.Popen[Any]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()

"""``mico-chat ui``: the page's process."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Collection
from http import HTTPStatus
from types import FrameType

import uvicorn

from mico_chat.errors import ConfigError
from mico_chat.late import late
from mico_ui import routes
from mico_ui.browser.visitor import Access
from mico_ui.client import ApiError, Client, is_local

# Gradio reads settings of the environment when it is imported.
with late():
    from mico_ui.browser import app as browser_app

START_S = 60.0  # a server may take this time to listen; its model may take longer
IDLE_S = 75  # a connection is kept so long between two requests, as by the server


def main(
    api: str,
    host: str,
    port: int,
    announce: Callable[[str], None],
    *,
    insecure: bool = False,
    secret: str | None = None,
    origins: Collection[str] = (),
) -> None:
    """Serve the page for the server at ``api`` until interrupted; ``announce`` gets its address.

    A server that was started beside the page takes ``secret`` in the place of a key. A page that
    other machines can reach does not use the secret, and its visitors need keys of the server,
    unless the page is ``insecure``: then each browser has its own chats. Else all browsers of this
    machine have the same.
    """
    with tempfile.TemporaryDirectory(prefix="mico-ui-") as folder, _bound(host, port) as listening:
        try:
            shared = not is_local(host)
            if shared and not insecure:
                _check_keys(api, host)
            secret = None if shared else secret
            access = Access(secret, require_key=shared and not insecure, home=not shared)
            # Gradio reads these when it makes components: the folder of its cache, which is removed
            # at the end, and that it must send no statistics to anybody.
            os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
            app = browser_app.create_app(api, access, loopback=not shared, origins=origins)
        except ApiError as error:
            raise ConfigError(str(error)) from error
        shown = f"[{host}]" if ":" in host else host
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        config.ws = "websockets-sansio"  # as the server's
        config.timeout_keep_alive = IDLE_S
        config.timeout_graceful_shutdown = 3  # pages keep a connection open for as long as they are
        server = uvicorn.Server(config)

        def end(number: int, frame: FrameType | None) -> None:
            server.should_exit = True  # another package could swallow an exception

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
    until = time.monotonic() + START_S
    with Client(api) as client:
        while True:
            try:
                client.send(routes.models())
                break
            except ApiError as error:
                if error.status == HTTPStatus.UNAUTHORIZED:
                    return
                if error.status is not None:
                    break
                if time.monotonic() > until:  # the server had time to start
                    raise
            time.sleep(0.2)
    raise ConfigError(
        f"other machines can reach {host or 'every address'}, and the server asks for no API key: "
        "make one with `mico-chat keys create NAME`, or let anyone in with --insecure"
    )


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = f"{error.strerror or error}; try another --port"
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from error

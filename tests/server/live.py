"""An application behind a uvicorn server on a free port of its own."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import httpx
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


@contextmanager
def live(app: ASGIApp, *, lifespan: Literal["on", "off"] = "off") -> Iterator[httpx.Client]:
    """A client of the application, which runs until the end of the block."""
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan=lifespan)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            while not server.started:
                time.sleep(0.01)
            yield client
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


class Echo:
    """An application that reads its body and tells what reached it, its caller above all."""

    def __init__(self) -> None:
        self.requests = 0
        self.read = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        body = await Request(scope, receive).body()
        self.read += len(body)
        caller = scope.get("state", {}).get("caller")
        shown = caller and {**vars(caller), "scopes": sorted(caller.scopes)}
        told = {"path": scope["path"], "body": len(body), "caller": shown}
        await JSONResponse(told)(scope, receive, send)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def exchange(client: httpx.Client, *pieces: bytes) -> tuple[int, dict[str, str], str]:
    """What a server answers to raw bytes, until it closes: status, headers and the error's code."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.settimeout(20)
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split(" ")[1]), headers, json.loads(body)["error"]["code"]

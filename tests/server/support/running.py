"""Applications over real HTTP: a uvicorn server on a free port, in a thread of this process."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import uvicorn
from openai import OpenAI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.assistant import Assistant
from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.http.protocol import bounded_protocol
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from tests.support.waiting import PATIENCE_S, until


@contextmanager
def live(
    app: ASGIApp, *, lifespan: Literal["on", "off"] = "off", settings: ServerSettings | None = None
) -> Iterator[httpx.Client]:
    """A client of the application, which runs until the end of the block.

    With settings its connections are bounded as those of a service.
    """
    bound = socket.create_server(("127.0.0.1", 0))
    http = "auto" if settings is None else bounded_protocol(settings)
    config = uvicorn.Config(app, http=http, log_config=None, access_log=False, lifespan=lifespan)
    config.timeout_keep_alive = PATIENCE_S  # a connection that waits for a busy client is kept
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            until(lambda: server.started, thread.is_alive)
            yield client
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@contextmanager
def running(
    load: Callable[[], Assistant], settings: ServerSettings, *, ready: bool = True
) -> Iterator[httpx.Client]:
    """A client of a service, by default once its model is loaded."""
    app = create_app([ModelSource("fake", load)], settings)
    with live(app, lifespan="on", settings=settings) as client:
        if ready:
            wait_until_ready(client)
        yield client


def wait_until_ready(client: httpx.Client) -> None:
    until(lambda: client.get("/health/ready").status_code == 200)


def events_of(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def new_key(data_dir: Path, name: str, **options: Any) -> str:
    async def create() -> str:
        database = Database(None, data_dir)
        await database.start()
        secret, _ = await KeyStore(database).create(name, **options)
        await database.close()
        return secret

    return asyncio.run(create())


def revoke_keys(data_dir: Path) -> None:
    async def revoke() -> None:
        database = Database(None, data_dir)
        await database.start()
        store = KeyStore(database)
        for key in await store.list():
            await store.revoke(key.id)
        await database.close()

    asyncio.run(revoke())


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


def exchange(client: httpx.Client, *pieces: bytes) -> httpx.Response:
    """What a server answers to raw bytes, until it closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.settimeout(PATIENCE_S)
        for piece in pieces:
            connection.sendall(piece)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(status.split(" ")[1]), headers=headers, content=body)


@contextmanager
def openai_to(
    assistant: Assistant, folder: Path, key: str = "none", **settings: Any
) -> Iterator[OpenAI]:
    """OpenAI's client, and a service of an assistant that it talks to."""
    with (
        running(lambda: assistant, ServerSettings(data_dir=folder, **settings)) as http,
        OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client

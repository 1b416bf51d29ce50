"""The service over real HTTP: a uvicorn server on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from mico_chat.assistant import Assistant
from mico_server.app import create_app
from mico_server.database import Database
from mico_server.keys import KeyStore
from mico_server.settings import ServerSettings


@contextmanager
def running(load: Callable[[], Assistant], settings: ServerSettings) -> Iterator[httpx.Client]:
    """A client of a service that has started, perhaps without its model."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(load, settings), log_config=None))
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


def wait_until_ready(client: httpx.Client) -> None:
    """Wait for the model."""
    for _ in range(500):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.01)
    pytest.fail("not ready in 5 s")


def events_of(text: str) -> list[tuple[str, Any]]:
    """Name and data of each server-sent event of a whole stream."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which must be in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def new_key(data_dir: Path, name: str, **options: str) -> str:
    """The secret of a new API key of the service whose data are there."""

    async def create() -> str:
        database = Database(None, data_dir)
        await database.start()
        secret, _ = await KeyStore(database).create(name, **options)
        await database.close()
        return secret

    return asyncio.run(create())

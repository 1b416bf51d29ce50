"""The service over real HTTP: a uvicorn server on a free port, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mico_chat.assistant import Assistant
from mico_server.app import create_app
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from tests.server.live import live


@contextmanager
def running(load: Callable[[], Assistant], settings: ServerSettings) -> Iterator[httpx.Client]:
    with live(create_app(load, settings), lifespan="on") as client:
        yield client


def wait_until_ready(client: httpx.Client) -> None:
    for _ in range(6000):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.01)
    pytest.fail("not ready in 60 s")


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

"""Both databases, and the stores on them, for the tests of what is kept."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mico_server.conversations import ConversationStore
from mico_server.database import Database
from mico_server.keys import KeyStore
from mico_server.media_store import MediaStore
from tests.server.postgres import Postgres, binaries


@pytest.fixture
def anyio_backend() -> str:
    """What an async test runs on; it says so by ``pytest.mark.anyio``."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; without its package the test is skipped, but not in CI."""
    found = binaries()
    if found is None:
        reason = "PostgreSQL is not installed (Debian's package postgresql)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    server = Postgres(found)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database's URL; the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'store.db'}"
    url: str = request.getfixturevalue("postgres").new_database()
    return url


@pytest.fixture
async def database(database_url: str, tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(database_url, tmp_path / "data")
    await database.start()
    yield database
    await database.close()


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


@pytest.fixture
def media(database: Database, tmp_path: Path) -> MediaStore:
    return MediaStore(database, tmp_path / "media")


@pytest.fixture
def conversations(database: Database, media: MediaStore) -> ConversationStore:
    return ConversationStore(database, media)

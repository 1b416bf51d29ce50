"""Services, with a fake assistant and with the mini; both databases, and the stores on them."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from mico_chat.cli.main import main
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from tests.server.support.postgres import Postgres, binaries
from tests.server.support.running import running
from tests.server.support.served import Served, served
from tests.server.support.stored import Stores
from tests.support.fakes import FakeAssistant
from tests.support.vllm_here import FLAGS

Start = Callable[..., httpx.Client]
Run = Callable[..., tuple[str, str]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a service with an assistant and settings; what it keeps is in ``tmp_path/data``."""
    with ExitStack() as stack:

        def start_one(assistant: FakeAssistant, **settings: Any) -> httpx.Client:
            asked = ServerSettings(data_dir=tmp_path / "data", **settings)
            return stack.enter_context(running(lambda: assistant, asked))

        yield start_one


@pytest.fixture
def client(start: Start) -> httpx.Client:
    """A service whose assistant is a stand-in."""
    return start(FakeAssistant())


@pytest.fixture(scope="module")
def service(base_llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The real one with the shipped mini, of few requests at once and short JSON bodies.

    With ``MICO_TEST_ENGINE=vllm`` it runs on vLLM, as ``make test-vllm`` has it.
    """
    folder = tmp_path_factory.mktemp("served")
    engine = {"": (), "vllm": FLAGS}[os.environ.get("MICO_TEST_ENGINE", "")]
    with served(folder, "--max-requests", "2", "--max-json-bytes", "1000000", *engine) as one:
        yield one


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


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: SQLite, or with the mark BOTH once on each kind."""
    if getattr(request, "param", "sqlite") == "sqlite":
        return f"sqlite:///{tmp_path / 'data' / 'store.db'}"
    url: str = request.getfixturevalue("postgres").new_database()
    return url


BOTH = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
"""For a test of behaviour in which the databases differ: locks, types, errors, comparisons."""

POSTGRES = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


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
def stores(database: Database, tmp_path: Path) -> Stores:
    return Stores(database, tmp_path / "media")


@pytest.fixture
def keys_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs ``mico-chat keys`` on ``tmp_path/data``; gives its output and errors."""
    monkeypatch.setattr("mico_chat.cli.main._quiet_libraries", lambda: None)
    monkeypatch.setenv("MICO_SERVER_DATA_DIR", str(tmp_path / "data"))

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["keys", *arguments])
        assert (ended.value.code or 0) == status
        return capsys.readouterr()

    return run

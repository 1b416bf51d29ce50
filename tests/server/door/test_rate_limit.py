"""So many requests of each key, no more, and when to come back."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from limits.aio.storage import MemoryStorage
from starlette.types import ASGIApp

from mico_chat.errors import ConfigError, MissingExtraError
from mico_server.http.auth import Auth
from mico_server.http.limits import RateLimit, StoredCounters, counters, parsed_limits
from mico_server.settings import ServerSettings
from mico_server.store.database import Database
from tests.server.door.test_auth import FakeKeys, bearer, fake_key
from tests.server.support.running import Echo, error_of, live, new_key, running
from tests.support.fakes import FakeAssistant
from tests.ui.live import free_port


def limited(default: str | None = None, echo: Echo | None = None, **own: str | None) -> ASGIApp:
    """Keys of these names with limits of their ``own``; ``local`` is the machine itself."""
    keys = {
        name: fake_key(f"key-{name}", "tenant", limit, "chat", "metrics")
        for name, limit in {"alice": None, **own}.items()
    }
    limit = RateLimit(echo or Echo(), StoredCounters(MemoryStorage()), default)
    return Auth(limit, FakeKeys(**keys), required=False, local_secret="local")


def statuses(client: httpx.Client, name: str, n: int, path: str = "/v1/chat") -> list[int]:
    return [client.get(path, headers=bearer(name)).status_code for _ in range(n)]


def test_a_keys_own_limit_goes_first() -> None:
    with live(limited("3/minute", alice="5/minute", bob="1/hour", eve="0/minute", carol=None)) as c:
        assert statuses(c, "eve", 2) == [429, 429]
        assert statuses(c, "alice", 6) == [200] * 5 + [429]
        assert statuses(c, "bob", 2) == [200, 429]
        assert statuses(c, "carol", 4) == [200] * 3 + [429]


class Clock:
    """The time of day, which passes when a test says so."""

    now = 1_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", lambda: clock.now)

    async def nothing(storage: MemoryStorage) -> None:
        """The storage clears itself beside the requests, sooner or later than they ask."""

    monkeypatch.setattr(MemoryStorage, "_MemoryStorage__expire_events", nothing)
    return clock


def test_no_limit_for_the_machine_itself_nor_without_one() -> None:
    with live(limited("1/minute")) as client:
        assert statuses(client, "local", 5) == [200] * 5
        assert statuses(client, "alice", 3, "/metrics") == [200] * 3
        assert statuses(client, "alice", 2) == [200, 429]
    with live(limited()) as client:
        assert statuses(client, "alice", 5) == [200] * 5


def test_the_answer_says_when_to_come_back(clock: Clock) -> None:
    echo = Echo()
    with live(limited("2/minute", echo)) as client:
        assert statuses(client, "alice", 1) == [200]
        clock.now += 18.5
        assert statuses(client, "alice", 1) == [200]
        response = client.post("/v1/chat", headers=bearer("alice"), content=b"x" * 100)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "42"  # 41.5 in whole seconds
        assert "(2 per 1 minute): try again in 42 s" in error["message"]
        assert echo.read == 0
        clock.now += 41
        assert statuses(client, "alice", 1) == [429]
        clock.now += 1
        assert statuses(client, "alice", 2) == [200, 429]


def test_several_limits_and_the_least_wait(clock: Clock) -> None:
    with live(limited(alice="2/second; 3/minute")) as client:
        assert statuses(client, "alice", 3) == [200, 200, 429]
        clock.now += 1.1
        assert statuses(client, "alice", 2) == [200, 429]
    with live(limited("1/second")) as client:
        assert statuses(client, "alice", 1) == [200]
        clock.now += 1.0  # to the instant: to come back at once is never said
        response = client.get("/a", headers=bearer("alice"))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")


@pytest.mark.parametrize("text", ["", "fast", "60", "60/fortnight", "-1/minute", "1/minute; x"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rate limit; write one like '60/minute'"):
        RateLimit(Echo(), StoredCounters(MemoryStorage()), text)


# --- counted together by several servers ---


class Redis:
    """A Redis server of the tests' own."""

    def __init__(self, folder: Path) -> None:
        self.url = f"redis://127.0.0.1:{free_port()}"
        self._command = ["redis-server", "--port", self.url.rpartition(":")[2], "--save", ""]
        self._folder = folder
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, cwd=self._folder, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert any("Ready to accept connections" in line for line in self._process.stdout)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        reason = "Redis is not installed (Debian's package redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    server = Redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture(params=["postgres", "redis"])
def shared(request: pytest.FixtureRequest) -> tuple[str | None, str | None]:
    """The URLs of a database and of a store of counts, one of which several servers share."""
    server = request.getfixturevalue(request.param)
    return (None, server.url) if request.param == "redis" else (server.new_database(), None)


@pytest.mark.anyio
async def test_servers_let_in_together_what_one_does(
    shared: tuple[str | None, str | None], tmp_path: Path
) -> None:
    url, store = shared
    databases = [Database(url, tmp_path) for _ in range(3)]
    counted = [counters(store, database) for database in databases]
    for database in databases:
        await database.start()
    (minute,) = parsed_limits("5/minute")
    waits = await asyncio.gather(*(one.hit(minute, "key-1") for one in counted * 8))
    assert waits.count(None) == 5
    assert all(wait is None or 50 < wait <= 60 for wait in waits)
    assert await counted[0].hit(minute, "key-2") is None, "each key by itself"
    for key, remaining in (("key-1", 0), ("key-2", 4), ("key-3", 5)):
        found, reset_s = await counted[1].left(minute, key)
        assert (found, 50 < reset_s <= 60) == (remaining, True)
    (none,) = parsed_limits("0/minute")
    assert await counted[0].hit(none, "key-1") is not None
    for one in (*counted, *databases):
        await one.close()


@pytest.mark.anyio
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_where_it_is_counted(database_url: str, redis: Redis, tmp_path: Path) -> None:
    """By default together where the database is shared, and else in memory, as asked for."""
    shared = Database(database_url, tmp_path)
    own = Database(None, tmp_path)
    await shared.start()
    (limit,) = parsed_limits("1/minute")

    async def together(store: str | None, database: Database) -> bool:
        one, other = counters(store, database), counters(store, database)
        key = f"key-{store}-{database.is_sqlite}"
        assert await one.hit(limit, key) is None
        refused = await other.hit(limit, key) is not None
        await one.close()
        await other.close()
        return refused

    assert await together(None, shared)
    assert not await together("memory", shared)
    assert await together(redis.url, shared)
    assert not await together(None, own)
    assert await together(redis.url, own)
    await shared.close()


def test_without_the_counters_those_with_a_limit_are_refused(redis: Redis, tmp_path: Path) -> None:
    settings = ServerSettings(data_dir=tmp_path / "data", rate_limit_store=redis.url)
    limited = {"authorization": f"Bearer {new_key(settings.data_dir, 'a', rate_limit='5/minute')}"}
    free = {"authorization": f"Bearer {new_key(settings.data_dir, 'b')}"}

    with running(FakeAssistant, settings) as client:

        def ask(headers: dict[str, str]) -> httpx.Response:
            return client.get("/v1/conversations", headers=headers)

        assert ask(limited).status_code == 200
        redis.stop()
        response = ask(limited)
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable_error")
        assert "cannot be counted now" in error_of(response)["message"]
        assert ask(free).status_code == 200
        redis.start()
        found = [ask(limited).status_code for _ in range(6)]
        assert found == [200] * 5 + [429], "and then go on, from nothing"


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("", "''.*redis://host:6379"),
        ("postgresql://u:s3cret@h/x", "expected memory, or a Redis"),
        ("redis://u:s3cret@127.0.0.1:1", r"redis://u:\*\*\*@127.0.0.1:1'.*111"),
        ("redis://u:s3cret@127.0.0.1:x", r"redis://u:\*\*\*@127.0.0.1:x'.*"),
    ],
)
def test_stores_that_are_none(store: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        counters(store, Database(None, tmp_path))
    assert "s3cret" not in str(refused.value)


def test_redis_without_its_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(MissingExtraError, match=r"mico-chat\[redis\]"):
        counters("redis://127.0.0.1", Database(None, tmp_path))

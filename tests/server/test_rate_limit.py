"""So many requests of each key, no more, and when to come back."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from limits.aio.storage import MemoryStorage
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError
from mico_server.auth import Caller
from mico_server.rate_limit import RateLimit
from tests.server.live import Echo, error_of, live


class As:
    """Puts the caller that a header names where the authentication would."""

    def __init__(self, app: ASGIApp, **limits: str | None) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = dict(scope["headers"]).get(b"x-key", b"").decode()
        state = scope.setdefault("state", {})
        if name:
            key_id = None if name == "local" else f"key-{name}"
            state["caller"] = Caller("tenant", key_id, self.limits.get(name))
        await self.app(scope, receive, send)


def statuses(client: httpx.Client, name: str, n: int, path: str = "/v1/chat") -> list[int]:
    return [client.get(path, headers={"x-key": name}).status_code for _ in range(n)]


def test_each_key_by_itself() -> None:
    with live(As(RateLimit(Echo(), "3/minute"))) as client:
        assert statuses(client, "alice", 5) == [200, 200, 200, 429, 429]
        assert statuses(client, "bob", 4) == [200, 200, 200, 429]


def test_a_keys_own_limit_goes_first() -> None:
    app = As(RateLimit(Echo(), "3/minute"), alice="5/minute", bob="1/hour")
    with live(app) as client:
        assert statuses(client, "alice", 6) == [200] * 5 + [429]
        assert statuses(client, "bob", 2) == [200, 429]
        assert statuses(client, "carol", 4) == [200] * 3 + [429]


class Clock:
    """The time of day, which passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)

    async def nothing(storage: MemoryStorage) -> None:
        """The storage clears itself beside the requests, sooner or later than they ask."""

    monkeypatch.setattr(MemoryStorage, "_MemoryStorage__expire_events", nothing)
    return clock


def test_several_limits_of_a_key(clock: Clock) -> None:
    with live(As(RateLimit(Echo()), alice="2/second; 3/minute")) as client:
        assert statuses(client, "alice", 3) == [200, 200, 429]
        clock.now += 1.1
        assert statuses(client, "alice", 2) == [200, 429]


def test_no_limit_for_the_machine_itself_nor_without_one() -> None:
    with live(As(RateLimit(Echo(), "1/minute"))) as client:
        assert statuses(client, "local", 5) == [200] * 5
    with live(As(RateLimit(Echo()))) as client:
        assert statuses(client, "alice", 5) == [200] * 5


def test_what_is_not_counted() -> None:
    with live(As(RateLimit(Echo(), "1/minute"))) as client:
        assert statuses(client, "alice", 3, "/metrics") == [200] * 3
        assert [client.get("/health/live").status_code for _ in range(3)] == [200] * 3
        assert statuses(client, "alice", 2) == [200, 429]
        assert statuses(client, "alice", 1, "/metrics") == [200]


def test_the_answer_says_when_to_come_back() -> None:
    echo = Echo()
    with live(As(RateLimit(echo, "1/minute"))) as client:
        statuses(client, "alice", 1)
        response = client.post("/v1/chat", headers={"x-key": "alice"}, content=b"x" * 100)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (429, "rate_limit_exceeded")
        seconds = response.headers["retry-after"]
        assert seconds.isdigit()
        assert 55 <= int(seconds) <= 60
        assert f"try again in {seconds} s" in error["message"]
        assert "1 per 1 minute" in error["message"]
        assert echo.read == 0


def test_who_waits_as_long_as_told_is_let_in(clock: Clock) -> None:
    with live(As(RateLimit(Echo(), "2/minute"))) as client:
        assert statuses(client, "alice", 1) == [200]
        clock.now += 18.5
        assert statuses(client, "alice", 1) == [200]
        response = client.get("/a", headers={"x-key": "alice"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "42"  # 41.5 in whole seconds
        clock.now += 41
        assert statuses(client, "alice", 1) == [429]
        clock.now += 1
        assert statuses(client, "alice", 2) == [200, 429]


def test_to_come_back_at_once_is_never_said(clock: Clock) -> None:
    with live(As(RateLimit(Echo(), "1/second"))) as client:
        assert statuses(client, "alice", 1) == [200]
        clock.now += 1.0  # to the instant
        response = client.get("/a", headers={"x-key": "alice"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")


def test_the_window_moves(clock: Clock) -> None:
    """A fixed window would let twice as many in around its border."""
    with live(As(RateLimit(Echo(), "2/second"))) as client:
        assert statuses(client, "alice", 1) == [200]
        clock.now += 0.6
        assert statuses(client, "alice", 2) == [200, 429]
        clock.now += 0.6  # the first has left the window, the second has not
        assert statuses(client, "alice", 2) == [200, 429]


def test_at_once_no_more_than_allowed() -> None:
    limit = RateLimit(Echo(), "5/minute")

    async def ask() -> int:
        found: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            found.append(message.get("status", 0))

        state = {"caller": Caller("tenant", "key-alice")}
        head = {"type": "http", "method": "GET", "path": "/a", "headers": [], "state": state}
        await limit(head, receive, send)
        return found[0]

    async def test() -> list[int]:
        return sorted(await asyncio.gather(*(ask() for _ in range(50))))

    assert asyncio.run(test()) == [200] * 5 + [429] * 45


@pytest.mark.parametrize("text", ["", "fast", "60", "60/fortnight", "-1/minute", "1/minute; x"])
def test_a_limit_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rate limit; write one like '60/minute'"):
        RateLimit(Echo(), text)


def test_a_key_that_may_ask_nothing() -> None:
    with live(As(RateLimit(Echo()), alice="0/minute")) as client:
        assert statuses(client, "alice", 2) == [429, 429]

"""What a connection may cost before a request is known, by real sockets, and by a fake clock."""

import resource
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from mico_server.http.protocol import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    OTHER_FILES,
    BoundedProtocol,
    Connections,
    allow_open_files,
    bounded_protocol,
)
from mico_server.settings import ServerSettings
from tests.server.support.running import Echo, error_of, exchange, live
from tests.support.waiting import until

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"


@pytest.mark.parametrize(
    "head",
    [
        # No byte more, which the service would leave unread: a close would then be a reset.
        (GET + b"A: ").ljust(MAX_HEAD_BYTES, b"a"),
        b"GET /".ljust(MAX_HEAD_BYTES, b"a"),
        b"\r\n" * (MAX_HEAD_BYTES // 2),
        GET + b"a:b\r\n" * MAX_HEADERS + b"\r\n",
    ],
)
def test_a_long_head(head: bytes) -> None:
    app = Echo()
    with live(app, settings=ServerSettings()) as client:
        answer = exchange(client, head)
    assert (answer.status_code, error_of(answer)["code"]) == (431, "headers_too_large")
    assert app.requests == 0


def test_what_is_not_too_long() -> None:
    app = Echo()
    long = GET + b"A: " + b"a" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n"
    many = GET + b"a:b\r\n" * (MAX_HEADERS - 2) + b"Connection: close\r\n\r\n"
    with live(app, settings=ServerSettings()) as client:
        assert client.post("/a", content=b"x" * 3_000_000).json()["body"] == 3_000_000
        pieces = iter([b"x" * 999] * 500)  # more bytes around them than a head may have
        assert client.post("/a", content=pieces).json()["body"] == 499_500
        upgrade = {"connection": "upgrade", "upgrade": "websocket"}
        assert client.get("/a", headers=upgrade).status_code == 200
        assert exchange(client, (GET + b"\r\n") * 9 + long + many).status_code == 200
    assert app.requests == 14


def test_connections_of_one_address() -> None:
    app, settings = Echo(), ServerSettings(max_connections_per_address=2)
    with live(app, settings=settings) as client:
        address = (client.base_url.host, client.base_url.port or 80)
        assert client.get("/a").status_code == 200  # which keeps its connection
        with socket.create_connection(address) as other:
            other.sendall(GET + b"\r\n")
            assert other.recv(65536).startswith(b"HTTP/1.1 200")
            refused = exchange(client)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert "MICO_SERVER_MAX_CONNECTIONS_PER_ADDRESS" in error_of(refused)["message"]
        # The service sees soon that the other is gone.
        until(lambda: exchange(client, GET + b"Connection: close\r\n\r\n").status_code == 200)
        assert client.get("/a").status_code == 200
    assert app.requests == 4


def test_all_connections() -> None:
    connections = Connections(most=3, most_of_one=2)
    assert [connections.enter(a) is None for a in "aaabcc"] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    connections.leave("a")
    assert [connections.enter(a) is None for a in "cc"] == [True, False]


# --- Deadlines ---


@dataclass
class Timer:
    at: float
    what: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """A connection to a service whose time passes when the test says so."""

    def __init__(self) -> None:
        self.now, self.timers, self.transport = 0.0, list[Timer](), Mock()
        self.transport.get_extra_info.return_value = None
        self.transport.get_write_buffer_size.return_value = 0
        self.transport.is_closing.side_effect = lambda: self.ended
        config = uvicorn.Config(Echo(), log_config=None)
        make: Any = bounded_protocol(ServerSettings(head_timeout_s=20, idle_timeout_s=60))
        self.protocol: BoundedProtocol = make(
            config=config, server_state=ServerState(), app_state={}, _loop=self
        )
        self.protocol.connection_made(self.transport)

    @property
    def ended(self) -> bool:
        return bool(self.transport.close.called or self.transport.abort.called)

    def call_later(self, seconds: float, what: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, what))
        return self.timers[-1]

    def create_task(self, work: Any) -> Mock:
        work.close()  # the answer comes when the test says so
        return Mock()

    def after(self, seconds: float, data: bytes = b"") -> bool:
        """Whether the service has ended the connection by then; if not, send the data."""
        self.now += seconds
        for timer in [t for t in self.timers if t.at <= self.now and not t.cancelled]:
            timer.cancel()
            timer.what()
        if data and not self.ended:
            self.protocol.data_received(data)
        return self.ended

    def answered(self) -> None:
        self.protocol.cycle.response_complete = True
        self.protocol.on_response_complete()


def test_a_head_that_does_not_come() -> None:
    silent, dribbling = Clock(), Clock()
    assert [silent.after(19), silent.after(1)] == [False, True]
    ends = [dribbling.after(1, bytes([byte])) for byte in GET]
    assert ends == [False] * 19 + [True] * (len(GET) - 19)


def test_the_next_head_on_a_connection() -> None:
    clock = Clock()
    clock.after(10, GET + b"\r\n")
    assert not clock.after(999)  # while it is answered
    clock.answered()
    assert not clock.after(59, b"\r\n")  # which begins no request
    assert [clock.after(0, b"G"), clock.after(19, b"E"), clock.after(1)] == [False, False, True]
    piped = Clock()
    piped.after(1, GET + b"\r\nG")  # half a head waits while the request before it is answered
    piped.after(999)
    piped.answered()
    assert [piped.after(19), piped.after(1)] == [False, True]


def test_an_idle_connection_is_kept_for_the_next_request() -> None:
    clock = Clock()
    for idle in (1, 59, 59):
        assert not clock.after(idle, GET + b"\r\n")
        assert not clock.after(999)
        clock.answered()
    assert [clock.after(59), clock.after(1)] == [False, True]
    assert ServerSettings().idle_timeout_s == 75  # longer than a proxy in front keeps it


def test_a_body_that_dribbles_after_its_answer() -> None:
    clock = Clock()
    clock.after(1, b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    clock.answered()
    assert [clock.after(1, b"x") for _ in range(20)] == [False] * 19 + [True]


def test_an_answer_that_is_not_taken() -> None:
    clock = Clock()
    clock.after(1, GET + b"Connection: close\r\n\r\n")
    unsent = clock.transport.get_write_buffer_size
    unsent.return_value = 1000
    clock.answered()
    for left in (900, 10):  # slowly
        unsent.return_value = left
        clock.after(20)
        assert not clock.transport.abort.called
    clock.after(20)
    assert clock.transport.abort.called


@pytest.mark.parametrize("trailer", [b"A: " + b"a" * 2 * MAX_HEAD_BYTES, b"a:b\r\n" * MAX_HEADERS])
def test_a_long_trailer_ends_its_request(trailer: bytes) -> None:
    clock = Clock()
    assert not clock.after(1, CHUNKED)
    assert clock.after(1, trailer)
    assert not clock.transport.write.called  # into an answer


def test_requests_that_wait_for_the_one_before() -> None:
    few, many = Clock(), Clock()
    assert not few.after(1, (GET + b"\r\n") * (MAX_PIPELINED + 1))
    assert many.after(1, (GET + b"\r\n") * (MAX_PIPELINED + 2))


# --- Open files ---


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (256, 10_000, 100 + OTHER_FILES),
        (256, resource.RLIM_INFINITY, 100 + OTHER_FILES),
        (256, 300, 300),
        (1000, 10_000, None),
    ],
)
def test_the_limit_of_open_files(
    soft: int, hard: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: raised.append(limits))
    allow_open_files(100)
    assert raised == ([] if expected is None else [(expected, hard)])

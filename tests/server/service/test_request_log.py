"""What is logged of a request, and what never is."""

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from mico_server.http.auth import Auth
from mico_server.http.errors import add_error_handlers
from mico_server.http.request_log import RequestLog, configure_logging
from tests.server.door.test_auth import alice, bearer
from tests.server.support.running import exchange, live
from tests.support.waiting import until

library = logging.getLogger("mico_chat.media.decoder")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    names = ("mico_chat", "mico_server", "uvicorn", "uvicorn.access")
    levels = {name: logging.getLogger(name).level for name in names}
    before = (root.handlers[:], root.level)
    root.handlers.clear()  # pytest's own would be closed
    yield
    root.handlers[:], root.level = before
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def log() -> io.StringIO:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    return stream


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def requests(log: io.StringIO, n: int = 1) -> list[dict[str, Any]]:
    """The access lines, as soon as there are ``n``: they are written after the answer is sent."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines(log) if line["event"] == "request"]

    until(lambda: len(found()) >= n)
    assert len(found()) == n
    return found()


def application() -> FastAPI:
    app = FastAPI()
    app.add_middleware(Auth, keys=alice(), required=True)
    add_error_handlers(app)

    @app.post("/v1/chat")
    async def chat(request: Request) -> dict[str, str]:
        await request.body()
        library.warning("cat.jpg: decoded slowly")
        await asyncio.to_thread(library.info, "in a thread")
        return {"answer": "a tabby"}

    @app.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError("why")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces())

    app.middleware_stack = RequestLog(app.build_middleware_stack())
    return app


@pytest.fixture
def client(log: io.StringIO) -> Iterator[httpx.Client]:
    with live(application()) as started:
        started.headers.update(bearer("alice"))
        yield started


def test_one_line_a_request(client: httpx.Client, log: io.StringIO) -> None:
    response = client.post("/v1/chat?token=secret", content=b"secret words")
    (line,) = requests(log)
    assert line.pop("ms") >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line.pop("timestamp"))
    assert line.pop("request_id") == response.headers["x-request-id"]
    assert line == {
        "event": "request",
        "level": "info",
        "logger": "mico_server.http.request_log",
        "method": "POST",
        "path": "/v1/chat",
        "status": 200,
        "bytes_in": 12,
        "bytes_out": len(response.content),
        "key": "key-alice",
        "client_gone": False,
    }


def test_fields_that_a_library_keeps_for_itself_are_left_out(log: io.StringIO) -> None:
    library.warning("slow", extra={"_private_ns": 1795833235, "frames": 3})
    (line,) = lines(log)
    assert (line["event"], line["frames"]) == ("slow", 3)
    assert not [name for name in line if name.startswith("_")]


def test_nothing_said_is_logged(client: httpx.Client, log: io.StringIO) -> None:
    files = {"image": ("private-name.jpg", b"secret bytes")}
    client.post("/v1/chat?q=secret", data={"message": "secret words"}, files=files)
    client.get("/v1/secret-free", headers=bearer("secret-key"))
    (refused,) = (line for line in requests(log, 2) if line["status"] == 401)
    assert refused["key"] is None
    for word in ("secret-key", "Bearer", "words", "bytes\\", "private-name", "q=", "tabby"):
        assert word not in log.getvalue()


def test_every_line_of_a_request_has_its_id(client: httpx.Client, log: io.StringIO) -> None:
    own = {"x-request-id": "trace-1.2_3"}
    ids = [client.post("/v1/chat", headers=h).headers["x-request-id"] for h in (own, {})]
    assert ids[0] == own["x-request-id"]
    requests(log, 2)
    assert len({*ids}) == 2
    for request_id in ids:
        events = {line["event"] for line in lines(log) if line.get("request_id") == request_id}
        assert events == {"cat.jpg: decoded slowly", "in a thread", "request"}
    library.warning("outside")
    assert "request_id" not in lines(log)[-1]


@pytest.mark.parametrize("given", ["x" * 65, "a b", "ä".encode(), b"a\x1b[31m"])
def test_an_odd_id_is_replaced(client: httpx.Client, log: io.StringIO, given: Any) -> None:
    value = given if isinstance(given, bytes) else given.encode()
    head = (
        b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value + b"\r\n\r\n"
    )
    response = exchange(client, head)
    if response.status_code == 400:
        return  # not even read as HTTP
    request_id = response.headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", request_id)
    assert requests(log)[0]["request_id"] == request_id


def test_a_crash_can_be_found_by_its_id(client: httpx.Client, log: io.StringIO) -> None:
    response = client.get("/crash")
    request_id = response.headers["x-request-id"]
    assert response.status_code == 500
    (line,) = requests(log)
    assert (line["status"], line["request_id"]) == (500, request_id)
    crash = next(line for line in lines(log) if line["event"] == "/crash failed")
    assert crash["request_id"] == request_id
    assert "ZeroDivisionError: why" in crash["exception"]


def test_a_client_that_leaves(client: httpx.Client, log: io.StringIO) -> None:
    with client.stream("GET", "/stream") as response:
        next(response.iter_bytes())
    (line,) = requests(log)
    assert (line["status"], line["client_gone"]) == (200, True)
    assert line["bytes_out"] >= 1000


def test_a_path_cannot_write_lines(client: httpx.Client, log: io.StringIO) -> None:
    for path in ("/a%0Ab", "/%1b[31m", "/%E2%80%AE", "/" + "x" * 5000):
        client.get(path)
    for path in (line["path"] for line in requests(log, 4)):
        assert path.isascii()
        assert path.isprintable()
        assert len(path) <= 200


def test_text_for_a_person() -> None:
    stream = io.StringIO()
    configure_logging("info", "text", stream)
    with structlog.contextvars.bound_contextvars(request_id="req-1"):
        library.warning("%s: two\nlines \x1b[31m", "cat.jpg", extra={"ms": 3})
    library.debug("not shown")
    (line,) = stream.getvalue().splitlines()
    assert "warning" in line
    assert r"cat.jpg: two\nlines \x1b[31m" in line
    assert "request_id=req-1" in line
    assert "ms=3" in line

    # A crash shows no local variables.
    password = "hunter2"
    try:
        raise ValueError(len(password))
    except ValueError:
        library.exception("failed")
    assert "ValueError: 7" in stream.getvalue()
    assert password not in stream.getvalue()


def test_levels() -> None:
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    for name in ("mico_chat.a", "mico_server.a", "httpcore", "sqlalchemy.engine", "aiosqlite"):
        logging.getLogger(name).debug("debug")
        logging.getLogger(name).warning("warning")
    found = [(line["logger"], line["level"]) for line in lines(stream)]
    assert found == [
        *(("mico_chat.a", "debug"), ("mico_chat.a", "warning")),
        *(("mico_server.a", "debug"), ("mico_server.a", "warning")),
        *(("httpcore", "warning"), ("sqlalchemy.engine", "warning"), ("aiosqlite", "warning")),
    ]
    configure_logging("error", "json", stream)
    library.warning("not shown")
    logging.getLogger("httpcore").warning("not shown")
    assert "not shown" not in stream.getvalue()

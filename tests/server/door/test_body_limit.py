"""Bodies that are too long or never come, over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from mico_server.http.auth import Caller
from mico_server.http.errors import add_error_handlers
from mico_server.http.limits import BodyLimit
from mico_server.settings import ServerSettings
from tests.server.support.running import error_of, live
from tests.support.waiting import jumped

MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


class Item(BaseModel):
    text: str


def application() -> FastAPI:
    app = FastAPI()
    settings = ServerSettings(max_body_bytes=300_000, max_json_bytes=1000, body_timeout_s=5)
    app.add_middleware(BodyLimit, settings=settings)
    add_error_handlers(app)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/item")  # read by the framework, which has errors of its own for a broken body
    async def item(item: Item) -> int:
        return len(item.text)

    @app.post("/wait")
    async def wait(request: Request) -> str:
        await request.body()
        try:
            await asyncio.wait_for(request.receive(), 8)
        except TimeoutError:
            return "there"
        return "gone"

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with live(application()) as started:
        yield started


def timed(path: str, *pieces: bytes | float) -> tuple[httpx.Response, float]:
    """The answer to pieces of a body with pauses between them, and the seconds that it took."""

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            if isinstance(piece, bytes):
                yield piece
            else:
                await asyncio.sleep(piece)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(application())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"content-type": "application/json"}
            return await client.post(path, content=body(), headers=headers)

    return jumped(post())


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/raw", "/item"])
def test_a_long_json_body(client: httpx.Client, path: str, chunked: bool) -> None:
    body = b'{"text": "' + b"x" * 2000 + b'"}'
    headers = {"content-type": "application/json"}
    response = client.post(path, content=iter([body]) if chunked else body, headers=headers)
    assert response.status_code == 413
    message = error_of(response)["message"]
    assert ("more than" in message) == chunked  # without a claim, by the bytes that arrive
    assert "1000" in message
    assert "MICO_SERVER_MAX_JSON_BYTES" in message
    assert "/v1/media" in message
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_form_may_be_longer(client: httpx.Client, chunked: bool) -> None:
    body = b"x" * 300_000
    good = client.post("/raw", content=iter([body]) if chunked else body, headers=MULTIPART)
    assert good.json() == 300_000
    body += b"x"
    long = client.post("/raw", content=iter([body]) if chunked else body, headers=MULTIPART)
    assert long.status_code == 413
    assert "MICO_SERVER_MAX_BODY_BYTES" in error_of(long)["message"]


@pytest.mark.parametrize("path", ["/raw", "/item"])
@pytest.mark.parametrize("sent", [b"", b'{"te'])
def test_a_body_that_stops_coming(path: str, sent: bytes) -> None:
    response, seconds = timed(path, sent, 99.0)
    assert (response.status_code, error_of(response)["code"]) == (408, "body_timeout_error")
    assert (response.headers["connection"], seconds) == ("close", 5)


def test_a_slow_body_is_no_stopped_one() -> None:
    response, seconds = timed("/raw", *(4.0, b"x") * 4)
    assert (response.json(), seconds) == (4, 16)


def test_waiting_for_the_client_to_go_is_not_limited() -> None:
    response, seconds = timed("/wait", b"x")
    assert (response.json(), seconds) == ("there", 8)


def test_many_json_values() -> None:
    app = FastAPI()
    app.add_middleware(BodyLimit, settings=ServerSettings(max_json_values=1000))
    add_error_handlers(app)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    with live(app) as client:
        few = b'{"a": [' + b"{}," * 498 + b'"' + b"x" * 500_000 + b'"]}'
        assert client.post("/raw", content=few).json() == len(few)
        assert client.post("/raw", content=b"{" * 1001, headers=MULTIPART).json() == 1001
        answer = client.post("/raw", content=few.replace(b"{", b",{", 3))
        message = error_of(answer)["message"]
        assert answer.status_code == 413
        assert "1002 braces, brackets, commas and colons, over the limit of 1000" in message
        assert "MICO_SERVER_MAX_JSON_VALUES" in message
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post("/raw", content=b"x" * (1 << 20), headers=form).status_code == 200
        long = client.post("/raw", content=b"x" * (1 << 20 | 1), headers=form)
        assert "MICO_SERVER_MAX_TEXT_BYTES" in error_of(long)["message"]


class Held:
    """Requests whose bodies of so many bytes are held until they end."""

    def __init__(self, **settings: Any) -> None:
        self.limit = BodyLimit(self._app, settings=ServerSettings(**settings))
        self.tasks: list[asyncio.Task[None]] = []

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        if scope["fails"]:
            raise ValueError
        await asyncio.Event().wait()

    async def send(self, tenant: str, *pieces: bytes, claim: int = 0, fails: bool = False) -> Any:
        """None while the request is answered; else the error that it ended with."""
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages.append({"type": "http.request", "body": b""})
        headers = [(b"content-length", b"%d" % claim)] if claim else []
        scope = {"type": "http", "headers": headers, "state": {"caller": Caller(tenant)}}

        async def receive() -> Message:
            return messages.pop(0)

        async def ignore(message: Message) -> None: ...

        work = self.limit({**scope, "fails": fails}, receive, ignore)
        self.tasks.append(asyncio.create_task(work))
        for _ in range(50):  # steps enough for all pieces
            await asyncio.sleep(0)
        return self.tasks[-1].exception() if self.tasks[-1].done() else None


@pytest.mark.anyio
async def test_the_memory_of_all_bodies() -> None:
    held = Held(max_bodies_bytes=2000, max_json_bytes=1000)
    memory = held.limit.memory.held
    assert await held.send("a", b"x" * 300, b"x" * 300) is None
    assert await held.send("a", b"[" * 5) is None  # a value counts 64 bytes more
    assert memory == {"a": 600 + 5 * 65}
    for pieces, claim in (((b"x" * 76,), 0), ((b"x" * 50, b"x" * 50), 0), ((b"x",), 76)):
        error = await held.send("a", *pieces, claim=claim)
        assert (error.status_code, error.headers["retry-after"]) == (429, "1")
        assert (
            "of them yours; the most is 2000, and 1000 of one" in error.detail["error"]["message"]
        )
        assert memory == {"a": 925}  # nothing of it
    assert await held.send("b", b"x" * 1000) is None
    assert (await held.send("c", b"x" * 76)).status_code == 429
    assert await held.send("c", b"x" * 75) is None
    held.tasks[0].cancel()  # the client leaves
    assert isinstance(await held.send("d", b"x" * 99, fails=True), ValueError)
    assert memory == {"a": 325, "b": 1000, "c": 75}
    never = await held.send("e", b"[" * 16)
    assert (never.status_code, memory["e"]) == (413, 0)
    for task in held.tasks:
        task.cancel()
    await asyncio.gather(*held.tasks, return_exceptions=True)
    assert not +memory

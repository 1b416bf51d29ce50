"""Bodies that are too long or never come, over real HTTP."""

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel

from mico_server.http.errors import add_error_handlers
from mico_server.http.limits import BodyLimit
from tests.server.running import error_of, exchange, live

MULTIPART = {"content-type": "multipart/form-data; boundary=b"}


class Item(BaseModel):
    text: str


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    app = FastAPI()
    app.add_middleware(BodyLimit, max_bytes=300_000, max_json_bytes=1000, timeout_s=0.5)
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
            await asyncio.wait_for(request.receive(), 0.8)
        except TimeoutError:
            return "there"
        return "gone"

    with live(app) as started:
        yield started


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
def test_a_body_that_stops_coming(client: httpx.Client, path: str, sent: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    started = time.perf_counter()
    response = exchange(client, head.encode() + b"Content-Length: 99\r\n\r\n" + sent)
    assert (response.status_code, error_of(response)["code"]) == (408, "body_timeout_error")
    assert response.headers["connection"] == "close"
    assert time.perf_counter() - started > 0.4


def test_a_slow_body_is_no_stopped_one(client: httpx.Client) -> None:
    def slowly() -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(0.2)
            yield b"x"

    assert client.post("/raw", content=slowly()).json() == 4


def test_waiting_for_the_client_to_go_is_not_limited(client: httpx.Client) -> None:
    assert client.post("/wait", content=b"x").json() == "there"

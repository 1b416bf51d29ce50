"""The service over real HTTP: a uvicorn server on a free port, with a fake engine behind it."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from mico_chat.engine import Engine
from mico_chat.errors import ConfigError, ModelError
from mico_server.app import create_app
from mico_server.run import serve
from mico_server.settings import ServerSettings
from mico_server.uploads import display_name
from tests.fakes import FakeEngine

Start = Callable[..., httpx.Client]


@contextmanager
def running(load: Callable[[], Engine], settings: ServerSettings) -> Iterator[httpx.Client]:
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
    for _ in range(500):
        if client.get("/health/ready").status_code == 200:
            return
        time.sleep(0.01)
    pytest.fail("not ready in 5 s")


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def start_one(engine: FakeEngine, **settings: Any) -> httpx.Client:
            client = stack.enter_context(running(lambda: engine, ServerSettings(**settings)))
            wait_until_ready(client)
            return client

        yield start_one


def error_of(response: httpx.Response) -> dict[str, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code"}
    assert isinstance(error, dict)
    return error


def test_media_of_several_kinds_in_the_forms_order(start: Start) -> None:
    client = start(FakeEngine())
    files = [
        ("audio", ("purr.ogg", b"one")),
        ("image", ("../../cat.jpg", b"three")),
        ("audio", ("meow.ogg", b"x" * 3_000_000)),
    ]
    response = client.post("/v1/chat", data={"message": "Match?"}, files=files)
    assert response.status_code == 200
    body = response.json()
    assert body["answer"] == "[audio purr.ogg, image cat.jpg, audio meow.ogg] Match?"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 2, "media_tokens": 3}
    assert [report["bytes"] for report in body["media"]] == [3, 5, 3_000_000]


def test_options_of_the_form(start: Start) -> None:
    engine = FakeEngine()
    form = {"message": "Hi", "max_tokens": "7", "temperature": "0.5", "stop": ["a", "b"]}
    assert start(engine).post("/v1/chat", data=form).status_code == 200
    (options,) = engine.options
    assert (options.max_tokens, options.temperature, options.stop) == (7, 0.5, ("a", "b"))


def test_requests_that_wait_are_answered_together(start: Start) -> None:
    engine = FakeEngine(gate=threading.Event())
    client = start(engine, max_batch=4)
    questions = ["first", "good", "refuse", "other", "good again"]
    with ThreadPoolExecutor(5) as pool:
        futures = []
        for question in questions:
            futures.append(pool.submit(client.post, "/v1/chat", data={"message": question}))
            time.sleep(0.1)  # the first alone, the others while it is worked on
        assert engine.gate is not None
        engine.gate.set()
        statuses = [future.result().status_code for future in futures]
    assert statuses == [200, 200, 400, 200, 200]
    assert engine.batches[:2] == [1, 4]


def test_too_many_waiting_is_said(start: Start) -> None:
    engine = FakeEngine(gate=threading.Event())
    client = start(engine, max_waiting=1)
    with ThreadPoolExecutor(2) as pool:
        futures = []
        for _ in range(2):
            futures.append(pool.submit(client.post, "/v1/chat", data={"message": "x"}))
            time.sleep(0.1)
        busy = client.post("/v1/chat", data={"message": "x"})
        assert engine.gate is not None
        engine.gate.set()
        assert [future.result().status_code for future in futures] == [200, 200]
    assert busy.status_code == 429
    assert error_of(busy)["code"] == "busy_error"


@pytest.mark.parametrize(
    ("data", "files", "status", "said"),
    [
        ({}, [("image", ("a.png", b"x"))], 400, "message: the field is missing"),
        ({"message": ["a", "b"]}, [], 400, "message: given 2 times"),
        ({"message": "x", "picture": "y"}, [], 400, "unknown field 'picture'; known are message"),
        ({"message": "x", "image": "y"}, [], 400, "image: expected a file"),
        ({"message": "x"}, [("seed", ("a", b"1"))], 400, "seed: expected text, got a file"),
        ({"message": "x", "top_p": "7"}, [], 400, "top_p: .*got '7'"),
        ({"message": "x"}, [("image", ("a.png", b"broken"))], 422, r"a\.png: not a image"),
        ({"message": "x"}, [("image", ("a.png", b""))], 422, r"a\.png: the upload is empty"),
        ({"message": "x"}, [("image", ("a.png", b"x"))] * 4, 400, "[Tt]oo many files"),
        ({"message": "x" * 2000}, [("image", ("a", b"x"))], 400, "[Mm]aximum size"),
        ({"message": "refuse"}, [], 400, "refused"),
    ],
)
def test_errors_say_what_is_wrong(
    start: Start, data: dict[str, str], files: list[tuple[str, object]], status: int, said: str
) -> None:
    client = start(FakeEngine(), max_media=3, max_text_bytes=1024)
    response = client.post("/v1/chat", data=data, files=files or None)  # type: ignore[arg-type]
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert re.search(said, error["message"])


def test_json_body_is_refused(start: Start) -> None:
    response = start(FakeEngine()).post("/v1/chat", json={"message": "x"})
    assert response.status_code == 400
    assert "expected multipart/form-data" in error_of(response)["message"]


def test_crash_tells_nothing_and_the_service_lives(start: Start) -> None:
    client = start(FakeEngine())
    response = client.post("/v1/chat", data={"message": "crash"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert error_of(response)["type"] == "server_error"
    assert client.post("/v1/chat", data={"message": "x"}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_body_beyond_the_limit(start: Start, chunked: bool) -> None:
    client = start(FakeEngine(), max_body_bytes=100_000)
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = head + b"x" * 200_000 + b"\r\n--b--\r\n"
    response = client.post(
        "/v1/chat",
        content=iter([body[:50_000], body[50_000:]]) if chunked else body,
        headers={"content-type": "multipart/form-data; boundary=b"},
    )
    assert response.status_code == 413
    assert "MICO_SERVER_MAX_BODY_BYTES" in error_of(response)["message"]


def test_models_and_unknown_paths(start: Start) -> None:
    client = start(FakeEngine())
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["fake"]
    assert error_of(client.get("/v2"))["code"] == "not_found"
    assert client.get("/openapi.json").json()["paths"]["/v1/chat"]


def test_alive_but_not_ready_while_loading() -> None:
    gate = threading.Event()
    engine = FakeEngine()

    def load() -> Engine:
        assert gate.wait(timeout=30)
        return engine

    with running(load, ServerSettings()) as client:
        assert client.get("/health/live").status_code == 200
        for response in (client.get("/health/ready"), client.post("/v1/chat")):
            assert response.status_code == 503
            assert "still loading" in error_of(response)["message"]
        gate.set()
        wait_until_ready(client)
    assert engine.closed


def test_serve_raises_what_loading_raised() -> None:
    def load() -> Engine:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        serve(load, host="127.0.0.1", port=0, announce=lambda line: None)


def test_port_in_use_is_said_before_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve(FakeEngine, host="127.0.0.1", port=port, announce=lambda line: None)


@pytest.mark.parametrize(
    ("given", "shown"),
    [("a/b/cat.jpg", "cat.jpg"), ("C:\\x\\cat.jpg", "cat.jpg"), ("a\x1b[31m\nb", "a[31mb")],
)
def test_names_are_safe_to_show(given: str, shown: str) -> None:
    assert display_name(given) == shown

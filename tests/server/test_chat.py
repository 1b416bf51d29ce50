"""POST /v1/chat and what the service does around it, over real HTTP; its assistant is a fake."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mico_chat.assistant import Assistant
from mico_chat.engine import GenerationOptions
from mico_chat.errors import ConfigError, ModelError
from mico_server.run import serve
from mico_server.settings import ServerSettings
from tests.fakes import FakeAssistant, FakeEngine
from tests.server.conftest import Start
from tests.server.live import error_of
from tests.server.running import events_of, running, wait_until_ready


def test_media_of_several_kinds_in_the_forms_order(start: Start) -> None:
    client = start(FakeAssistant())
    files = [
        ("audio", ("purr.ogg", b"one")),
        ("image", ("../../cat.jpg", b"three")),
        ("audio", ("meow.ogg", b"x" * 3_000_000)),
    ]
    response = client.post("/v1/chat", data={"message": "Match?"}, files=files)
    assert response.status_code == 200
    body = response.json()
    assert body["answer"] == "[audio purr.ogg, image cat.jpg, audio meow.ogg] Match?"
    assert body["finish_reason"] == "stop"
    tokens = {"prompt_tokens": 10, "completion_tokens": 2, "media_tokens": 3, "cached_tokens": 0}
    assert body["usage"] == tokens
    assert (body["choices"], body["logprobs"]) == ([], [])
    assert [report["bytes"] for report in body["media"]] == [3, 5, 3_000_000]


def test_every_option_of_the_form(start: Start) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    given: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 9,
        "min_p": 0.125,
        "seed": 2**40,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logprobs": 2,
        "n": 3,
        "json_schema": schema,
        "stop": ["a", "b"],
        "prefix": "It is",
    }
    assert {*given} == set(GenerationOptions.model_fields)
    assistant = FakeAssistant()
    form = {**{k: str(v) for k, v in given.items()}, "json_schema": json.dumps(schema)}
    form["stop"] = given["stop"]
    response = start(assistant).post("/v1/chat", data={"message": "Hi", **form})
    assert response.status_code == 200
    assert assistant.options == [GenerationOptions(**given)]


def wait_for(assistant: FakeAssistant, n: int) -> None:
    for _ in range(n):
        assert assistant.started.acquire(timeout=30)


def test_too_many_at_once_is_said(start: Start) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant, max_requests=2)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(client.post, "/v1/chat", data={"message": "x"}) for _ in range(2)]
        wait_for(assistant, 2)
        busy = client.post("/v1/chat", data={"message": "x"})
        gate.set()
        assert [future.result().status_code for future in futures] == [200, 200]
    assert busy.status_code == 429
    assert error_of(busy)["code"] == "busy_error"
    assert 1 <= int(busy.headers["retry-after"]) <= 60
    assert client.post("/v1/chat", data={"message": "x"}).status_code == 200


def test_a_client_that_goes_away_ends_its_answer(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant, max_requests=1)
    body = b"message=Hi"
    head = f"POST /v1/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + body)
        wait_for(assistant, 1)
        assert not assistant.cancelled.is_set()
    assert assistant.cancelled.wait(timeout=30)
    gate.set()
    assert client.post("/v1/chat", data={"message": "x"}).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_upload_that_breaks_off_is_no_crash(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    head = "POST /v1/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
    head += "Content-Type: application/x-www-form-urlencoded\r\n\r\nmessage=H"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head.encode())
    assert client.post("/v1/chat", data={"message": "x"}).status_code == 200
    assert len(assistant.options) == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("data", "files", "status", "said"),
    [
        ({}, [("image", ("a.png", b"x"))], 400, "message: the field is missing"),
        ({"message": ["a", "b"]}, [], 400, "message: given several times"),
        ({"message": "x", "picture": "y"}, [], 400, "unknown field 'picture'; known are message"),
        ({"message": "x", "image": "y"}, [], 400, "image: expected media:ID"),
        ({"message": "x"}, [("seed", ("a", b"1"))], 400, "seed: expected text, got a file"),
        ({"message": "x", "top_p": "7"}, [], 400, "top_p: .*got '7'"),
        ({"message": "x", "n": "0"}, [], 400, "n: .*got '0'"),
        ({"message": "x", "min_p": ["0", "1"]}, [], 400, "min_p: given several times"),
        ({"message": "x", "json_schema": "{"}, [], 400, r"json_schema: not JSON \("),
        ({"message": "x", "json_schema": "[1]"}, [], 400, r"json_schema: .*got \[1\]"),
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
    client = start(FakeAssistant(), max_media=3, max_text_bytes=1024)
    response = client.post("/v1/chat", data=data, files=files or None)  # type: ignore[arg-type]
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert re.search(said, error["message"])


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_a_json_object_is_as_good_as_a_form(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    stored = client.post("/v1/media", files={"image": ("cat.png", b"stored")}).json()["id"]
    schema = {"type": "object"}
    question = {
        "audio": data_uri(b"four", "audio/wav"),
        "message": "Match?",
        "image": [f"media:{stored}", data_uri(b"three")],
        **{"max_tokens": 7, "stop": ["a"], "json_schema": schema, "seed": None},
    }
    body = client.post("/v1/chat", json=question).json()
    assert body["answer"] == "[audio audio, image cat.png, image image] Match?"
    assert [report["bytes"] for report in body["media"]] == [4, 6, 5]
    assert assistant.options == [
        GenerationOptions(max_tokens=7, stop=("a",), json_schema=schema, seed=None)
    ]
    more = {"message": "And?", "conversation_id": body["conversation_id"]}
    assert client.post("/v1/chat", json=more).json()["turn"] == 2
    assert len(assistant.asked[-1][0].media) == 3, "the first message's media are kept"
    streamed = client.post("/v1/chat", json={"message": "Hi", "stream": True, "store": False})
    assert [name for name, _ in events_of(streamed.text)][-1] == "done"
    estimate = client.post("/v1/estimate", json={**more, "max_tokens": 7}).json()
    assert (estimate["media_tokens"], estimate["max_tokens"]) == (3, 7)
    completion = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    assert client.post("/v1/estimate", json=completion).json()["media_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", r"^request body: not JSON \("),
        (b"[]", "^request body: expected a JSON object$"),
        (b"\xff", "^request body: not JSON"),
        ({}, "^message: the field is missing$"),
        ({"message": 3}, "^message: expected a string$"),
        ({"message": "x", "mesage": "y"}, "^unknown field 'mesage'; known are message"),
        ({"message": "x", "image": "a.png"}, "^image: expected media:ID .*multipart form$"),
        ({"message": "x", "image": ["data:,a", 3]}, r"^image\[1\]: expected media:ID"),
        ({"message": "x", "audio": "data:audio/wav;base64,?"}, "^audio: not valid base64$"),
        ({"message": "x", "image": ["data:,a"] * 4}, "4 media, over the limit of 3"),
        ({"message": "x", "top_p": 7}, "^top_p: .*got 7$"),
        ({"message": "x", "stream": "perhaps"}, "^stream: .*got 'perhaps'$"),
        ({"message": "x", "conversation_id": "a\0"}, "^conversation_id: a NUL character"),
        (b'{"message": "x", "stop": ["\\ud800"]}', "^stop: .*surrogate"),
    ],
)
def test_errors_of_a_json_object_say_what_is_wrong(start: Start, body: Any, said: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"content-type": "application/json"}
    client = start(FakeAssistant(), max_media=3)
    response = client.post("/v1/chat", content=content, headers=headers)
    assert response.status_code in (400, 413)
    assert re.search(said, error_of(response)["message"])


def test_another_body_is_refused(start: Start) -> None:
    response = start(FakeAssistant()).post("/v1/chat", content="message=x")
    assert response.status_code == 400
    said = "content-type: expected multipart/form-data or application/json, got nothing"
    assert error_of(response)["message"] == said


def test_a_model_tells_its_defaults(start: Start) -> None:
    assistant = FakeAssistant()
    assistant.defaults = GenerationOptions(repetition_penalty=1.25)
    assistant.system_prompt = "You see."
    (model,) = start(assistant).get("/v1/models").json()["data"]
    assert model["system_prompt"] == "You see."
    defaults = model["defaults"]
    assert (defaults["max_tokens"], defaults["repetition_penalty"]) == (256, 1.25)
    assert defaults["temperature"] == 0


def test_pages_that_need_no_network(start: Start) -> None:
    client = start(FakeAssistant())
    for path in ("/", "/docs", "/redoc"):
        page = client.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert links
        for link in links:
            assert "://" not in link, f"{path} loads from the web"
            assert client.get(f"/{link.removeprefix('/')}").status_code == 200
    assert error_of(client.get("/docs/other.js"))["type"] == "invalid_request_error"


def test_alive_but_not_ready_while_loading(tmp_path: Path) -> None:
    gate = threading.Event()
    assistant = FakeAssistant()

    def load() -> Assistant:
        assert gate.wait(timeout=30)
        return assistant

    with running(load, ServerSettings(data_dir=tmp_path)) as client:
        assert client.get("/health/live").status_code == 200
        for response in (client.get("/health/ready"), client.post("/v1/chat")):
            assert response.status_code == 503
            assert "still loading" in error_of(response)["message"]
        gate.set()
        wait_until_ready(client)
    assert assistant.closed


def test_an_engine_that_has_ended(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    assert client.get("/health/live").status_code == 200
    assistant.engine = ended = FakeEngine()
    ended.failure = "it has ended"
    for response in (
        *(client.get(f"/health/{kind}") for kind in ("live", "ready")),
        client.post("/v1/chat", data={"message": "Hello"}),
    ):
        assert response.status_code == 503
        assert "it has ended; start the service again" in error_of(response)["message"]
    assert client.get("/metrics").status_code == 200


def test_serve_raises_what_loading_raised(tmp_path: Path) -> None:
    def load() -> Assistant:
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        serve(load, announce=lambda line: None, settings=ServerSettings(port=0, data_dir=tmp_path))


def test_port_in_use_is_said_before_loading(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServerSettings(port=port, data_dir=tmp_path)
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve(FakeAssistant, announce=lambda line: None, settings=settings)

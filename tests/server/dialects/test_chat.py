"""POST /v1/chat and what the service does around it, over real HTTP; its assistant is a fake."""

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.http_client import address_of, form_request
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.marks import Marks
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ConfigError, ModelError
from mico_chat.options import FORMS
from mico_server.app import serve
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.server.conftest import Start
from tests.server.support.running import error_of, events_of, running, wait_until_ready
from tests.server.support.sent import completion, data_uri, part
from tests.support.fakes import EXPLAINED, FakeAssistant, FakeEngine
from tests.support.waiting import PATIENCE_S


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
    none = dict.fromkeys(("reasoning_tokens", "turns_left_out", "media_left_out"), 0)
    assert body["usage"] == {**tokens, **none, "pages_sent": []}
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
        "explain": True,
        "depth_scale": 0.5,
        "estimate_depth": False,
        "thinking": False,
        "reasoning_effort": "low",
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": (5, 7),
        "logit_bias": {7: 1.5},
        "truncation": "auto",
        "mm_processor_kwargs": {"max_pixels": 65536},
        "media_io_kwargs": {"video": {"num_frames": 3}},
    }
    others = {*FORMS} - {"json_schema"}  # an answer has one form
    assert {*given} == {*GenerationOptions.model_fields} - others
    assistant = FakeAssistant()
    form: dict[str, Any] = {k: str(v) for k, v in given.items()}
    form |= {
        "json_schema": json.dumps(schema),
        "logit_bias": '{"7": 1.5}',
        **{name: json.dumps(given[name]) for name in ("mm_processor_kwargs", "media_io_kwargs")},
        "stop_token_ids": ["5", "7"],
        "stop": given["stop"],
    }
    response = start(assistant).post("/v1/chat", data={"message": "Hi", **form})
    assert response.status_code == 200
    assert assistant.options == [GenerationOptions(**given)]


def test_an_explanation_comes_where_it_was_asked_for(start: Start) -> None:
    client = start(FakeAssistant())
    files = {"image": ("a.png", b"x")}
    expected = EXPLAINED.model_dump(mode="json")
    for asked, found in (({}, None), ({"explain": "true"}, expected)):
        form = {"message": "Hi", **asked}
        assert client.post("/v1/chat", data=form, files=files).json()["explanation"] == found
        streamed = client.post("/v1/chat", data={**form, "stream": "true"}, files=files)
        assert events_of(streamed.text)[-1][1]["explanation"] == found
    body = completion("Hi", part("image", data_uri("image/png", b"x"))) | {"explain": True}
    assert client.post("/v1/chat/completions", json=body).json()["explanation"] == expected
    lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    (last,) = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert last["explanation"] == expected
    assert all("explanation" not in chunk for chunk in chunks if chunk is not last)


@pytest.mark.parametrize("mark", [None, 0.5])
def test_confidence_and_the_mark_of_unsure_answers(start: Start, mark: float | None) -> None:
    assistant = FakeAssistant()
    assistant.marks = None if mark is None else Marks.read(mark)
    client = start(assistant)

    def rated(found: dict[str, Any]) -> tuple[float | None, bool | None]:
        return found["confidence"] and round(found["confidence"], 6), found["unsure"]

    picture = part("image", data_uri("image/png", b"x"))
    for text, confidence in (("a cat", 0.75), ("perhaps", 0.25)):
        expected = (confidence, None if mark is None else confidence < mark)
        form = {"message": text, "n": "2"}
        files = {"image": ("a.png", b"x")}
        body = client.post("/v1/chat", data=form, files=files).json()
        assert [rated(found) for found in (body, *body["choices"])] == [expected] * 3
        (turn,) = client.get(f"/v1/conversations/{body['conversation_id']}").json()["turns"]
        assert rated(turn) == expected
        stream = client.post("/v1/chat", data={**form, "stream": "true"}, files=files)
        assert rated(events_of(stream.text)[-1][1]) == expected
        request = completion(text, picture)
        body = client.post("/v1/chat/completions", json=request).json()
        assert rated(body["choices"][0]) == expected
        stream = client.post("/v1/chat/completions", json={**request, "stream": True})
        *_, end, done = stream.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        assert rated(json.loads(end.removeprefix("data: "))["choices"][0]) == expected
    body = client.post("/v1/chat", data={"message": "perhaps"}).json()
    assert rated(body) == (None, None), "a chat without media"


def wait_for(assistant: FakeAssistant, n: int) -> None:
    for _ in range(n):
        assert assistant.started.acquire(timeout=PATIENCE_S)


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


def test_an_upload_that_breaks_off_is_no_crash(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    whole = form_request("/v1/chat", {"message": "Hi"})
    with socket.create_connection(address_of(str(client.base_url))) as connection:
        connection.sendall(whole[:-10])
    assert client.post("/v1/chat", data={"message": "x"}).status_code == 200
    assert len(assistant.options) == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("data")
    settings = ServerSettings(data_dir=folder, max_media=3, max_text_bytes=1024)
    with running(FakeAssistant, settings) as client:
        yield client


A = ("image", ("a.png", b"x"))
JSON = {"headers": {"content-type": "application/json"}}


@pytest.mark.parametrize(
    ("status", "request_", "said"),
    [
        (400, {"files": [A]}, "message: field required"),
        (400, {"data": {"message": ["a", "b"]}}, "message: given several times"),
        (400, {"data": {"message": "x", "picture": "y"}}, "unknown field 'picture'; known are mes"),
        (400, {"data": {"message": "x", "image": "y"}}, "image: expected media:ID"),
        (400, {"files": [("seed", ("a", b"1"))]}, "seed: expected text, got a file"),
        (
            413,
            {"files": [A], "data": {"message": "x" * 2000}},
            "more than 1,024 bytes .MICO_SERVER",
        ),
        (400, {"data": {"message": "x", "top_p": "7"}}, "top_p: .*got '7'"),
        (400, {"data": {"message": "x", "min_p": ["0", "1"]}}, "min_p: given several times"),
        (400, {"data": {"message": "x", "json_schema": "{"}}, r"json_schema: not JSON \("),
        (400, {"data": {"message": "x", "json_schema": "[1]"}}, r"json_schema: .*got \[1\]"),
        (
            422,
            {"data": {"message": "x"}, "files": [("image", ("a.png", b"broken"))]},
            "^a.png: not",
        ),
        (422, {"files": [("image", ("a.png", b""))]}, r"^a\.png: the upload is empty"),
        (400, {"files": [A] * 4}, "[Tt]oo many files"),
        (400, {"data": {"message": "refuse"}}, "^refused"),
        (400, {"content": b"{", **JSON}, r"^request body: not JSON \("),
        (400, {"content": b"\xff", **JSON}, "^request body: not JSON"),
        (400, {"json": []}, "^request body: expected a JSON object$"),
        (400, {"json": {}}, "^message: field required, got {}$"),
        (400, {"json": {"message": 3}}, "^message: input should be a valid string, got 3$"),
        (400, {"json": {"message": "x", "mesage": "y"}}, "^unknown field 'mesage'; known are mes"),
        (400, {"json": {"message": "x", "image": "a.png"}}, "^image: .*media:ID .*form$"),
        (400, {"json": {"message": "x", "image": ["data:,a", 3]}}, r"^image\[1\]: expected media:"),
        (400, {"json": {"message": "x", "audio": "data:a/b;base64,?"}}, "^audio: not valid"),
        (413, {"json": {"message": "x", "image": ["data:,a"] * 4}}, "4 media, over the limit of 3"),
        (400, {"json": {"message": "x", "top_p": 7}}, "^top_p: .*got 7$"),
        (400, {"json": {"message": "x", "stream": "perhaps"}}, "^stream: .*got 'perhaps'$"),
        (400, {"json": {"message": "x", "conversation_id": "a\0"}}, "^conversation_id: a NUL char"),
        (400, {"content": b'{"stop": ["\\ud800"]}', **JSON}, r"^stop\[0\]: .*surrogate"),
        (400, {"content": "message=x"}, "^content-type: expected multipart/.* or .*, got nothing$"),
    ],
)
def test_errors_say_what_is_wrong(
    strict: httpx.Client, status: int, request_: dict[str, Any], said: str
) -> None:
    response = strict.post("/v1/chat", **request_)
    error = error_of(response)
    assert (response.status_code, error["type"]) == (status, "invalid_request_error")
    assert re.search(said, error["message"]), error["message"]


def test_a_json_object_is_as_good_as_a_form(start: Start) -> None:
    assistant = FakeAssistant()
    client = start(assistant)
    stored = client.post("/v1/media", files={"image": ("cat.png", b"stored")}).json()["id"]
    schema = {"type": "object"}
    question = {
        "audio": data_uri("audio/wav", b"four"),
        "message": "Match?",
        "image": [f"media:{stored}", data_uri("image/png", b"three")],
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
    assert client.post("/v1/estimate", json=completion("Hi")).json()["media_tokens"] == 0


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
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
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
        assert gate.wait(timeout=PATIENCE_S)
        return assistant

    with running(load, ServerSettings(data_dir=tmp_path), ready=False) as client:
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
        serve(
            [ModelSource("fake", load)],
            announce=lambda line: None,
            settings=ServerSettings(port=0, data_dir=tmp_path),
        )


def test_port_in_use_is_said_before_loading(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServerSettings(port=port, data_dir=tmp_path)
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            serve(
                [ModelSource("fake", FakeAssistant)], announce=lambda line: None, settings=settings
            )

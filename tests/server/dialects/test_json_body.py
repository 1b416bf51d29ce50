"""What every route refuses before it looks at a request: text that is no Unicode, and no JSON."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from mico_chat.engine.base import GenerationOptions
from mico_server.dialects.completions import ChatCompletionRequest
from mico_server.dialects.responses import ResponseRequest
from mico_server.routes.about import KeyRequest
from mico_server.routes.batches import BatchRequest
from mico_server.settings import ServerSettings
from tests.server.support.running import error_of, new_key, running
from tests.support.fakes import FakeAssistant

JSON = {"content-type": "application/json"}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
REST = {"endpoint": "/v1/responses", "completion_window": "24h", "input_file_id": "file-1"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    data = tmp_path_factory.mktemp("data")
    with running(FakeAssistant, ServerSettings(data_dir=data)) as client:
        key = new_key(data, "all", scopes=("admin", "chat", "metrics"))
        client.headers["authorization"] = f"Bearer {key}"
        yield client


def routes(client: httpx.Client) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


HALVES = [
    (b'{"a": [1, {"b": "x\\ud800"}]}', "a[1].b: half of a surrogate pair"),
    (b'{"a": {"\\uDfff": 1}}', r"a.\udfff: half of a surrogate pair"),
    (b'["\\ud83d\\ude00", "\\ude00\\ud83d"]', "[1]: half of a surrogate pair"),
    (b'{"a": "\xed\xa0\x80"}', "request body: not JSON"),
    (b'{"a": "\\ud800', "request body: not JSON"),
    (b"[" * 99_999, "request body: not JSON"),
    (json.dumps(dict.fromkeys(map(str, range(999)))).encode(), "request body: 999 fields, over"),
]


def test_every_route_refuses_what_is_no_text(client: httpx.Client) -> None:
    asked = 0
    for method, path, operation in routes(client):
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            asked += 1
            for body, message in HALVES:
                url = re.sub("{.*?}", "1", path)
                answer = client.request(method, url, content=body, headers=JSON)
                assert answer.status_code == 400, (path, message)
                assert error_of(answer)["message"].startswith(message), path
            if "multipart/form-data" not in operation["requestBody"]["content"]:
                answer = client.request(method, url, files={"a": b"{}"})  # may be 512 MiB long
                assert "expected application/json" in error_of(answer)["message"], path
    assert asked >= 9


def test_whole_pairs_and_other_encodings_are_text(client: httpx.Client) -> None:
    for body in (json.dumps({**CHAT, "user": "\U0001f600"}), json.dumps(CHAT, ensure_ascii=False)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-le"):
            data = body.encode(encoding)
            answer = client.post("/v1/chat/completions", content=data, headers=JSON)
            assert answer.status_code == 200, answer.text
    form = {"message": "Hi", "json_schema": '{"a": "\\ud800"}'}
    assert error_of(client.post("/v1/chat", data=form))["param"] == "json_schema.a"


@pytest.mark.parametrize("text", ["%00", "%ED%A0%80", "%FF", "a" * 5000, "..%2F..%2Fx"])
def test_no_path_or_query_breaks_a_route(client: httpx.Client, text: str) -> None:
    for method, path, operation in routes(client):
        names = [p["name"] for p in operation.get("parameters", ()) if p["in"] == "query"]
        asked = f"{re.sub('{.*?}', text, path)}?" + "&".join(f"{n}={text}" for n in names)
        assert client.request(method, asked, json={}).status_code < 500, (method, asked)


@pytest.mark.parametrize("path", ["/v1/chat", "/v1/media", "/v1/files", "/v1/audio/transcriptions"])
def test_forms_of_any_charset(client: httpx.Client, path: str) -> None:
    name = 'form-data; name="message+2AA-\\ud800\0"; filename="+2AA-\\ud800\0"'
    form = f"--b\r\nContent-Disposition: {name}\r\n\r\n\\ud800+2AA-\0\r\n--b--\r\n"
    for charset in ("utf-7", "unicode_escape", "undefined", "idna", "utf-16", "nonsense", "UTF-8"):
        headers = {"content-type": f"multipart/form-data; charset={charset}; boundary=b"}
        answer = client.post(path, content=form.encode(), headers=headers)
        assert answer.status_code == 400, charset
        assert ("charset" in error_of(answer)["message"]) == (charset != "UTF-8")


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (ChatCompletionRequest, CHAT),
        (ResponseRequest, {"model": "fake", "input": "Hi"}),
        (BatchRequest, REST),
    ],
)
def test_metadata_have_openais_sizes(body: type[BaseModel], given: dict[str, Any]) -> None:
    most = {f"{n:064}": "é" * 512 for n in range(16)}
    body.model_validate({**given, "metadata": most})
    for metadata in ({**most, "a": ""}, {"a" * 65: ""}, {"a": "b" * 513}, {"a": 1}):
        with pytest.raises(ValidationError, match="metadata"):
            body.model_validate({**given, "metadata": metadata})


@pytest.mark.parametrize(
    ("body", "given"),
    [
        (ChatCompletionRequest, {**CHAT, "messages": [1] * 999}),
        (ChatCompletionRequest, {**CHAT, "modalities": [1] * 999}),
        (ChatCompletionRequest, {**CHAT, "metadata": dict.fromkeys(map(str, range(999)))}),
        (ResponseRequest, {"model": "fake", "input": "Hi", "include": [1] * 999}),
        (KeyRequest, {"name": "a", "scopes": ["x"] * 999}),
        (GenerationOptions, {"stop": [1] * 999}),
    ],
)
def test_a_long_list_of_wrong_items_is_one_error(
    body: type[BaseModel], given: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as caught:
        body.model_validate(given)
    assert caught.value.error_count() == 1

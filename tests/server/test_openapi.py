"""The API is as it is described: schemathesis tries every operation, with good data and bad.

``MICO_SCHEMA_EXAMPLES`` makes it try longer.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import jsonschema_rs
import pytest

from tests.fakes import FakeAssistant
from tests.server.conftest import Start
from tests.server.running import events_of
from tests.server.schema_check import Checked, check, described, tiny_service

EXAMPLES = int(os.environ.get("MICO_SCHEMA_EXAMPLES", "5"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checked, Any]:
    """What was found, and the description it was found by."""
    folder = tmp_path_factory.mktemp("schema")
    with tiny_service(folder / "data") as client:
        return check(client, folder, examples=EXAMPLES), described(client)


def test_answers_are_as_described(checked: tuple[Checked, Any]) -> None:
    found, _ = checked
    assert found.passed, found.said
    assert found.cases > 1500


def test_every_operation_was_tried_and_has_succeeded(checked: tuple[Checked, Any]) -> None:
    found, description = checked
    operations = {
        f"{method.upper()} {path}"
        for path, methods in description["paths"].items()
        for method in methods
    }
    assert len(operations) >= 20
    succeeded = {
        name.replace("{model:path}", "{model}")
        for name, statuses in found.statuses.items()
        if any(status < "300" for status in statuses)
    }
    assert operations <= succeeded


def test_errors_are_described_as_they_are(start: Start) -> None:
    description = start(FakeAssistant()).get("/openapi.json").json()
    error = {"$ref": "#/components/schemas/ErrorBody"}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            for status, response in operation["responses"].items():
                if status >= "400":
                    said = response["content"]["application/json"]["schema"]
                    assert said == error, f"{method} {path} {status}"
            if operation.get("parameters") or "requestBody" in operation:
                assert "400" in operation["responses"] or "404" in operation["responses"]
    assert "HTTPValidationError" not in description["components"]["schemas"]


@pytest.mark.parametrize(
    "form",
    [
        {"message": "a b", "logprobs": "1"},
        {"message": "a b", "n": "2", "store": "false"},
        {"message": "slow"},
    ],
)
def test_events_are_as_described(start: Start, form: dict[str, str]) -> None:
    halfway = threading.Event()
    assistant = FakeAssistant(halfway=halfway if form["message"] == "slow" else None)
    client = start(assistant, request_timeout_s=0.5)
    description = client.get("/openapi.json").json()
    answers = description["paths"]["/v1/chat"]["post"]["responses"]["200"]["content"]
    described = {
        event["properties"]["event"]["const"]: event["properties"]["data"]["contentSchema"]
        for event in answers["text/event-stream"]["itemSchema"]["oneOf"]
    }
    files = {"image": ("a.png", b"x")}
    response = client.post("/v1/chat", data={**form, "stream": "true"}, files=files)
    halfway.set()
    events = events_of(response.text)
    assert {name for name, _ in events} == {"media", "delta", events[-1][0]}
    for name, data in events:
        schema = {**described[name], "components": description["components"]}
        jsonschema_rs.validate(schema, data)

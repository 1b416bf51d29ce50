"""The API is as it is described: schemathesis tries every operation, with good data and bad.

``MICO_SCHEMA_EXAMPLES`` makes it try longer.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import torch

from mico_chat.assistant import Assistant
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.similarity import Similarity
from mico_server.settings import ServerSettings
from mico_server.store.keys import SCOPES
from tests.fakes import FakeAssistant
from tests.server.conftest import Start
from tests.server.echo import decoding_assistant
from tests.server.running import events_of, new_key, running, wait_until_ready
from tests.server.served import environment
from tests.tiny import letters

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)


@contextmanager
def tiny_service(folder: Path) -> Iterator[httpx.Client]:
    """A service of random models: only its words have no sense."""
    with MediaDecoder(MediaLimits(timeout_s=20)) as decoder:

        def load() -> Assistant:
            assistant = decoding_assistant(decoder)
            torch.manual_seed(0)
            branch = MicoForPretraining(MicoConfig.tiny(), assistant.encoder.model)
            branch.train(False)
            assistant.similarity = Similarity(branch, letters(), assistant.processor, decoder)
            return assistant

        with running(load, ServerSettings(data_dir=folder)) as client:
            wait_until_ready(client)
            key = new_key(folder, "schemathesis", scopes=tuple(SCOPES))
            client.headers["authorization"] = f"Bearer {key}"
            yield client


def described(client: httpx.Client) -> Any:
    """The service's description, in which ``model`` is the served one.

    Of a hundred thousand random names none is a model's, and a request for another model is
    refused before anything else of it is looked at.
    """
    (model,) = client.get("/v1/models").json()["data"]
    description = client.get("/openapi.json").json()
    for schema in _schemas(description):
        if str(schema.get("title")).endswith("Request"):
            schema["properties"]["model"] = {"type": "string", "enum": [model["id"]]}
    return description


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _schemas(child)


@dataclass(frozen=True)
class Checked:
    said: str
    passed: bool
    cases: int
    statuses: dict[str, Counter[str]]


def check(client: httpx.Client, folder: Path, *, examples: int) -> Checked:
    """Try every operation with the same requests each time.

    ``examples`` is the number of random requests for each, beside those at the edges of every
    field. The service itself counts its answers.
    """
    file = folder / "openapi.json"
    file.write_text(json.dumps(described(client)))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file)]
    command += ["--url", str(client.base_url), "--checks", ",".join(CHECKS), "--no-color"]
    command.append(f"--max-examples={examples}")
    command.append("--generation-deterministic")
    command += ["--workers=1", "--request-timeout=60", "--suppress-health-check=all"]
    command += ["--continue-on-failure"]
    if "authorization" in client.headers:
        command += ["--header", f"Authorization: {client.headers['authorization']}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    counted = re.search(r"(\d+) generated", done.stdout)
    return Checked(
        said=done.stdout + done.stderr,
        passed=done.returncode == 0,
        cases=0 if counted is None else int(counted[1]),
        statuses=_statuses(client.get("/metrics").text),
    )


def _statuses(metrics: str) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    line = r'mico_requests_total\{method="(\w+)",route="([^"]+)",status="(\d+)"\} (\S+)'
    for method, route, status, number in re.findall(line, metrics):
        found.setdefault(f"{method} {route}", Counter())[status] = int(float(number))
    return found


EXAMPLES = int(os.environ.get("MICO_SCHEMA_EXAMPLES", "5"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checked, Any]:
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

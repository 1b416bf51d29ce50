"""The API is as it is described: schemathesis tries every operation, with good data and bad."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from tests.server.running import events_of, new_key, running
from tests.server.served import environment
from tests.tiny import letters

EXAMPLES = int(os.environ.get("MICO_SCHEMA_EXAMPLES", "5"))
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
            key = new_key(folder, "schemathesis", scopes=tuple(SCOPES))
            client.headers["authorization"] = f"Bearer {key}"
            yield client


@dataclass(frozen=True)
class Checked:
    said: str
    passed: bool
    cases: int
    operations: set[str]
    succeeded: set[str]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Tries every operation with the same requests each time.

    ``MICO_SCHEMA_EXAMPLES`` is the number of random requests for each operation, beside those at
    the edges of every field. The service itself counts its answers.
    """
    folder = tmp_path_factory.mktemp("schema")
    file = folder / "openapi.json"
    with tiny_service(folder / "data") as client:
        # Of a hundred thousand random names none is a model's, and a request for another model is
        # refused before anything else of it is looked at.
        text = client.get("/openapi.json").text
        file.write_text(text.replace('"examples":["mini"]', '"enum":["tiny"]'))
        # Its bodies are those of /v1/chat and /v1/chat/completions, read by the same code.
        (folder / "schemathesis.toml").write_text(
            '[[operations]]\ninclude-path = "/v1/estimate"\nphases.coverage.enabled = false\n'
        )
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file)]
        command += ["--url", str(client.base_url), "--checks", ",".join(CHECKS), "--no-color"]
        command += [f"--max-examples={EXAMPLES}", "--generation-deterministic", "--workers=1"]
        command += ["--request-timeout=60", "--suppress-health-check=all", "--continue-on-failure"]
        command += ["--header", f"Authorization: {client.headers['authorization']}"]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True
        )
        counts = client.get("/metrics").text
    cases = re.search(r"(\d+) generated", done.stdout)
    line = r'mico_requests_total\{method="(\w+)",route="([^"]+)",status="2\d\d"\}'
    return Checked(
        said=done.stdout + done.stderr,
        passed=done.returncode == 0,
        cases=0 if cases is None else int(cases[1]),
        operations={
            f"{method.upper()} {path}"
            for path, methods in json.loads(text)["paths"].items()
            for method in methods
        },
        succeeded={
            f"{method} {route.replace('{model:path}', '{model}')}"
            for method, route in re.findall(line, counts)
        },
    )


def test_answers_are_as_described(checked: Checked) -> None:
    assert checked.passed, checked.said
    assert checked.cases > 1500


def test_every_operation_was_tried_and_has_succeeded(checked: Checked) -> None:
    assert len(checked.operations) >= 20
    assert checked.operations <= checked.succeeded


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

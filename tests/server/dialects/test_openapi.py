"""The API is as it is described: schemathesis tries every operation, with good data and bad."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import cast

import httpx
import jsonschema_rs
import pytest
import torch

from mico_chat.adapters.mico import mico_of
from mico_chat.assistant import Assistant
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.media.decoder import Decoder
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.reading import MediaReader
from mico_chat.reading.depths import depth_estimator
from mico_chat.reading.speech import Listener
from mico_chat.similarity import Similarity
from mico_server.settings import ServerSettings
from mico_server.store.keys import SCOPES
from tests.server.conftest import Start
from tests.server.support import sent
from tests.server.support.echo import decoding_assistant
from tests.server.support.running import events_of, new_key, running
from tests.server.support.served import environment
from tests.support.fakes import FakeAssistant, FakeListener
from tests.support.tiny import letters
from tests.support.waiting import PATIENCE_S

EXAMPLES = int(os.environ.get("MICO_SCHEMA_EXAMPLES", "5"))
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)


def embedding_assistant(decoder: Decoder) -> Assistant:
    """An assistant of random models: only its words and numbers have no sense."""
    assistant = decoding_assistant(decoder)
    torch.manual_seed(0)
    branch = MicoForPretraining(MicoConfig.tiny(), mico_of(assistant.adapter).model)
    branch.train(False)
    assistant.encoder.depths = depth_estimator("mini")
    assistant.encoder.reader = MediaReader(listener=cast(Listener, FakeListener("Hello there.")))
    assistant.similarity = Similarity(
        lambda: (branch, letters()), mico_of(assistant.adapter).processor, decoder
    )
    return assistant


def prefer_an_answer(client: httpx.Client) -> None:
    """No random turn is beside another."""
    first = client.post("/v1/chat", data={"message": "x"}).json()
    given = {"message": "x", "conversation_id": first["conversation_id"]}
    other = client.post("/v1/chat", data={**given, "beside": first["turn"]}).json()["turn"]
    url = f"/v1/conversations/{first['conversation_id']}/turns/{other}/preference"
    assert client.put(url, json={"over": first["turn"]}).status_code == 200


def spoken(client: httpx.Client) -> bytes:
    """No random name is a voice."""
    response = client.post("/v1/audio/speech", json={"model": "hibari", "input": "Hello."})
    assert response.status_code == 200
    return response.content


def many_requests() -> bytes:
    """More than are answered before the next call arrives."""
    asked = {"method": "POST", "url": "/v1/responses", "body": {"model": "tiny", "input": "x"}}
    lines = (json.dumps({"custom_id": str(n), **asked}) for n in range(5_000))
    return "\n".join(lines).encode()


@pytest.mark.soak
def test_every_operation_answers_as_described(tmp_path: Path) -> None:
    """Tries every operation with the same requests each time.

    ``MICO_SCHEMA_EXAMPLES`` is the number of random requests for each operation, beside those at
    the edges of every field. The service itself counts its answers.
    """
    settings = ServerSettings(data_dir=tmp_path / "data")
    key = new_key(settings.data_dir, "schemathesis", scopes=tuple(SCOPES))
    with (
        MediaDecoder(MediaLimits(timeout_s=PATIENCE_S)) as decoder,
        running(lambda: embedding_assistant(decoder), settings) as client,
    ):
        client.headers["authorization"] = f"Bearer {key}"
        # Of a hundred thousand random names none is a model's, and a request for another model is
        # refused before anything else of it is looked at.
        text = client.get("/openapi.json").text
        file = tmp_path / "openapi.json"
        file.write_text(text.replace('"examples":["mini"]', '"enum":["tiny"]'))
        # The fields of these two are those of the chat routes and of /v1/embeddings, read by the
        # same code.
        skipped = "phases.coverage.enabled = false"
        # Where requests follow each other, schemathesis stops at a file that it made to be wrong.
        (tmp_path / "schemathesis.toml").write_text(
            'phases.stateful.generation.mode = "positive"\n'
            f'[[operations]]\ninclude-path = "/v1/estimate"\n{skipped}\n'
            f'[[operations]]\ninclude-path = "/v1/score"\n{skipped}\n'
        )
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file)]
        command += ["--url", str(client.base_url), "--checks", ",".join(CHECKS), "--no-color"]
        command += [f"--max-examples={EXAMPLES}", "--generation-deterministic", "--workers=1"]
        command += [
            f"--request-timeout={PATIENCE_S}",
            "--suppress-health-check=all",
            "--continue-on-failure",
        ]
        command += ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        # No random file is a sound.
        path, recording = "/v1/audio/transcriptions", {"file": ("a.mp3", spoken(client))}
        assert client.post(path, data={"model": "tiny"}, files=recording).status_code == 200
        # No random text is the id of a file.
        lines = {"file": ("a.jsonl", many_requests())}
        file = client.post("/v1/files", data={"purpose": "batch"}, files=lines).json()["id"]
        asked = {"input_file_id": file, "endpoint": "/v1/responses"}
        # A person's batches are answered one after the other, so the second one waits.
        _, batch = (client.post("/v1/batches", json=asked).json()["id"] for _ in range(2))
        assert client.post(f"/v1/batches/{batch}/cancel").status_code == 200
        assert client.get(f"/v1/batches/{batch}").status_code == 200
        # No random message has a picture.
        picture = {"image": ("a.png", sent.png(sent.square()))}
        told = client.post("/v1/chat", data={"message": "x"}, files=picture).json()
        url = f"/v1/conversations/{told['conversation_id']}/turns/1/explanation"
        assert client.post(url).status_code == 200
        chat = client.get(f"/v1/conversations/{told['conversation_id']}").json()
        prefer_an_answer(client)
        assert client.post("/v1/conversations", json=chat).status_code == 201
        url = f"/v1/media/{chat['turns'][0]['media'][0]['id']}/depth"
        assert client.post(url).status_code == 201
        # No random picture or name is one.
        taught = client.post("/v1/teach", data={"name": "Z"}, files=picture).json()["id"]
        assert client.patch(f"/v1/teach/{taught}", json={"name": "Y"}).status_code == 200
        assert client.delete(f"/v1/teach/{taught}").status_code == 200
        counts = client.get("/metrics").text
    assert done.returncode == 0, done.stdout + done.stderr
    (cases,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(cases) > 1500
    operations = {
        f"{method.upper()} {path}"
        for path, methods in json.loads(text)["paths"].items()
        for method in methods
    }
    assert len(operations) >= 20
    # No random text is the folder of an adapter; tests/server/service/test_adapters_served.py
    # has one.
    operations -= {f"POST /v1/{do}_lora_adapter" for do in ("load", "unload")}
    line = r'mico_requests_total\{method="(\w+)",route="([^"]+)",status="2\d\d"\}'
    succeeded = {" ".join(found) for found in re.findall(line, counts)}
    assert operations <= {name.replace("{model:path}", "{model}") for name in succeeded}


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
    client = start(assistant, request_timeout_s=0.5 if assistant.halfway else PATIENCE_S)
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
